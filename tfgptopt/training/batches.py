"""Finds a batch size: speed and memory of growing batches, tried in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.table import Table

from tfgptopt.terminal.tables import as_text
from tfgptopt.training.replicas import accumulate_of

# A larger batch has to be faster by this much to be worth it.
_WORTH = 1.05


@dataclass(frozen=True)
class Trial:
    """What a batch size gave, on one replica.

    Attributes:
        batch_size: Rows on one replica.
        tokens_per_second: Tokens trained on in a second.
        peak_bytes: The most memory: of the process on CPUs, of the device on others.
    """

    batch_size: int
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class BatchSizes:
    """What growing batch sizes gave.

    Attributes:
        trials: Those that ran, the smallest first.
        failed: The first that did not, and why, or `None`.
        suggestion: The smallest batch of one replica that is within 5 percent of the fastest.
        replicas: Number of replicas of the model's strategy.
    """

    trials: tuple[Trial, ...]
    failed: tuple[int, str] | None
    suggestion: int
    replicas: int

    @property
    def global_suggestion(self) -> int:
        """The batch size to give to `fit`, over all replicas."""
        return self.suggestion * self.replicas

    def describe(self) -> str:
        """Returns a table, and what to take."""
        table = Table("rows a replica", "tokens/s", "peak memory", "")
        for trial in self.trials:
            chosen = "<- suggestion" if trial.batch_size == self.suggestion else ""
            memory = f"{trial.peak_bytes / 2**20:,.0f} MiB"
            table.add_row(str(trial.batch_size), f"{trial.tokens_per_second:,.0f}", memory, chosen)
        if self.failed is not None:
            table.add_row(str(self.failed[0]), "failed", self.failed[1][:40], "")
        line = f"Give `fit` batches of {self.global_suggestion}"
        if self.replicas > 1:
            line += f": {self.suggestion} on each of {self.replicas} replicas"
        return as_text(table) + line


def find_batch_size(
    model: keras.Model,
    data: tf.data.Dataset,
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    steps: int = 5,
) -> BatchSizes:
    """Trains a copy of a model with growing batches in a child process.

    The child may run out of memory and be killed; what it measured until then counts. It sees one
    replica; where several share one CPU, they share its speed too.

    Args:
        model: A compiled Keras model that `save` can write, such as a causal LM.
        data: Batches as `fit` takes them; the first is repeated to the size of each trial.
        sizes: Rows of a batch on one replica, rising. It ends at the first that fails.
        steps: int. Steps that are timed for each. Defaults to `5`.

    Returns:
        `BatchSizes`, with a table and a suggestion.

    Raises:
        ValueError: If the model is not compiled, sizes do not rise, or not even the smallest runs.

    Example:

    ```python
    from tfgptopt.training import find_batch_size

    found = find_batch_size(model, data, sizes=(2, 4), steps=2)
    print(found.describe())
    ```
    """
    if getattr(model, "optimizer", None) is None:
        raise ValueError("The model is not compiled: call `model.compile(...)` first.")
    sizes = list(sizes)
    if (
        not sizes
        or sizes != sorted(set(sizes))
        or not all(isinstance(size, int) and size >= 1 for size in sizes)
    ):
        raise ValueError(f"`sizes` must be ints of 1 or more, rising. Received: {sizes}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be an int >= 1. Received: {steps!r}")
    with tempfile.TemporaryDirectory(prefix="tfgptopt-") as name:
        folder = Path(name)
        _write(folder, model, data, sizes, steps)
        trials, failed = _run(folder, sizes)
    if not trials:
        assert failed is not None
        raise ValueError(f"A batch of {failed[0]} does not run: {failed[1]}")
    fastest = max(trial.tokens_per_second for trial in trials)
    suggestion = next(t for t in trials if t.tokens_per_second * _WORTH >= fastest)
    replicas = int(model.distribute_strategy.num_replicas_in_sync)
    return BatchSizes(tuple(trials), failed, suggestion.batch_size, replicas)


def _write(folder: Path, model: Any, data: tf.data.Dataset, sizes: list[int], steps: int) -> None:
    """Writes what the child needs."""
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is not None:
        model.preprocessor = None
    try:
        model.save(folder / "model.keras")
    finally:
        if preprocessor is not None:
            model.preprocessor = preprocessor
    batch = next(iter(data.take(1).as_numpy_iterator()))
    arrays = {str(i): array[:1] for i, array in enumerate(tf.nest.flatten(batch))}
    np.savez(folder / "row.npz", **arrays)
    settings = {
        "structure": tf.nest.map_structure(lambda _: 0, batch),
        "sizes": sizes,
        "steps": steps,
        "optimizer": keras.saving.serialize_keras_object(model.optimizer),
        "jit_compile": bool(model.jit_compile),
        "accumulate": accumulate_of(model),
        # What a dressed model is made of is known where these are imported.
        "modules": sorted(name for name in sys.modules if name.startswith("tfgptopt.")),
    }
    (folder / "settings.json").write_text(json.dumps(settings), "utf-8")


def _run(folder: Path, sizes: list[int]) -> tuple[list[Trial], tuple[int, str] | None]:
    command = [sys.executable, "-m", "tfgptopt.training.trial", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = folder / "trials.jsonl"
    lines = output.read_text("utf-8").splitlines() if output.is_file() else []
    results = [json.loads(line) for line in lines]
    trials = [Trial(**one) for one in results if "error" not in one]
    failed = next(((one["batch_size"], one["error"]) for one in results if "error" in one), None)
    if failed is None and len(trials) < len(sizes):
        why = f"killed by signal {-done.returncode}" if done.returncode < 0 else done.stderr[-300:]
        failed = sizes[len(trials)], why.strip() or f"ended with {done.returncode}"
    return trials, failed
