"""Held-out perplexity of pruned models: at once by each score, and along a schedule in `fit`.

The model and text are those of `tfgptopt demo`. One-shot rows prune the trained dense model;
schedule rows branch off before its last steps, so that all runs see the same number of steps.

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
from tfgptopt.optimizing import Training, compile_model, small_gpt
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
)

SHAPE = {
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 192,
    "intermediate_dim": 768,
    "max_sequence_length": 64,
}


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


def one_shot_variants(data: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Returns arguments of `prune` by the name of their row."""
    by_output = Unstructured("output")
    half, most = {"sparsity": 0.5}, {"sparsity": 0.7}
    return {
        "50% magnitude": half,
        "50% magnitude, whole model": {**half, "pattern": Unstructured("model")},
        "50% Wanda": {**half, "pattern": by_output, "score": Wanda(data)},
        "50% Wanda, whole tensor": {**half, "score": Wanda(data)},
        "50% SparseGPT": {**half, "score": SparseGPT(data)},
        "2:4 magnitude": {"pattern": NM(2, 4)},
        "2:4 Wanda": {"pattern": NM(2, 4), "score": Wanda(data)},
        "2:4 SparseGPT": {"pattern": NM(2, 4), "score": SparseGPT(data)},
        "70% Wanda": {**most, "pattern": by_output, "score": Wanda(data)},
        "70% Wanda, OWL": {
            **most,
            "pattern": by_output,
            "score": Wanda(data),
            "allocation": owl(model, data, 0.7),
        },
    }


def main() -> None:
    """Trains, prunes, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000, help="steps of each branch")
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
    compile_model(model, Training(arguments.shared_steps, arguments.steps, 1.2e-3))
    found: dict[str, float] = {}

    def measure(name: str) -> None:
        found[name] = perplexity(keras_loss(model, corpus.validation))
        console.print(f"{name}: {found[name]:.3f}")

    train(model, corpus, arguments.shared_steps)
    shared = snapshot(model)
    train(model, corpus, arguments.steps)
    trained = snapshot(model)
    measure("dense")
    for name, settings in one_shot_variants(calibration, model).items():
        restore(model, trained)
        tfgptopt.prune(model, **settings)
        measure(f"one-shot {name}")
    first = arguments.shared_steps
    last = first + arguments.steps * 6 // 10
    for name, sparsity, pattern, score in (
        ("50% magnitude", 0.5, Unstructured(), Magnitude()),
        ("75% magnitude", 0.75, Unstructured(), Magnitude()),
        ("75% magnitude, whole model", 0.75, Unstructured("model"), Magnitude()),
        ("75% movement", 0.75, Unstructured(), Movement()),
        ("2:4 magnitude", 0.5, NM(2, 4), Magnitude()),
        ("75% blocks of 4 inputs", 0.75, Block(4, 1), Magnitude()),
    ):
        restore(model, shared)
        begin = first + (arguments.steps // 20 if isinstance(score, Movement) else 0)
        schedule = PolynomialDecay(0.0, sparsity, begin, last, frequency=10)
        train(model, corpus, arguments.steps, [Pruning(schedule, pattern, score)])
        measure(f"in fit {name}")
        if not tfgptopt.pruning.report(model).holds:
            raise RuntimeError(f"{name}: the pattern does not hold")
    table = Table("pruned", "perplexity", "over dense")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}", f"{value / found['dense'] - 1:+.1%}")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
