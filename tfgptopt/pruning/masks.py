"""Masks that the compiled train step holds by itself, as constraints of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.pruning.patterns import Unstructured
from tfgptopt.targets import Target


class Mask(keras.constraints.Constraint):
    """Multiplies a kernel by zeros and ones after each update of the optimizer.

    Keras applies the constraint of a variable inside the compiled step, on every replica. The
    mask is a variable, so a new mask needs no new trace. It is no weight of the model:
    checkpoints stay those of the plain model, and hold the mask as exact zeros.

    Args:
        variable: The kernel.
        schedule: The schedule that moves the mask, for recipes.
    """

    def __init__(self, variable: Any, schedule: Any) -> None:
        # A constraint that the kernel already had is applied first.
        self.inner: Callable[[Any], Any] | None = variable.constraint
        self.schedule = schedule
        self.owner: Any = None
        self.mask = keras.Variable(
            tf.ones(variable.shape, variable.dtype),
            trainable=False,
            dtype=variable.dtype,
            name=f"{variable.name}_mask",
        )

    def __call__(self, w: Any) -> Any:
        if self.inner is not None:
            w = self.inner(w)
        return keras.ops.multiply(w, self.mask)


def attach(targets: list[Target], schedule: Any) -> None:
    """Gives every target a mask of ones."""
    for target in targets:
        target.variable.constraint = Mask(target.variable, schedule)


def read_from_zeros(targets: list[Target]) -> None:
    """Sets every mask to hold the zeros that its weight has now."""
    for target in targets:
        kept = keras.ops.not_equal(target.variable.value, 0)
        target.variable.constraint.mask.assign(keras.ops.cast(kept, target.variable.dtype))


def apply(targets: list[Target]) -> None:
    """Zeroes what the masks of targets drop."""
    for target in targets:
        target.variable.assign(keras.ops.multiply(target.variable, target.variable.constraint.mask))


def remove(targets: list[Target]) -> None:
    """Takes the masks off targets and leaves their weights as they are."""
    for target in targets:
        if masked(target.variable):
            target.variable.constraint = target.variable.constraint.inner


def masked(variable: Any) -> bool:
    """Returns whether a mask holds a variable."""
    return isinstance(variable.constraint, Mask)


def detach(variable: Any) -> None:
    """Zeroes the pruned weights a last time and gives a variable back its own constraint."""
    held = variable.constraint
    variable.assign(keras.ops.multiply(variable, held.mask))
    variable.constraint = held.inner


class MaskUpdater:
    """Computes new masks for targets in one compiled function, traced once.

    Args:
        targets: Targets that have masks.
        pattern: Which weights go together.
    """

    def __init__(self, targets: list[Target], pattern: Unstructured) -> None:
        self.targets = targets
        self.pattern = pattern
        self._update = tf.function(self._update_all)

    def _update_all(self, sparsity: tf.Tensor) -> None:
        for target in self.targets:
            weights = tf.convert_to_tensor(target.variable.value)
            mask = self.pattern.mask(tf.abs(tf.cast(weights, tf.float32)), sparsity)
            mask = tf.cast(mask, weights.dtype)
            target.variable.constraint.mask.assign(mask)
            target.variable.assign(weights * mask)

    def update(self, sparsity: float) -> None:
        """Sets the masks to a sparsity and zeroes what they drop."""
        self._update(tf.constant(sparsity, tf.float32))

    def sparsity(self) -> float:
        """Returns the share of masked weights over all targets."""
        zeros = total = 0.0
        for target in self.targets:
            mask = target.variable.constraint.mask
            zeros += target.size - float(keras.ops.sum(keras.ops.cast(mask, "float32")))
            total += target.size
        return zeros / total
