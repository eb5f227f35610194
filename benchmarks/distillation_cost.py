"""What a training step costs with a teacher beside the student, and with a recorded one.

Plain step, teacher's forward pass and both kinds of distillation take turns; published are ratios
of medians, and the bytes of the recording.

    python benchmarks/distillation_cost.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tfgptopt.distillation import Distiller, LogitsKL, record


def make(layers: int, width: int, vocabulary: int, context: int) -> Any:
    """Returns a GPT-2 with random weights."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_heads=width // 64,
        hidden_dim=width,
        intermediate_dim=4 * width,
        dropout=0.0,
        max_sequence_length=context,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def stepper(model: Any, data: tf.data.Dataset) -> Callable[[], Any]:
    """Returns a function that runs one compiled training step."""
    model.make_train_function()
    function = model.train_function
    iterator = iter(data.repeat())
    return lambda: tf.nest.map_structure(np.asarray, function(iterator))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--teacher-layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--top-k", type=int, default=64)
    settings = parser.parse_args()
    shape = settings.width, settings.vocabulary, settings.tokens
    teacher = make(settings.teacher_layers, *shape)
    rows = 4 * settings.batch
    tokens = np.random.default_rng(0).integers(
        0, settings.vocabulary, (rows, settings.tokens + 1), np.int32
    )
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, 1:])}
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:])).batch(settings.batch)
    folder = tempfile.TemporaryDirectory()
    recording = record(teacher, data, Path(folder.name) / "said", settings.top_k)
    students = [make(settings.layers, *shape) for _ in range(3)]
    live, recorded = (
        Distiller(students[1], teacher),
        Distiller(students[2], recording, [LogitsKL()]),
    )
    students[0].compile(optimizer="adam", loss="auto", weighted_metrics=[])
    for distiller in (live, recorded):
        distiller.compile(optimizer="adam")
    first = next(iter(data))[0]
    forward = tf.function(lambda: teacher(first, training=False)[0, 0, 0])
    calls = {
        "student step": stepper(students[0], data),
        "teacher forward": lambda: forward().numpy(),
        "distillation, live": stepper(live, data),
        "distillation, recorded": stepper(recorded, recording.attach(data.cache())),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(settings.steps + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:  # The first ones compile.
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(found) for name, found in times.items()}
    both = medians["student step"] + medians["teacher forward"]
    notes = {
        "distillation, live": (medians["distillation, live"] / both, "of step + forward"),
        "distillation, recorded": (
            medians["distillation, recorded"] / medians["student step"],
            "of the student step",
        ),
    }
    table = Table("", "ms", "times", "")
    for name, median in medians.items():
        ratio, what = notes.get(name, (None, ""))
        table.add_row(name, f"{median:.1f}", f"{ratio:.3f}" if ratio else "", what)
    console = Console(width=80)
    console.print(table)
    each = recording.file_bytes / (rows * settings.tokens)
    console.print(
        f"recording: {each:.0f} bytes per token, {each / (4 * settings.top_k):.2f} x top_k x 4"
    )


if __name__ == "__main__":
    main()
