"""What tells a model and its data from others, in words with checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import Batches, rows_of
from tfgptopt.model import masks
from tfgptopt.model.turning import is_turned, turns_of

_DIGITS = 12


def checksum_of(parts: Iterable[Any]) -> str:
    """Returns a checksum of arrays, with their shapes and types, and of words."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(f"{part}\n".encode())
            continue
        array = np.ascontiguousarray(part)
        found.update(f"{array.dtype} {array.shape}\n".encode())
        words = array.dtype == object  # Such as strings.
        found.update(repr(array.tolist()).encode() if words else array.tobytes())
    return found.hexdigest()[:_DIGITS]


def words_of_model(model: keras.Layer) -> str:
    """Returns what kind of model it is, how large, and a checksum of what it computes with.

    Names are not part of it: Keras counts them up within a process.
    """

    def parts() -> Iterable[Any]:
        for layer in model._flatten_layers():
            yield f"{type(layer).__name__} {layer.dtype_policy.name}"
            if is_turned(layer):
                yield turns_of(layer).to_array()
        for variable in model.weights:
            yield keras.ops.convert_to_numpy(variable.value)
            if masks.masked(variable):
                yield keras.ops.convert_to_numpy(variable.constraint.mask.value)

    return f"{type(model).__name__} of {model.count_params():,} weights ({checksum_of(parts())})"


def words_of_data(batches: Batches) -> str:
    """Returns how much data there is, and a checksum of it."""
    leaves = (
        np.asarray(leaf) if isinstance(leaf, np.ndarray) else tf.convert_to_tensor(leaf).numpy()
        for batch in batches
        for leaf in tf.nest.flatten(batch)
    )
    names = repr([sorted(batch) if isinstance(batch, dict) else None for batch in batches])
    rows = sum(rows_of(batch) for batch in batches)
    return f"{rows:,} tokens in {len(batches)} batches ({checksum_of([names, *leaves])})"
