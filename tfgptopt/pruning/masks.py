"""Masks that the compiled train step holds by itself, as constraints of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.pruning.allocation import Allocation
from tfgptopt.pruning.patterns import Pattern, Unstructured
from tfgptopt.pruning.scores import Magnitude
from tfgptopt.targets import Target


@dataclass(frozen=True)
class Settings:
    """What moves the masks of a group of weights.

    Attributes:
        schedule: A tfmot schedule.
        pattern: Which weights go together.
        score: How important a weight is.
        allocation: How the sparsity is spread over weights, or `None`: evenly.
    """

    schedule: Any
    pattern: Pattern = Unstructured()
    score: Any = Magnitude()
    allocation: Allocation | None = None


class Mask(keras.constraints.Constraint):
    """Zeroes the pruned weights of a kernel after each update of the optimizer.

    Keras applies the constraint of a variable inside the compiled step, on every replica. The
    mask is a variable of one byte per weight, so a new mask needs no new trace. It is no weight
    of the model: checkpoints stay those of the plain model, and hold the mask as exact zeros.

    Args:
        variable: The kernel.
        settings: What moves the mask, for recipes and reports.
    """

    def __init__(self, variable: Any, settings: Settings) -> None:
        # A constraint that the kernel already had is applied first.
        self.inner: Callable[[Any], Any] | None = variable.constraint
        self.settings = settings
        self.owner: Any = None
        self.mask = keras.Variable(
            tf.ones(variable.shape, tf.bool),
            trainable=False,
            dtype="bool",
            name=f"{variable.name}_mask",
        )

    def __call__(self, w: Any) -> Any:
        if self.inner is not None:
            w = self.inner(w)
        return self.zeroed(w)

    def zeroed(self, w: Any) -> Any:
        """Returns weights without what the mask drops."""
        # A choice, not a product: zero times a diverged weight would not be zero.
        return keras.ops.where(self.mask, w, keras.ops.zeros((), w.dtype))


def attach(targets: list[Target], settings: Settings) -> None:
    """Gives every target a mask of ones."""
    for target in targets:
        target.variable.constraint = Mask(target.variable, settings)


def read_from_zeros(targets: list[Target]) -> None:
    """Sets every mask to hold the zeros that its weight has now."""
    for target in targets:
        target.variable.constraint.mask.assign(keras.ops.not_equal(target.variable.value, 0))


def hold_averages(model: Any, targets: list[Target]) -> None:
    """Holds the zeros where the optimizer writes its averages (`use_ema`) over the weights.

    Keras averages weights before it applies constraints, so that averages are not quite zero, and
    writes them at the end of `fit`, after the last constraint.
    """
    optimizer: Any = getattr(model, "optimizer", None)
    if not getattr(optimizer, "use_ema", False):
        return
    finish = optimizer.finalize_variable_values

    def finish_and_hold(variables: Any) -> None:
        finish(variables)
        apply([target for target in targets if masked(target.variable)])

    object.__setattr__(optimizer, "finalize_variable_values", finish_and_hold)


def apply(targets: list[Target]) -> None:
    """Zeroes what the masks of targets drop."""
    for target in targets:
        target.variable.assign(target.variable.constraint.zeroed(target.variable))


def remove(targets: list[Target]) -> None:
    """Takes the masks off targets and leaves their weights as they are."""
    for target in targets:
        if masked(target.variable):
            target.variable.constraint = target.variable.constraint.inner


def masked(variable: Any) -> bool:
    """Returns whether a mask holds a variable."""
    return isinstance(variable.constraint, Mask)


def masked_share(target: Target) -> float:
    """Returns the share of a target's weights that its mask drops."""
    mask = target.variable.constraint.mask.value
    return 1.0 - float(tf.math.count_nonzero(mask, dtype=tf.int64)) / target.size


def detach(variable: Any) -> None:
    """Zeroes the pruned weights a last time and gives a variable back its own constraint."""
    held = variable.constraint
    variable.assign(held.zeroed(variable))
    variable.constraint = held.inner
    if held.owner is not None:
        held.owner.close()
