"""What long trainings cost beside their steps: checkpoints, memory, fits one after another.

python benchmarks/long_runs.py
python benchmarks/long_runs.py --layers 4 --width 256 --batch 16 --length 128
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tfgptopt.callbacks import (
    Checkpoint,
    Pruning,
    QuantizationAwareTraining,
    Regularization,
    TrainingProgress,
)

import tfgptopt
from tfgptopt.pruning import GroupLasso, Movement, PolynomialDecay, Rows
from tfgptopt.quantization import Int8


def resident() -> float:
    """Returns the memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Memory(keras.callbacks.Callback):
    """Notes memory and CPU time every few steps."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.notes = every, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (batch + 1) % self.every == 0:
            self.notes.append((batch + 1, resident(), time.process_time()))


class TimedCheckpoint(Checkpoint):
    """Notes how long each save takes."""

    def _save(self, finished: bool = False) -> None:
        begin = time.perf_counter(), time.process_time()
        super()._save(finished)
        self.times = [
            *getattr(self, "times", []),
            (time.perf_counter() - begin[0], time.process_time() - begin[1]),
        ]


def make(arguments: argparse.Namespace) -> Any:
    """Returns a distiller that learns of a teacher of the same size."""
    keras.utils.set_random_seed(0)
    models = []
    for _ in range(2):
        backbone = keras_hub.models.GPT2Backbone(
            arguments.vocabulary, arguments.layers, max(1, arguments.width // 64),
            arguments.width, 4 * arguments.width, max_sequence_length=arguments.length,
        )  # fmt: skip
        models.append(keras_hub.models.GPT2CausalLM(backbone, preprocessor=None))
    distiller = tfgptopt.Distiller(*models)
    distiller.compile(optimizer=keras.optimizers.AdamW(1e-4))
    return distiller


def callbacks(steps: int) -> list[Any]:
    """Returns every callback but the checkpoint."""
    schedule = PolynomialDecay(0.0, 0.5, 10, max(steps * 2 // 3, 11), frequency=20)
    return [
        Regularization(GroupLasso(1e-6, Rows())),
        Pruning(schedule, score=Movement()),
        QuantizationAwareTraining(Int8(scale="learned")),
        TrainingProgress(console=Console(quiet=True)),
    ]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vocabulary", type=int, default=288)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--fits", type=int, default=20)
    arguments = parser.parse_args()
    console = Console(width=80)
    distiller = make(arguments)
    rows = 32 * arguments.batch
    shape = (rows, arguments.length + 1)
    tokens = np.random.default_rng(0).integers(0, arguments.vocabulary, shape, np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, 1:])}
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:]))
    data = data.shuffle(rows, seed=0).batch(arguments.batch).repeat()
    used = callbacks(arguments.steps)
    memory = Memory(max(arguments.steps // 12, 1))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = TimedCheckpoint(Path(folder) / "long", save_freq=100)
        distiller.fit(
            data, steps_per_epoch=arguments.steps, shuffle=False, verbose=0,
            callbacks=[*used, memory, checkpoint],
        )  # fmt: skip
        size = sum(p.stat().st_size for p in Path(folder).glob("long/step-*/*")) / 1e6
        table = Table("step", "resident MB")
        for step, megabytes, _ in memory.notes:
            table.add_row(str(step), f"{megabytes:.1f}")
        console.print(table)
        (first, _, begin), (last, _, end) = memory.notes[0], memory.notes[-1]
        saves = [seconds for _, seconds in checkpoint.times[:-1]]
        inside = [s for i, s in enumerate(saves, 1) if first < 100 * i <= last]
        step = (end - begin - sum(inside)) / (last - first)
        wall, cpu = np.median(checkpoint.times, axis=0)
        console.print(
            f"A checkpoint ({size / len(checkpoint.times):.1f} MB) takes {1e3 * cpu:.0f} ms of CPU "
            f"({1e3 * wall:.0f} ms), 100 steps {100 * step:.1f} s: {cpu / (100 * step):.2%}"
        )
        table = Table("fit", "resident MB", "s of CPU")
        warnings.filterwarnings("ignore", "The pruning schedule ended")
        for i in range(arguments.fits):
            start = time.process_time()
            distiller.fit(
                data, steps_per_epoch=2, shuffle=False, verbose=0,
                callbacks=[*used, Checkpoint(Path(folder) / f"fit{i}")],
            )  # fmt: skip
            gc.collect()
            seconds = time.process_time() - start
            table.add_row(str(i + 1), f"{resident():.1f}", f"{seconds:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
