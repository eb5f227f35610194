"""Held-out perplexity of pruned models: at once by each score, and along a schedule in `fit`.

The model and text are those of `tfgptopt demo`. One-shot rows prune the trained dense model. Rows
"in fit" branch off before its last steps, so that all runs see the same number of steps. Rows
"fine-tuned" train the trained model on at the same rate, and are compared with the dense model
trained on as long.

    python benchmarks/pruning_quality.py
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from rich.console import Console
from rich.table import Table
from tfgptopt.callbacks import Pruning

import tfgptopt
from tfgptopt.data import load_corpus, tokens_as_input
from tfgptopt.evaluation.loss import keras_loss, perplexity
from tfgptopt.job.optimizing import small_gpt
from tfgptopt.pruning import (
    NM,
    Block,
    Magnitude,
    Movement,
    PolynomialDecay,
    SparseGPT,
    Unstructured,
    Wanda,
    owl,
    sensitivity,
)
from tfgptopt.training.planning import Training, compile_model

SHAPE = {
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 192,
    "intermediate_dim": 768,
    "max_sequence_length": 64,
}
RATE = 1.2e-3


def train(model: Any, corpus: Any, steps: int, callbacks: Any = ()) -> None:
    """Trains on, from where the optimizer stands."""
    with tokens_as_input(model):
        model.fit(
            corpus.train.repeat(), steps_per_epoch=steps, shuffle=False, verbose=0,
            callbacks=[*callbacks],
        )  # fmt: skip


def snapshot(model: Any) -> list[Any]:
    """Returns weights and the optimizer's state."""
    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def restore(model: Any, values: list[Any]) -> None:
    """Brings back what `snapshot` returned, without masks."""
    if any(isinstance(v.constraint, keras.constraints.Constraint) for v in model.variables):
        tfgptopt.finalize(model)
    for variable, value in zip([*model.variables, *model.optimizer.variables], values, strict=True):
        variable.assign(value)


def one_shot_variants(data: Any, model: Any, corpus: Any) -> dict[str, dict[str, Any]]:
    """Returns arguments of `prune` by the name of their row."""
    by_output = Unstructured("output")
    with tokens_as_input(model):
        labelled = corpus.train.skip(100).take(8)
        by_loss = sensitivity(model, labelled, (0.5, 0.7, 0.85)).allocate(0.7)
    half, most = {"sparsity": 0.5}, {"sparsity": 0.7}
    return {
        "50% magnitude": half,
        "50% Wanda": {**half, "score": Wanda(data)},
        "50% SparseGPT": {**half, "score": SparseGPT(data)},
        "50% magnitude, by output": {**half, "pattern": by_output},
        "50% Wanda, by output": {**half, "pattern": by_output, "score": Wanda(data)},
        "50% magnitude, whole model": {**half, "pattern": Unstructured("model")},
        "2:4 magnitude": {"pattern": NM(2, 4)},
        "2:4 Wanda": {"pattern": NM(2, 4), "score": Wanda(data)},
        "2:4 SparseGPT": {"pattern": NM(2, 4), "score": SparseGPT(data)},
        "70% magnitude": most,
        "70% magnitude, by sensitivity": {**most, "allocation": by_loss},
        "70% Wanda, by output": {**most, "pattern": by_output, "score": Wanda(data)},
        "70% Wanda, by output, OWL": {
            **most,
            "pattern": by_output,
            "score": Wanda(data),
            "allocation": owl(model, data, 0.7),
        },
    }


def branches(
    model: Any, corpus: Any, shared: list[Any], first: int, steps: int, measure: Any
) -> None:
    """Prunes along a schedule, from a dense model that is not trained to its end."""
    for name, sparsity, pattern in (
        ("50% magnitude", 0.5, Unstructured()),
        ("75% magnitude", 0.75, Unstructured()),
        ("2:4 magnitude", 0.5, NM(2, 4)),
        ("75% blocks of 4 inputs", 0.75, Block(4, 1)),
    ):
        restore(model, shared)
        schedule = PolynomialDecay(0.0, sparsity, first, first + steps * 6 // 10, frequency=10)
        train(model, corpus, steps, [Pruning(schedule, pattern)])
        measure(f"in fit {name}")


def fine_tune(model: Any, corpus: Any, steps: int, measure: Any) -> None:
    """Prunes along a schedule, from the trained model on, and trains the dense one on as long."""
    weights = model.get_weights()
    for name, sparsity, score in (
        ("dense", 0.0, None),
        ("50% magnitude", 0.5, Magnitude()),
        ("75% magnitude", 0.75, Magnitude()),
        ("75% movement", 0.75, Movement()),
    ):
        model.set_weights(weights)
        compile_model(model, Training(0, steps, RATE))
        begin = steps // 10 if isinstance(score, Movement) else 0
        schedule = PolynomialDecay(0.0, sparsity, begin, steps * 4 // 10, frequency=10)
        train(model, corpus, steps, [Pruning(schedule, score=score)] if score else [])
        measure(f"fine-tuned {name}")
        if score:
            tfgptopt.finalize(model)


def main() -> None:
    """Trains, prunes, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared-steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=600, help="steps of each branch")
    parser.add_argument("--tuning-steps", type=int, default=600, help="steps of fine-tuning")
    parser.add_argument("--only-fine-tuned", action="store_true", help="leave out other rows")
    parser.add_argument("--windows", type=int, default=512, help="calibration windows of 64 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    console = Console(width=80)
    keras.utils.set_random_seed(arguments.seed)
    corpus = load_corpus(
        vocabulary_size=288, sequence_length=64, batch_size=16, validation_share=0.015
    )
    calibration = [batch[0] for batch in corpus.train.take(arguments.windows // 16)]
    model = small_gpt(corpus, **SHAPE)
    compile_model(model, Training(arguments.shared_steps, arguments.steps, RATE))
    found: dict[str, float] = {}

    def measure(name: str) -> None:
        found[name] = perplexity(keras_loss(model, corpus.validation))
        console.print(f"{name}: {found[name]:.3f}")

    if arguments.shared_steps:
        train(model, corpus, arguments.shared_steps)
    shared = snapshot(model) if arguments.shared_steps else []
    train(model, corpus, arguments.steps)
    trained = snapshot(model)
    measure("dense")
    if not arguments.only_fine_tuned:
        for name, settings in one_shot_variants(calibration, model, corpus).items():
            restore(model, trained)
            tfgptopt.prune(model, **settings)
            measure(f"one-shot {name}")
        branches(model, corpus, shared, arguments.shared_steps, arguments.steps, measure)
        restore(model, trained)
    fine_tune(model, corpus, arguments.tuning_steps, measure)
    table = Table("pruned", "perplexity", "over dense")
    for name, value in found.items():
        dense = found["fine-tuned dense" if name.startswith("fine-tuned") else "dense"]
        table.add_row(name, f"{value:.3f}", f"{value / dense - 1:+.1%}")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
