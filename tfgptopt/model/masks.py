"""Masks that the compiled train step holds by itself, as constraints of the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model.dressing import put_on, register_mixin, take_off
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.techniques import technique_classes
from tfgptopt.model.types import Config

# Attributes of a pruned layer: its mask, and what moved it before it was saved.
_HELD = "_tfgptopt_mask"
_PRUNING = "pruning"
# Set while a copy has no weights yet.
_FRESH = "_tfgptopt_fresh"


class PrunedMixin:
    """Lets the mask of a layer travel with its configuration, as into copies and `.keras` files.

    The zeros of the weights that are loaded into a copy are its mask.
    """

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)  # type: ignore[misc]
        technique = getattr(self, _PRUNING, None)
        if technique is not None:
            object.__delattr__(self, _PRUNING)
            Mask(None, target_of(self), technique)  # type: ignore[arg-type]
            object.__setattr__(self, _FRESH, True)

    def call(self, inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
        read_if_fresh(self)  # type: ignore[arg-type]
        return super().call(inputs, *args, **kwargs)  # type: ignore[misc]

    def get_config(self) -> Config:
        config: Config = super().get_config()  # type: ignore[misc]
        mask = mask_on(self)  # type: ignore[arg-type]
        if mask is not None:
            with contextlib.suppress(ValueError):  # A pattern that has no name.
                config[_PRUNING] = dataclasses.replace(mask.technique, targets=None).to_config()
        return config

    @classmethod
    def from_config(cls, config: Config) -> keras.Layer:
        config = dict(config)
        found = dict(config.pop(_PRUNING, {}))
        layer: keras.Layer = super().from_config(config)  # type: ignore[misc]
        try:
            technique = technique_classes()[found.pop("name")].from_config(found)
        except (KeyError, ValueError):
            warnings.warn(
                f"{layer.name} was pruned by settings that cannot be read: its zeros are not held.",
                stacklevel=2,
            )
            return layer
        object.__setattr__(layer, _PRUNING, technique)
        return layer


register_mixin(PrunedMixin, "Pruned", place=0)


class Mask(keras.constraints.Constraint):
    """Zeroes the pruned weights of a kernel after each update of the optimizer.

    Keras applies the constraint of a variable inside the compiled step, on every replica. The
    mask is a variable of one byte per weight, so a new mask needs no new trace. It is no weight
    of the model: checkpoints stay those of the plain model, and hold the mask as exact zeros.

    Args:
        model: The model whose optimizer may average the kernel (`use_ema`), or `None`.
        target: The kernel. The mask is put on it.
        technique: What moves the mask, for recipes and reports.
    """

    def __init__(self, model: keras.Model | None, target: Target, technique: Any) -> None:
        variable = target.variable
        # A constraint that the kernel already had is applied first.
        self.inner: Callable[[Any], Any] | None = variable.constraint
        self.technique = technique
        self.owner: Any = None
        self.belongs_to(model)
        self.mask = keras.Variable(
            tf.ones(variable.shape, tf.bool),
            trainable=False,
            dtype="bool",
            name=f"{variable.name}_mask",
        )
        self._layer = target.layer
        self._variable = variable
        variable.constraint = self
        # Keras refuses it too where a kernel has had a constraint from the beginning.
        object.__setattr__(self._layer, "enable_lora", _refuse_lora(target))
        object.__setattr__(self._layer, _HELD, self)
        put_on(self._layer, PrunedMixin)

    def belongs_to(self, model: keras.Model | None) -> None:
        """Says whose optimizer may average the kernel."""
        self._model: Callable[[], Any] = (lambda: None) if model is None else weakref.ref(model)

    def take_off(self, variable: keras.Variable) -> None:
        """Gives the kernel back its own constraint, and leaves its weights as they are."""
        variable.constraint = self.inner
        take_off(self._layer, PrunedMixin)
        object.__delattr__(self._layer, "enable_lora")
        object.__delattr__(self._layer, _HELD)

    def snapshot(self) -> np.ndarray:
        """Returns the mask, to be restored together with the weights."""
        return np.asarray(keras.ops.convert_to_numpy(self.mask.value))

    def restore(self, snapshot: np.ndarray | None) -> str | None:
        """Puts a mask back beside weights that were restored.

        Args:
            snapshot: What `snapshot` returned with these weights, or `None` if nobody knows: the
                mask that is there is applied to them.

        Returns:
            What the user should know, or `None`.
        """
        if snapshot is not None:
            self.mask.assign(snapshot)
        self._variable.assign(self.zeroed(self._variable))
        if self.owner is not None:
            self.owner.resume(self.owner.seen)
        unfinished = getattr(self.technique, "unfinished", lambda share: None)
        return unfinished(1.0 - float(np.mean(self.snapshot())))

    def __call__(self, w: tf.Tensor) -> Any:
        self.hold_average(w)
        if self.inner is not None:
            w = self.inner(w)
        return self.zeroed(w)

    def zeroed(self, w: tf.Tensor) -> Any:
        """Returns weights without what the mask drops."""
        # A choice, not a product: zero times a diverged weight would not be zero.
        return keras.ops.where(self.mask, w, keras.ops.zeros((), w.dtype))

    def hold_average(self, variable: keras.Variable) -> None:
        """Zeroes what the mask drops in the optimizer's average of the kernel, if it keeps one.

        Keras averages weights before it applies constraints, and puts averages in the place of
        weights after the last constraint of a `fit`, or when `SwapEMAWeights` evaluates.
        """
        average = _average_of(variable, getattr(self._model(), "optimizer", None))
        if average is not None:
            average.assign(self.zeroed(average))


def _average_of(variable: keras.Variable, optimizer: keras.optimizers.Optimizer | None) -> Any:
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


def attach(model: keras.Model, chosen: list[Target], technique: Any) -> None:
    """Gives every target of a model a mask of ones."""
    for target in chosen:
        Mask(model, target, technique)


def _refuse_lora(target: Target) -> Callable[..., None]:
    def enable_lora(*args: object, **kwargs: object) -> None:
        raise ValueError(
            f"{target.path} is being pruned. Call `tfgptopt.finalize(model)` before `enable_lora`: "
            "its zeros stay while adapters train, and are filled in when adapters are merged."
        )

    return enable_lora


def read_from_zeros(chosen: list[Target]) -> None:
    """Sets every mask to hold the zeros that its weight has now."""
    for target in chosen:
        target.variable.constraint.mask.assign(keras.ops.not_equal(target.variable.value, 0))


def read_if_fresh(layer: keras.Layer) -> None:
    """Sets the mask of a copy to hold the zeros of its weights, once it was given some."""
    if not getattr(layer, _FRESH, False):
        return
    with tf.init_scope():
        variable = target_of(layer).variable
        kept = tf.not_equal(tf.convert_to_tensor(variable.value), 0)
        if not bool(tf.reduce_all(kept)):  # Else it is still as it was made.
            # Keras may be tracing, where it would put an assignment off.
            variable.constraint.mask._value.assign(kept)
            object.__delattr__(layer, _FRESH)


def mask_on(layer: keras.Layer) -> Mask | None:
    """Returns the mask of a layer's weight, or `None`."""
    found: Mask | None = getattr(layer, _HELD, None)
    return found


def apply(chosen: list[Target]) -> None:
    """Zeroes what the masks of targets drop."""
    for target in chosen:
        held = target.variable.constraint
        target.variable.assign(held.zeroed(target.variable))
        held.hold_average(target.variable)


def remove(chosen: list[Target]) -> None:
    """Takes the masks off targets and leaves their weights as they are."""
    for target in chosen:
        if masked(target.variable):
            target.variable.constraint.take_off(target.variable)


def masked(variable: keras.Variable) -> bool:
    """Returns whether a mask holds a variable."""
    return isinstance(variable.constraint, Mask)


def masked_share(target: Target) -> float:
    """Returns the share of a target's weights that its mask drops."""
    mask = target.variable.constraint.mask.value
    return 1.0 - float(tf.math.count_nonzero(mask, dtype=tf.int64)) / target.size


def detach(variable: keras.Variable) -> None:
    """Zeroes the pruned weights a last time and gives a variable back its own constraint."""
    held = variable.constraint
    variable.assign(held.zeroed(variable))
    held.take_off(variable)
    if held.owner is not None:
        held.owner.close()
