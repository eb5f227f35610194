"""Trains the scales of weights along with the weights."""

from __future__ import annotations

import keras
import tensorflow as tf

from tfgptopt.quantization.quantizers import Quantizer
from tfgptopt.quantization.rounding import inside, scale_gradient

# A scale moves by at most this share of itself in one step.
_LARGEST_CHANGE = 0.05
_ATTRIBUTE = "_tfgptopt_scale_updates"


class ScaleUpdates:
    """Updates learned scales in an optimizer's compiled step.

    The gradient of a scale is a sum over the gradients of its weights, which the optimizer sees
    anyway: no variable is added to the model or the optimizer. A scale takes the step that the
    optimizer takes on its weights, whatever its rule: with plain SGD that is LSQ with its learning
    rate, with Adam the step is as large as the one of the weights, by their norms.

    Args:
        optimizer: The optimizer of a compiled model.
        found: Rounders with kept scales.

    Reference: Esser et al., 2020, "Learned Step Size Quantization"
    (https://arxiv.org/abs/1902.08153).
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, found: list[Quantizer]) -> None:
        # Inside mixed float16 training, the inner optimizer gets the true gradients.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._optimizer, update = optimizer, optimizer.update_step
        self._active = True
        earlier = getattr(optimizer, _ATTRIBUTE, None)
        if earlier is not None:  # Left by a `fit` that was interrupted.
            earlier.close()
            update = optimizer.update_step
        key = optimizer._var_key
        by_key = {key(quantizer.variable): quantizer for quantizer in found}

        def update_step(
            gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
        ) -> None:
            quantizer = by_key.get(key(variable))
            if quantizer is None or not self._active:
                update(gradient, variable, learning_rate)
                return
            gradient = tf.cast(tf.convert_to_tensor(gradient), tf.float32)
            weights = tf.identity(tf.cast(tf.convert_to_tensor(variable), tf.float32))
            scale = quantizer.compute_scale(weights)
            kept = tf.where(inside(weights, scale, quantizer.grid), gradient, 0.0)
            update(tf.cast(kept, variable.dtype), variable, learning_rate)
            moved = tf.cast(tf.convert_to_tensor(variable), tf.float32) - weights
            optimizer.assign(quantizer.kept, _next_scale(quantizer, weights, gradient, moved))

        self._update_step = update_step
        object.__setattr__(optimizer, "update_step", update_step)
        object.__setattr__(optimizer, _ATTRIBUTE, self)

    def close(self) -> None:
        """Leaves the scales as they are, in steps that are traced from now on."""
        self._active = False
        if self._optimizer.__dict__.get("update_step") is self._update_step:
            object.__delattr__(self._optimizer, "update_step")


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
