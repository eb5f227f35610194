"""`tfgptopt optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tfgptopt.cli.outcome import print_outcome
from tfgptopt.cli.shared import (
    Force,
    Out,
    StrategyName,
    choose_strategy,
    console,
    default_recipe,
    load_libraries,
    load_preset,
    print_corpus,
)

if TYPE_CHECKING:
    from tfgptopt.recipe import Recipe


def optimize(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs of text.")],
    preset: Annotated[str, typer.Option(help="KerasHub preset: a folder or a name.")],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML of techniques: shrink, distill, prune, quantize_aware. "
            "Default: quantization-aware training alone."
        ),
    ] = None,
    spec: Annotated[
        str, typer.Option(help="int8, int4, or int4:32 in blocks of 32 inputs.")
    ] = "int8",
    sparsity: Annotated[
        float, typer.Option(help="Share of weights to prune, in [0, 1): a smaller download.")
    ] = 0.0,
    lora: Annotated[
        int | None, typer.Option(help="Rank of LoRA adapters that train alone, merged at the end.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Policy to train in, such as mixed_bfloat16. As stored.")
    ] = None,
    out: Out = Path("tfgptopt-out"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak of warmup and cosine decay.")] = 3e-4,
    dense_run: Annotated[
        bool, typer.Option(help="Also fine-tune the dense model, for a fair comparison.")
    ] = False,
    strategy: StrategyName = "auto",
    force: Force = False,
) -> None:
    """Optimize your own model on your own text or chats: fine-tune, quantize, export, measure."""
    load_libraries()
    from tfgptopt.data import load_corpus, template_of
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.optimizing import check_causal_lm
    from tfgptopt.job.optimizing import optimize as run
    from tfgptopt.recipe import Recipe
    from tfgptopt.training.planning import Training, compile_model

    check_target(out, force)
    training = Training(0, steps, learning_rate, dense_run, lora)
    loaded = Recipe.load(recipe) if recipe else _recipe(steps, sparsity, spec)
    chosen, words = choose_strategy(strategy)
    with chosen.scope(), console.status(f"Loading {escape(preset)}"):
        model = load_preset(preset, dtype)
        check_causal_lm(model)
        if model.preprocessor is None:
            raise ValueError(f"The preset '{preset}' has no tokenizer.")
        compile_model(model, training)
    with console.status("Reading text"):
        corpus = load_corpus(
            text,
            tokenizer=model.preprocessor.tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            chat_template=template_of(model),
        )
    print_corpus(corpus)
    outcome = run(model, corpus, loaded, training, out, words, force, console)
    print_outcome(outcome, out)


def _recipe(steps: int, sparsity: float, spec: str) -> Recipe:
    """Returns the recipe that options ask for.

    Raises:
        ValueError: If one is out of range.
    """
    from tfgptopt.quantization.specs import parse_spec

    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"--sparsity must be in [0, 1). Received: {sparsity}")
    return default_recipe(0, steps, sparsity, parse_spec(spec))
