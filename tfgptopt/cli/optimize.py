"""`tfgptopt optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfgptopt.cli.outcome import print_outcome
from tfgptopt.cli.shared import (
    Force,
    Out,
    Resume,
    StrategyName,
    choose_strategy,
    console,
    default_recipe,
    load,
    load_libraries,
    print_corpus,
    read_text,
)

if TYPE_CHECKING:
    import keras

    from tfgptopt.data import Corpus
    from tfgptopt.recipe import Recipe
    from tfgptopt.training.planning import Training


def optimize(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs of text.")],
    preset: Annotated[str, typer.Option(help="KerasHub preset: a folder or a name.")],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="int8, int4, pruned_int8 or small; or a YAML of techniques: shrink, rotate, "
            "distill, prune, quantize_aware. "
            "Default: rotation where the model allows it, and quantization-aware training."
        ),
    ] = None,
    spec: Annotated[
        str | None, typer.Option(help="int8, int4, or int4:32 in blocks of 32 inputs. [int8]")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="8 or 4: short for --spec.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights to prune, in [0, 1): a smaller download.")
    ] = None,
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
    context_length: Annotated[
        int | None, typer.Option(help="Positions of the KV cache. Default: all of the model.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 3e-4,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, lion, adafactor or sgd.")] = "adamw",
    schedule: Annotated[
        str,
        typer.Option(
            help="Behind a warmup: cosine, linear, polynomial, exponential, inverse_sqrt, wsd, "
            "constant."
        ),
    ] = "cosine",
    accumulate: Annotated[
        int, typer.Option(help="Parts of a batch that follow each other, to need less memory.")
    ] = 1,
    find_learning_rate: Annotated[
        bool, typer.Option(help="Try a range of learning rates first, and take what it suggests.")
    ] = False,
    dense_run: Annotated[
        bool, typer.Option(help="Also fine-tune the dense model, for a fair comparison.")
    ] = False,
    strategy: StrategyName = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Optimize your own model on your own text or chats: fine-tune, quantize, export, measure."""
    load_libraries()
    from tfgptopt.data.presets import reading_tokenizer
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.optimizing import check_causal_lm
    from tfgptopt.job.optimizing import optimize as run
    from tfgptopt.training.devices import for_chief
    from tfgptopt.training.planning import Training, compile_model

    check_target(out, force)
    training = Training(0, steps, learning_rate, dense_run, lora, optimizer, schedule, accumulate)
    if find_learning_rate and lora is not None:
        raise ValueError("--find-learning-rate tries the whole model: leave out --lora.")
    given = [name for name, value in (("--spec", spec), ("--bits", bits), ("--sparsity", sparsity))
             if value is not None]  # fmt: skip
    if recipe and given:
        raise ValueError(f"The recipe says what is done: leave out {' and '.join(given)}.")
    chosen, words = choose_strategy(strategy)  # Several workers have to meet before all else.
    loaded = _loaded(recipe, steps) if recipe else _recipe(steps, sparsity or 0.0, spec, bits)
    with chosen.scope():
        model = load(preset, dtype)
        if recipe is None and not sparsity and lora is None:
            loaded = _rotated(loaded, model)
        check_causal_lm(model)
        reading_tokenizer(model, preset)
        compile_model(model, training)
    corpus = read_text(text, model, preset, sequence_length, batch_size)
    print_corpus(corpus)
    if find_learning_rate:
        training = _found(model, corpus, training)
    with for_chief(chosen, out) as folder:
        outcome = run(
            model, corpus, loaded, training, folder, words, force, console, context_length, resume
        )
    print_outcome(outcome, out)


def _loaded(recipe: Path, steps: int) -> Recipe:
    """Returns a recipe by its name, or that of a file."""
    from tfgptopt.recipe import Recipe, recipes

    if str(recipe) in recipes.names() and not recipe.exists():
        return recipes.named(str(recipe), steps)
    return Recipe.load(recipe)


def _rotated(recipe: Recipe, model: keras.Model) -> Recipe:
    """Returns a recipe that rotates first, if a model can be rotated."""
    from tfgptopt.quantization.rotation import why_not_rotated
    from tfgptopt.recipe import Recipe, Rotate

    techniques = () if why_not_rotated(model) else (Rotate(),)
    return Recipe((*techniques, *recipe.techniques))


def _found(model: keras.Model, corpus: Corpus, training: Training) -> Training:
    """Returns a training at the learning rate that a range test suggests, and compiles for it."""
    from dataclasses import replace

    from tfgptopt.data import tokens_as_input
    from tfgptopt.model.changing import strategy_scope
    from tfgptopt.training import find_learning_rate
    from tfgptopt.training.planning import compile_model

    with console.status("Trying learning rates"), tokens_as_input(model):
        found = find_learning_rate(model, corpus.train)
    console.print(found.describe())
    training = replace(training, learning_rate=found.suggestion)
    with strategy_scope(model):
        compile_model(model, training)
    return training


def _recipe(steps: int, sparsity: float, spec: str | None, bits: int | None) -> Recipe:
    """Returns the recipe that options ask for.

    Raises:
        ValueError: If one is out of range, or two say the same.
    """
    from tfgptopt.quantization.specs import parse_spec

    if spec is not None and bits is not None:
        raise ValueError("--spec and --bits say the same: give one of them.")
    if bits not in (None, 4, 8):
        raise ValueError(f"--bits must be 4 or 8. Received: {bits}")
    spec = spec or f"int{bits or 8}"
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"--sparsity must be in [0, 1). Received: {sparsity}")
    return default_recipe(0, steps, sparsity, parse_spec(spec))
