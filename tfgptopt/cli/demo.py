"""`tfgptopt demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    load_libraries,
    print_corpus,
)

# Chosen so that two cores train it past a bigram model in three minutes.
_DEMO_SHAPE = {
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 192,
    "intermediate_dim": 768,
    "max_sequence_length": 64,
}
# With --quick: a model of one layer and little text.
_QUICK_FILES, _QUICK_SHAPE = 20, {**_DEMO_SHAPE, "num_layers": 1, "hidden_dim": 64}


def demo(
    out: Out = Path("tfgptopt-demo"),
    bits: Annotated[int, typer.Option(help="8 or 4: bits of the weights.")] = 8,
    sparsity: Annotated[float, typer.Option(help="Share of weights to prune, in [0, 1).")] = 0.5,
    strategy: StrategyName = "auto",
    quick: Annotated[
        bool, typer.Option(help="A tiny model and a few steps, to see that it runs.")
    ] = False,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Train, prune, quantize, export and measure a small GPT, in under five minutes.

    The text is the source of Python's standard library, which every machine has.
    """
    load_libraries()
    from tfgptopt.data import load_corpus, standard_library
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.optimizing import optimize, small_gpt
    from tfgptopt.quantization.specs import parse_spec
    from tfgptopt.training.planning import Training, compile_model

    check_target(out, force)
    if bits not in (4, 8):
        raise ValueError(f"--bits must be 4 or 8. Received: {bits}")
    chosen, words = choose_strategy(strategy)
    training = Training(4, 4, 1e-3) if quick else Training(900, 250, 1.2e-3)
    spec = parse_spec(f"int{bits}")
    recipe = default_recipe(training.shared_steps, training.steps, sparsity, spec)
    with console.status("Reading Python's standard library, training a tokenizer"):
        files = [file.path for file in standard_library()[:_QUICK_FILES]] if quick else None
        corpus = load_corpus(
            files, vocabulary_size=288, sequence_length=64, batch_size=16, validation_share=0.015
        )
    print_corpus(corpus)
    import keras

    keras.utils.set_random_seed(0)
    with chosen.scope():
        model = small_gpt(corpus, **(_QUICK_SHAPE if quick else _DEMO_SHAPE))
        compile_model(model, training)
    console.print(f"Model: GPT-2 with {model.count_params() / 1e6:.1f} M weights")
    outcome = optimize(model, corpus, recipe, training, out, words, force, console, None, resume)
    print_outcome(outcome, out)
