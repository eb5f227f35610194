"""Masks that move, against masks that do not: the demo's model at 90 %, equal steps for all.

python benchmarks/regrowth.py
python benchmarks/regrowth.py --sparsity 0.8 --steps 600
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from pruning_quality import RATE, SHAPE, train
from rich.console import Console
from rich.table import Table
from tfgptopt.callbacks import Pruning

from tfgptopt.data import load_corpus
from tfgptopt.evaluation.loss import keras_loss, perplexity
from tfgptopt.job.optimizing import small_gpt
from tfgptopt.pruning import SET, ConstantSparsity, PolynomialDecay, Random, RigL
from tfgptopt.training.planning import Training, compile_model


def variants(sparsity: float, steps: int, every: int, share: float) -> dict[str, Any]:
    """Returns callbacks by the name of their row."""
    moving = ConstantSparsity(sparsity, 0, end_step=steps * 3 // 4, frequency=every)
    gradual = PolynomialDecay(0.0, sparsity, steps // 10, steps * 7 // 10, frequency=10)
    return {
        "dense": [],
        "fixed random mask": [Pruning(ConstantSparsity(sparsity, 0, 1), score=Random())],
        "SET": [Pruning(moving, score=Random(), regrow=SET(share))],
        "RigL": [Pruning(moving, score=Random(), regrow=RigL(share))],
        "gradual magnitude": [Pruning(gradual)],
    }


def main() -> None:
    """Trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=50, help="steps between two moves")
    parser.add_argument("--share", type=float, default=0.3, help="that moves at first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    console = Console(width=80)
    corpus = load_corpus(
        vocabulary_size=288, sequence_length=64, batch_size=16, validation_share=0.015
    )
    found: dict[str, float] = {}
    rows = variants(arguments.sparsity, arguments.steps, arguments.every, arguments.share)
    for name, callbacks in rows.items():
        keras.utils.set_random_seed(arguments.seed)
        model = small_gpt(corpus, **SHAPE)
        compile_model(model, Training(0, arguments.steps, RATE))
        start = time.process_time()
        train(model, corpus, arguments.steps, callbacks)
        found[name] = perplexity(keras_loss(model, corpus.validation))
        seconds = time.process_time() - start
        console.print(f"{name}: {found[name]:.3f} ({seconds:.0f} s of CPU)")
    table = Table("at equal steps", "perplexity", "over gradual magnitude")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}", f"{value / found['gradual magnitude'] - 1:+.1%}")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
