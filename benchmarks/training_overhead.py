"""Costs of the callbacks per training step, against the plain step.

Steps of the variants take turns within one run, so that a change of the machine's speed hits all.

    python benchmarks/training_overhead.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import tfgptopt
from tfgptopt.pruning import ConstantSparsity
from tfgptopt.pruning.pruner import Pruner
from tfgptopt.quantization import Int8


def make_model(layers: int, width: int, vocabulary: int, jit_compile: bool) -> keras.Model:
    """Returns a compiled GPT-2."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary, layers, width // 64, width, 4 * width, dropout=0.0, max_sequence_length=128
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(optimizer=keras.optimizers.AdamW(1e-4), jit_compile=jit_compile)
    return model


def prune(model: keras.Model) -> None:
    """Prunes to one half and holds it."""
    Pruner(model, ConstantSparsity(0.5, 0)).advance(0)


def quantize(model: keras.Model) -> None:
    """Rounds weights and activations."""
    tfgptopt.quantize_aware(model, Int8())


def both(model: keras.Model) -> None:
    """Does both."""
    prune(model)
    quantize(model)


VARIANTS = {"plain": lambda model: None, "pruning": prune, "int8": quantize, "both": both}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--jit-compile", action="store_true")
    arguments = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, arguments.vocabulary, (arguments.batch, 129))
    inputs = {
        "token_ids": tokens[:, :-1].astype(np.int32),
        "padding_mask": np.ones((arguments.batch, 128), np.int32),
    }
    models = {}
    for name, dress in VARIANTS.items():
        models[name] = make_model(
            arguments.layers, arguments.width, arguments.vocabulary, arguments.jit_compile
        )
        dress(models[name])
        for _ in range(2):
            models[name].train_on_batch(inputs, tokens[:, 1:])
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.steps):
        for name, model in models.items():
            start = time.perf_counter()
            model.train_on_batch(inputs, tokens[:, 1:])
            times[name].append(1e3 * (time.perf_counter() - start))
    table = Table("variant", "ms per step", "times plain")
    plain = statistics.median(times["plain"])
    for name, measured in times.items():
        median = statistics.median(measured)
        table.add_row(name, f"{median:.1f}", f"{median / plain:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
