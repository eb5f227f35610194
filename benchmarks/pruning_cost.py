"""Time and memory of pruning a model of GPT-2-small size: masks by each pattern, and SparseGPT.

python benchmarks/pruning_cost.py
python benchmarks/pruning_cost.py --sparsegpt    # minutes
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import tfgptopt
from tfgptopt.pruning import (
    NM,
    Block,
    Columns,
    ConstantSparsity,
    Prune,
    Pruner,
    Rows,
    SparseGPT,
    Unstructured,
)

PATTERNS = [
    Unstructured(),
    Unstructured("output"),
    Unstructured("model"),
    NM(2, 4),
    Block(4, 1),
    Block(16, 16),
    Rows(),
    Columns(),
]


def make_model() -> keras_hub.models.GPT2CausalLM:
    """Returns a GPT-2 of 124 million weights, random."""
    backbone = keras_hub.models.GPT2Backbone(50257, 12, 12, 768, 3072, max_sequence_length=1024)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def peak_gigabytes() -> float:
    """Returns the most memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_masks(console: Console) -> None:
    """Times a change of all masks, tracing not counted."""
    table = Table("pattern", "seconds")
    for pattern in PATTERNS:
        model = make_model()
        pruner = Pruner(model, Prune(ConstantSparsity(0.5, 0, frequency=1), pattern))
        times = []
        for step in range(4):
            start = time.perf_counter()
            pruner.advance(step)
            times.append(time.perf_counter() - start)
        table.add_row(str(pattern), f"{statistics.median(times[1:]):.2f}")
    console.print(table)


def measure_sparsegpt(console: Console, windows: int, length: int) -> None:
    """Times SparseGPT on random tokens."""
    model = make_model()
    tokens = np.random.default_rng(0).integers(0, 50257, (windows, length), np.int32)
    batches = [
        {"token_ids": part, "padding_mask": np.ones_like(part)}
        for part in np.split(tokens, windows // 8)
    ]
    before, start = peak_gigabytes(), time.perf_counter()
    tfgptopt.prune(model, 0.5, score=SparseGPT(batches))
    minutes = (time.perf_counter() - start) / 60
    console.print(
        f"SparseGPT, {windows} windows of {length} tokens: {minutes:.1f} minutes, peak "
        f"{peak_gigabytes():.1f} GiB (the model alone {before:.1f})"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsegpt", action="store_true")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    console = Console(width=80)
    if arguments.sparsegpt:
        measure_sparsegpt(console, arguments.windows, arguments.length)
    else:
        measure_masks(console)


if __name__ == "__main__":
    main()
