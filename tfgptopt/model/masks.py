"""Masks that the compiled train step holds by itself, as constraints of the kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.model.targets import Target


class Mask(keras.constraints.Constraint):
    """Zeroes the pruned weights of a kernel after each update of the optimizer.

    Keras applies the constraint of a variable inside the compiled step, on every replica. The
    mask is a variable of one byte per weight, so a new mask needs no new trace. It is no weight
    of the model: checkpoints stay those of the plain model, and hold the mask as exact zeros.

    Args:
        model: The model whose optimizer may average the kernel (`use_ema`).
        target: The kernel. The mask is put on it.
        technique: What moves the mask, for recipes and reports.
    """

    def __init__(self, model: Any, target: Target, technique: Any) -> None:
        variable = target.variable
        # A constraint that the kernel already had is applied first.
        self.inner: Callable[[Any], Any] | None = variable.constraint
        self.technique = technique
        self.owner: Any = None
        self._model = weakref.ref(model)
        self.mask = keras.Variable(
            tf.ones(variable.shape, tf.bool),
            trainable=False,
            dtype="bool",
            name=f"{variable.name}_mask",
        )
        self._layer = target.layer
        variable.constraint = self
        # Keras refuses it too where a kernel has had a constraint from the beginning.
        object.__setattr__(self._layer, "enable_lora", _refuse_lora(target))

    def take_off(self, variable: Any) -> None:
        """Gives the kernel back its own constraint, and leaves its weights as they are."""
        variable.constraint = self.inner
        object.__delattr__(self._layer, "enable_lora")

    def __call__(self, w: Any) -> Any:
        self.hold_average(w)
        if self.inner is not None:
            w = self.inner(w)
        return self.zeroed(w)

    def zeroed(self, w: Any) -> Any:
        """Returns weights without what the mask drops."""
        # A choice, not a product: zero times a diverged weight would not be zero.
        return keras.ops.where(self.mask, w, keras.ops.zeros((), w.dtype))

    def hold_average(self, variable: Any) -> None:
        """Zeroes what the mask drops in the optimizer's average of the kernel, if it keeps one.

        Keras averages weights before it applies constraints, and puts averages in the place of
        weights after the last constraint of a `fit`, or when `SwapEMAWeights` evaluates.
        """
        average = _average_of(variable, getattr(self._model(), "optimizer", None))
        if average is not None:
            average.assign(self.zeroed(average))


def _average_of(variable: Any, optimizer: Any) -> Any:
    """Returns the average (`use_ema`) that an optimizer keeps of a variable, or `None`."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    for each in getattr(optimizer, "optimizers", [optimizer]):
        if not (getattr(each, "use_ema", False) and each.built):
            continue
        pairs = zip(each._trainable_variables, each._model_variables_moving_average, strict=True)
        for averaged, average in pairs:
            if averaged is variable:
                return average
    return None


def attach(model: Any, targets: list[Target], technique: Any) -> None:
    """Gives every target of a model a mask of ones."""
    for target in targets:
        Mask(model, target, technique)


def _refuse_lora(target: Target) -> Callable[..., None]:
    def enable_lora(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{target.path} is being pruned. Call `tfgptopt.finalize(model)` before `enable_lora`: "
            "its zeros stay while adapters train, and are filled in when adapters are merged."
        )

    return enable_lora


def read_from_zeros(targets: list[Target]) -> None:
    """Sets every mask to hold the zeros that its weight has now."""
    for target in targets:
        target.variable.constraint.mask.assign(keras.ops.not_equal(target.variable.value, 0))


def apply(targets: list[Target]) -> None:
    """Zeroes what the masks of targets drop."""
    for target in targets:
        held = target.variable.constraint
        target.variable.assign(held.zeroed(target.variable))
        held.hold_average(target.variable)


def remove(targets: list[Target]) -> None:
    """Takes the masks off targets and leaves their weights as they are."""
    for target in targets:
        if masked(target.variable):
            target.variable.constraint.take_off(target.variable)


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
    held.take_off(variable)
    if held.owner is not None:
        held.owner.close()
