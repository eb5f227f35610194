"""Every technique on whatever devices are there, as `strategy("auto")` chooses: a table.

Each row trains a GPT-2 in mixed_bfloat16 (float32 on CPUs), compiled by XLA, several steps an
execution, and says how fast, how much memory, and whether the loss fell. What fails is a row too,
with the reason.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --layers 12 --width 768 --batch 16 --length 1024
    python benchmarks/gpu.py --quick --no-jit-compile

Which rows were seen on a GPU, and which on CPUs alone, is in `docs/scale.md`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tfgptopt.training import describe, prepare, strategy  # isort: skip  # Before all else.

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.distillation import HardLabels, LogitsKL, record
from tfgptopt.pruning import NM, ConstantSparsity, Movement, Wanda
from tfgptopt.quantization import Int4, Int8

VOCABULARY = 4096


def pruning(pattern: Any = None, score: Any = None) -> Pruning:
    """Returns the callback that prunes to one half from the first step on."""
    settings = {"pattern": pattern, "score": score}
    given = {name: value for name, value in settings.items() if value is not None}
    return Pruning(ConstantSparsity(0.5, 2, frequency=1000), **given)


class Runs:
    """What the rows of the table train on, and how."""

    def __init__(self, arguments: argparse.Namespace, chosen: tf.distribute.Strategy) -> None:
        self.arguments, self.strategy = arguments, chosen
        # A text that can be learned: every token tells the next.
        starts = np.random.default_rng(0).integers(0, 64, (arguments.batch * 4, 1))
        tokens = ((starts + 7 * np.arange(arguments.length + 1)) % 64).astype(np.int32)
        inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, 1:])}
        rows = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:]))
        self.data = rows.batch(arguments.batch, drop_remainder=True)

    def make(self, layers: int | None = None) -> Any:
        """Returns a GPT-2. Call it in the scope of the strategy."""
        a = self.arguments
        backbone = keras_hub.models.GPT2Backbone(
            VOCABULARY, layers or a.layers, a.width // 64, a.width, 4 * a.width, dropout=0.1,
            max_sequence_length=a.length,
        )  # fmt: skip
        return keras_hub.models.GPT2CausalLM(backbone)

    def compile(self, model: Any, accumulate: int = 1) -> Any:
        """Compiles a model as all rows do."""
        a = self.arguments
        optimizer = keras.optimizers.AdamW(3e-4, global_clipnorm=1.0)
        model.compile(
            optimizer,
            weighted_metrics=[],
            jit_compile=a.jit_compile,
            steps_per_execution=a.execution,
        )
        prepare(model, accumulate)
        return model

    def plain(self, accumulate: int = 1) -> Any:
        """Returns a compiled GPT-2."""
        return self.compile(self.make(), accumulate)

    def lora(self) -> Any:
        """Returns a GPT-2 whose adapters train alone."""
        model = self.make()
        model.backbone.enable_lora(8)
        return self.compile(model)

    def taught(self, kind: str, folder: Path) -> Any:
        """Returns a distiller, by a teacher of one kind."""
        student = self.make()
        teacher: Any = "self" if kind == "self" else self.make(self.arguments.layers + 1)
        if kind == "recorded":
            teacher = record(teacher, self.data, folder / "recording", top_k=16)
        return self.compile(tfgptopt.Distiller(student, teacher, [LogitsKL(), HardLabels()]))


def rows(runs: Runs, folder: Path) -> dict[str, tuple[Callable[[], Any], list[Any]]]:
    """Returns what to make and the callbacks, by the names of rows."""
    rounding, plain = QuantizationAwareTraining, runs.plain
    return {
        "plain": (plain, []),
        "accumulate 2": (lambda: runs.plain(2), []),
        "LoRA": (runs.lora, []),
        "magnitude": (plain, [pruning()]),
        "2:4": (plain, [pruning(NM(2, 4))]),
        "Wanda": (plain, [pruning(score=Wanda(runs.data.take(1)))]),
        "movement": (plain, [pruning(score=Movement())]),
        "int8": (plain, [rounding(Int8())]),
        "int8, learned scales": (plain, [rounding(Int8(scale="learned"))]),
        "int8, frozen scales": (plain, [rounding(Int8(scale="mse"), freeze_step=4)]),
        "int4, blocks of 64": (plain, [rounding(Int4(block_size=64))]),
        "magnitude and int8": (plain, [pruning(), rounding(Int8())]),
        "live teacher": (lambda: runs.taught("live", folder), []),
        "self teacher, int8": (lambda: runs.taught("self", folder), [rounding(Int8())]),
        "recorded teacher": (lambda: runs.taught("recorded", folder), []),
    }


class Watch(keras.callbacks.Callback):
    """Times what follows the first epoch, which traces."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.began = 0.0

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        self.losses.append(float(logs["loss"]))
        self.began = self.began or time.perf_counter()


def memory() -> str:
    """Returns the most memory that the first GPU has held, in MiB."""
    if not tf.config.list_physical_devices("GPU"):
        return "-"
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    tf.config.experimental.reset_memory_stats("GPU:0")
    return f"{peak / 2**20:,.0f}"


def measure(runs: Runs, make: Callable[[], Any], callbacks: list[Any]) -> list[str]:
    """Trains, and returns a row."""
    arguments, watch = runs.arguments, Watch()
    keras.utils.set_random_seed(0)
    with runs.strategy.scope():
        model = make()
    model.fit(
        runs.data.repeat(),
        steps_per_epoch=arguments.steps,
        epochs=3,
        verbose=0,
        callbacks=[*callbacks, watch],
    )
    seconds = time.perf_counter() - watch.began
    tokens = 2 * arguments.steps * arguments.batch * arguments.length / seconds
    fell = "fell" if watch.losses[-1] < watch.losses[0] else "did not fall"
    change = f"{watch.losses[0]:.2f} to {watch.losses[-1]:.2f}, {fell}"
    return [f"{tokens:,.0f}", memory(), change]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--execution", type=int, default=4, help="steps_per_execution")
    parser.add_argument("--dtype", help="Default: mixed_bfloat16 on accelerators, else float32.")
    parser.add_argument("--jit-compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--only", help="A part of the names of rows.")
    parser.add_argument("--quick", action="store_true", help="A tiny model, to try the script.")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.width, arguments.batch = 1, 64, 4
        arguments.length, arguments.steps = 32, 8
    if arguments.strategy == "mirrored" and not tf.config.list_physical_devices("GPU"):
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
    chosen = strategy(arguments.strategy)
    on_cpu = not (tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"))
    dtype = arguments.dtype or ("float32" if on_cpu else "mixed_bfloat16")
    keras.config.set_dtype_policy(dtype)
    names = {device.name: tf.config.experimental.get_device_details(device).get("device_name")
             for device in tf.config.list_physical_devices()}  # fmt: skip
    console = Console(width=100)
    console.print(f"{describe(chosen)}; {names}; {dtype}; jit_compile={arguments.jit_compile}")
    table = Table("", "tokens/s", "peak MiB", "loss, first and last third")
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(arguments, chosen)
        for row, (make, callbacks) in rows(runs, Path(name)).items():
            if arguments.only and arguments.only not in row:
                continue
            try:
                found = measure(runs, make, callbacks)
            except Exception as error:  # A row too.
                found = ["failed", "", f"{type(error).__name__}: {str(error)[:200]}"]
            console.print(row, *found)
            table.add_row(row, *found)
            keras.backend.clear_session()
    console.print(table)


if __name__ == "__main__":
    main()
