"""Decoding speed and size of float32 files with sparse blocks, against the dense file.

A GPT-2 of GPT-2-small size with random weights, pruned with `Block(4, 1)`. Tokens of the files
take turns within one run.

    python benchmarks/sparse_decode.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.pruning import Block


def export_variants(folder: Path, sparsities: list[float], layers: int) -> dict[str, Path]:
    """Returns the files by the name of their row."""
    backbone = keras_hub.models.GPT2Backbone(50257, layers, 12, 768, 3072, max_sequence_length=256)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    dense = model.get_weights()
    files = {"dense": tfgptopt.export(model, folder / "dense.tflite")}
    for sparsity in sparsities:
        tfgptopt.prune(model, sparsity, Block(4, 1))
        name = f"{sparsity:.0%} blocks"
        files[name] = tfgptopt.export(model, folder / f"{sparsity}.tflite", TFLite(sparse=True))
        tfgptopt.finalize(model)
        model.set_weights(dense)
    return files


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prompt = np.random.default_rng(0).integers(0, 50257, 64).tolist()
    with tempfile.TemporaryDirectory() as folder:
        files = export_variants(Path(folder), [0.6, 0.75, 0.9], arguments.layers)
        sizes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
        loaded = {
            name: tfgptopt.TFLiteCausalLM(path, num_threads=arguments.threads)
            for name, path in files.items()
        }
        decode: dict[str, list[float]] = {name: [] for name in loaded}
        for _ in range(5):
            for name, lm in loaded.items():
                # What was read is kept, so that the second call only decodes.
                lm.generate(prompt, max_length=65, stop=None)
                start = time.perf_counter()
                lm.generate(prompt, max_length=64 + arguments.tokens, stop=None)
                decode[name].append(1e3 * (time.perf_counter() - start) / arguments.tokens)
    table = Table("file", "MB", "ms per token", "times faster")
    dense = statistics.median(decode["dense"])
    for name, times in decode.items():
        median = statistics.median(times)
        table.add_row(name, f"{sizes[name]:.0f}", f"{median:.1f}", f"{dense / median:.2f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
