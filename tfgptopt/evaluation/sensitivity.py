"""What becomes of a model when one weight after the other is changed: its loss, its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import batches_of
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


def divergences(
    model: keras.Layer, data: Data, changes: Sequence[Change], description: str = "Measuring"
) -> list[float]:
    """Measures how far what a model predicts moves with each change alone.

    It tells more of few tokens than their loss does: a change that makes one token likelier and
    another one less likely leaves the loss, and not the divergence. It needs no labels.

    Args:
        model: A built causal LM. Its weights are the same afterwards.
        data: Its inputs, see `tfgptopt.calibration.batches.batches_of`. Logits of all tokens are
            held.
        changes: What to try.
        description: str. What the progress bar says. Defaults to `"Measuring"`.

    Returns:
        For each change the mean over tokens of `KL(p || q)` in nats, where `p` is what the model
        predicts as it is, and `q` what it predicts with the change.

    Raises:
        ValueError: If there is no data.
    """
    batches = batches_of(data)

    @tf.function(reduce_retracing=True, autograph=False)
    def likely(inputs: Any) -> tf.Tensor:
        return tf.nn.log_softmax(tf.cast(model(inputs, training=False), tf.float32))

    @tf.function(reduce_retracing=True, autograph=False)
    def divergence(inputs: Any, expected: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        each = tf.reduce_sum(tf.exp(expected) * (expected - likely(inputs)), -1)
        return tf.reduce_sum(each * weights)

    held = []
    for inputs in batches:
        expected = likely(inputs)
        mask = inputs.get("padding_mask") if isinstance(inputs, dict) else None
        weights = tf.ones(tf.shape(expected)[:-1]) if mask is None else tf.cast(mask, tf.float32)
        held.append((inputs, expected, weights))
    total = sum(float(tf.reduce_sum(weights)) for *_, weights in held)

    def mean() -> float:
        return sum(float(divergence(*one)) for one in held) / max(total, 1.0)

    found = []
    with strategy_scope(model):
        for change in track(changes, description):
            values = change.values()
            found.append(0.0 if values is None else _with(change.target, values, mean))
    return found


def _with(target: Target, values: Any, loss: Callable[[], float]) -> float:
    before: np.ndarray = keras.ops.convert_to_numpy(target.variable.value)
    try:
        target.variable.assign(values)
        return loss()
    finally:
        target.variable.assign(before)
