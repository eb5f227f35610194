"""Trains the scales of weights along with the weights."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfgptopt.quantization.quantizers import Quantizer
from tfgptopt.quantization.rounding import inside, scale_gradient

# A scale moves by at most this share of itself in one step.
_LARGEST_CHANGE = 0.05
_ATTRIBUTE = "_tfgptopt_scale_updates"


class ScaleUpdates:
    """Updates learned scales in an optimizer's compiled step, while somebody trains them.

    It stays in the step: whether scales move is a variable, so that a `fit` without the callback
    leaves them as they are, and another one with it traces nothing again.

    The gradient of a scale is a sum over the gradients of its weights, which the optimizer sees
    anyway: no variable is added to the model or the optimizer. A scale takes the step that the
    optimizer takes on its weights, whatever its rule: with plain SGD that is LSQ with its learning
    rate, with Adam the step is as large as the one of the weights, by their norms.

    Args:
        optimizer: The optimizer of a compiled model.

    Reference: Esser et al., 2020, "Learned Step Size Quantization"
    (https://arxiv.org/abs/1902.08153).
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._key, update = optimizer._var_key, optimizer.update_step
        self._entries: dict[Any, tuple[Quantizer, tf.Variable]] = {}

        def update_step(
            gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
        ) -> None:
            entry = self._entries.get(self._key(variable))
            if entry is None:
                update(gradient, variable, learning_rate)
                return
            quantizer, switch = entry
            learning = tf.convert_to_tensor(switch)
            # Behind a product of batches of any size its shape is not known.
            gradient = tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape)
            gradient = tf.cast(gradient, tf.float32)
            weights = tf.identity(tf.cast(tf.convert_to_tensor(variable), tf.float32))
            scale = quantizer.compute_scale(weights)
            clipped = learning & ~inside(weights, scale, quantizer.grid)
            kept = tf.where(clipped, 0.0, gradient)
            update(tf.cast(kept, variable.dtype), variable, learning_rate)
            moved = tf.cast(tf.convert_to_tensor(variable), tf.float32) - weights
            found = _next_scale(quantizer, weights, gradient, moved)
            now = tf.convert_to_tensor(quantizer.kept.value)
            optimizer.assign(quantizer.kept, tf.where(learning, found, now))

        object.__setattr__(optimizer, "update_step", update_step)
        object.__setattr__(optimizer, _ATTRIBUTE, self)

    def add(self, found: list[Quantizer]) -> bool:
        """Takes care of the kept scales of quantizers, which do not move yet.

        Call it in the scope of the model's strategy.

        Returns:
            Whether one is new, so that the step has to be traced again.
        """
        new = [one for one in found if not self._has(one)]
        for quantizer in new:
            switch = tf.Variable(False, trainable=False)
            self._entries[self._key(quantizer.variable)] = quantizer, switch
        return bool(new)

    def _has(self, quantizer: Quantizer) -> bool:
        entry = self._entries.get(self._key(quantizer.variable))
        return entry is not None and entry[0] is quantizer

    def learn(self, found: list[Quantizer], on: bool) -> None:
        """Lets the scales of quantizers move from now on, or leaves them as they are."""
        for quantizer in found:
            if self._has(quantizer):
                self._entries[self._key(quantizer.variable)][1].assign(on)


def scale_updates(model: keras.Model) -> ScaleUpdates:
    """Returns what updates learned scales in the step of a model, made on the first call."""
    # Inside mixed float16 training, the inner optimizer gets the true gradients.
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    found = getattr(optimizer, _ATTRIBUTE, None)
    return found if isinstance(found, ScaleUpdates) else ScaleUpdates(optimizer)


def _next_scale(
    quantizer: Quantizer, weights: tf.Tensor, gradient: tf.Tensor, moved: tf.Tensor
) -> tf.Tensor:
    """Returns the scale after a step in which the weights were moved."""
    grid = quantizer.grid
    kept = tf.convert_to_tensor(quantizer.kept.value)

    def norm(x: tf.Tensor) -> tf.Tensor:
        squares = tf.square(grid.group(x))
        return tf.sqrt(tf.reduce_sum(squares, axis=grid.reduced, keepdims=True))

    step = tf.math.divide_no_nan(norm(moved), norm(gradient))
    weights_per_scale = tf.size(weights, tf.int64) / tf.size(kept, tf.int64)
    factor = tf.math.rsqrt(tf.cast(weights_per_scale, tf.float32) * float(grid.limit))
    slope = scale_gradient(weights, gradient, grid.representable(kept), grid)
    change = tf.clip_by_value(
        -step * factor * slope, -_LARGEST_CHANGE * kept, _LARGEST_CHANGE * kept
    )
    return kept + change
