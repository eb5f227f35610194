"""Throughput of two replicas on two cores, against one replica with the same global batch.

Both train in one process by turns, so that a change of the machine's speed hits both. Wall time is
what counts; CPU time beside it shows what the rest of the machine took.

    python benchmarks/replicas.py
    python benchmarks/replicas.py --rounds 3 --prune --round
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

from tfgptopt.pruning import ConstantSparsity
from tfgptopt.quantization import Int8
from tfgptopt.training import prepare, strategy

LENGTH, VOCABULARY = 128, 4096


def make(chosen: tf.distribute.Strategy, arguments: argparse.Namespace) -> Any:
    """Returns a compiled GPT-2 of 4 layers, width 256, in a strategy."""
    with chosen.scope():
        backbone = keras_hub.models.GPT2Backbone(
            VOCABULARY, 4, 4, 256, 1024, dropout=0.0, max_sequence_length=LENGTH
        )
        model = keras_hub.models.GPT2CausalLM(backbone)
        optimizer = keras.optimizers.AdamW(1e-4, global_clipnorm=1.0)
        model.compile(optimizer, weighted_metrics=[], jit_compile=arguments.jit_compile)
        prepare(model, arguments.accumulate)
    return model


class Clock(keras.callbacks.Callback):
    """Times the steps of a `fit` behind the first two, on the wall and on the CPUs."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if batch == 1:
            self.began = time.perf_counter(), time.process_time()
        self.ended = time.perf_counter(), time.process_time()


def seconds(model: Any, data: tf.data.Dataset, arguments: argparse.Namespace) -> tuple[float, ...]:
    """Returns seconds a step: on the wall, on the CPUs."""
    clock = Clock()
    callbacks: list[keras.callbacks.Callback] = [clock]
    if arguments.prune:
        callbacks.append(Pruning(ConstantSparsity(0.5, 0)))
    if arguments.round:
        callbacks.append(QuantizationAwareTraining(Int8()))
    model.fit(data, steps_per_epoch=arguments.steps + 2, verbose=0, callbacks=callbacks)
    return tuple((b - a) / arguments.steps for a, b in zip(clock.began, clock.ended, strict=True))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--jit-compile", action="store_true")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--round", action="store_true")
    arguments = parser.parse_args()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (arguments.batch, LENGTH + 1))
    tokens = tokens.astype(np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, 1:])}
    rows = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:]))
    data = rows.batch(arguments.batch, drop_remainder=True).cache().repeat()
    models = {"one replica": make(strategy("default"), arguments),
              "two replicas": make(strategy("mirrored"), arguments)}  # fmt: skip
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in models}
    for turn in range(arguments.rounds + 1):
        for name, model in models.items():
            found = seconds(model, data, arguments)
            if turn:  # The first traces.
                taken[name].append(found)
    table = Table("", "ms a step", "CPU ms a step", "throughput of one, by turns")
    for name, pairs in taken.items():
        wall, cpus = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [a[0] / b[0] for a, b in zip(taken["one replica"], pairs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{wall:.0f}", f"{cpus:.0f}", spread)
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
