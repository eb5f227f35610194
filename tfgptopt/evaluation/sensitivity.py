"""How much the loss of a model rises when one weight after the other is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import track


@dataclass(frozen=True, eq=False)
class Change:
    """Other values for one weight.

    Attributes:
        target: The weight.
        values: Returns what it is to have for a while, an array of the shape of the variable, or
            `None` to leave it: the loss does not rise then.
    """

    target: Target
    values: Callable[[], Any]


def rise_of_loss(
    model: keras.Model, data: Data, changes: Sequence[Change], description: str = "Measuring"
) -> tuple[float, list[float]]:
    """Measures how much the loss rises with each change alone, one after the other.

    Args:
        model: A built and compiled Keras 3 model. Its weights are the same afterwards.
        data: What `model.evaluate` takes, with labels; a few batches are enough.
        changes: What to try.
        description: str. What the progress bar says. Defaults to `"Measuring"`.

    Returns:
        `(loss, rises)`: the loss of the model as it is, and its rise with each change.

    Raises:
        ValueError: If the model is not compiled.
    """
    if not getattr(model, "compiled", False):
        raise ValueError("The model has no loss: compile it first.")

    def loss() -> float:
        return float(model.evaluate(data, verbose=0, return_dict=True)["loss"])

    exact = loss()
    rises = []
    with strategy_scope(model):
        for change in track(changes, description):
            values = change.values()
            rises.append(0.0 if values is None else _with(change.target, values, loss) - exact)
    return exact, rises


def _with(target: Target, values: Any, loss: Callable[[], float]) -> float:
    before: np.ndarray = keras.ops.convert_to_numpy(target.variable.value)
    try:
        target.variable.assign(values)
        return loss()
    finally:
        target.variable.assign(before)
