"""The best weights that a callback keeps, as arrays of a checkpoint: with masks and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np

from tfgptopt.model.carrying import Weights

_NAME = "best_weights"  # As EarlyStopping calls them.
_ARRAY, _MASK, _SCALE, _NO_SCALE = "array", "mask", "scale", "no_scale"


def kept_weights(callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, np.ndarray]:
    """Returns the weights that callbacks keep, by names that `give_back` understands."""
    found: dict[str, np.ndarray] = {}
    for i, callback in enumerate(callbacks):
        best = vars(callback).get(_NAME)
        if best is None:
            continue
        entries = [(_ARRAY, one) for one in best]
        entries += [_entry(state) for state in getattr(best, "states", [])]
        for j, (kind, value) in enumerate(entries):
            array = np.asarray(value)
            # numpy writes bfloat16 as bytes of no type.
            halves = array.dtype == ml_dtypes.bfloat16
            array = array.view(np.uint16) if halves else array
            found[f"best_{i}_{j:05d}_{kind}{'.bfloat16' * halves}"] = array
    return found


def _entry(state: Any) -> tuple[str, Any]:
    """Returns what kind of state a mask or a quantizer gave, and its numbers."""
    if not isinstance(state, tuple):
        return _MASK, state
    return (_NO_SCALE, 0) if state[0] is None else (_SCALE, state[0])


def give_back(
    callback: keras.callbacks.Callback, number: int, arrays: dict[str, np.ndarray]
) -> None:
    """Gives a callback the weights back that it kept.

    Args:
        callback: The callback.
        number: int. Its place among those that `kept_weights` was given.
        arrays: What `kept_weights` returned, among others.
    """
    weights: list[np.ndarray] = []
    states: list[Any] = []
    for name in sorted(name for name in arrays if name.startswith(f"best_{number}_")):
        plain = name.removesuffix(".bfloat16")
        array = arrays[name] if plain == name else arrays[name].view(ml_dtypes.bfloat16)
        kind = plain.split("_", 3)[3]
        if kind == _ARRAY:
            weights.append(array)
        else:
            states.append(array if kind == _MASK else (None if kind == _NO_SCALE else array,))
    if weights:
        setattr(callback, _NAME, Weights(weights, states) if states else weights)
