"""`tfgptopt optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def optimize(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs of text.")],
    preset: Annotated[str, typer.Option(help="KerasHub preset: a folder or a name.")],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML of techniques: shrink, distill, prune, quantize_aware. "
            "Default: prune 50 %, round to int8."
        ),
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
    """Optimize your own model on your own text: fine-tune, prune, quantize, export, measure."""
    load_libraries()
    from tfgptopt.data import load_corpus
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.optimizing import check_causal_lm
    from tfgptopt.job.optimizing import optimize as run
    from tfgptopt.recipe import Recipe
    from tfgptopt.training.planning import Training, compile_model

    check_target(out, force)
    training = Training(0, steps, learning_rate, dense_run)
    loaded = Recipe.load(recipe) if recipe else default_recipe(0, steps, 0.5, 8)
    chosen, words = choose_strategy(strategy)
    with chosen.scope(), console.status(f"Loading {escape(preset)}"):
        model = load_preset(preset)
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
        )
    print_corpus(corpus)
    outcome = run(model, corpus, loaded, training, out, words, force, console)
    print_outcome(outcome, out)
