"""Measures growing batches: the child process of `find_batch_size`.

`python -m tfgptopt.training.trial folder`
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import keras
import keras_hub  # noqa: F401  So that its classes are known.
import numpy as np
import tensorflow as tf

from tfgptopt.training.replicas import prepare


def _peak_bytes() -> int:
    devices = tf.config.list_logical_devices("GPU")
    if devices:
        return int(tf.config.experimental.get_memory_info(devices[0].name[-5:])["peak"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _batch(settings: dict[str, Any], arrays: dict[str, np.ndarray], size: int) -> Any:
    """Returns a row so many times, as the batch that it was taken from."""
    rows = [tf.repeat(arrays[str(i)], size, axis=0) for i in range(len(arrays))]
    batch = tf.nest.pack_sequence_as(settings["structure"], rows)
    return tuple(batch) if isinstance(batch, list) else batch


def measure(model: Any, batch: Any, size: int, steps: int) -> dict[str, float]:
    """Returns tokens per second and peak memory of one batch size."""
    data = tf.data.Dataset.from_tensors(batch).repeat()
    tokens = next(x for x in tf.nest.flatten(batch) if x.shape.rank >= 1)
    model.fit(data, steps_per_epoch=1, verbose=0)  # Traces, and is not timed.
    model.fit(data, steps_per_epoch=1, verbose=0)
    began = time.perf_counter()
    model.fit(data, steps_per_epoch=steps, verbose=0)
    seconds = time.perf_counter() - began
    rate = steps * int(tf.size(tokens)) / seconds
    return {"batch_size": size, "tokens_per_second": rate, "peak_bytes": _peak_bytes()}


def main(folder: Path) -> None:
    """Measures one size after the other, and writes a line for each."""
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    for name in settings["modules"]:
        importlib.import_module(name)
    arrays = dict(np.load(folder / "row.npz"))
    model: Any = keras.saving.load_model(folder / "model.keras")
    model.optimizer = keras.saving.deserialize_keras_object(settings["optimizer"])
    model.jit_compile = settings["jit_compile"]
    prepare(model, settings["accumulate"])
    with (folder / "trials.jsonl").open("w", encoding="utf-8") as output:
        for size in settings["sizes"]:
            try:
                batch = _batch(settings, arrays, size)
                result: Any = measure(model, batch, size, settings["steps"])
            except tf.errors.ResourceExhaustedError as error:
                result = {"batch_size": size, "error": f"out of memory: {error.message[:200]}"}
            output.write(json.dumps(result) + "\n")
            output.flush()
            if "error" in result:
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
