"""Lets a model of another precision compute in float32 for a while, as converters want it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf


def is_half(variable: keras.Variable) -> bool:
    """Returns whether a variable is stored in 16 bits, which hold no grid of integers exactly."""
    return keras.backend.standardize_dtype(variable._dtype) in ("bfloat16", "float16")


@contextlib.contextmanager
def in_float32(model: keras.Layer) -> Iterator[None]:
    """Makes a model store and compute floats in float32, and puts it back at the end.

    Args:
        model: A built model, of any dtype policy.
    """
    layers = list(model._flatten_layers())
    policies = [layer._dtype_policy for layer in layers]
    halves = [variable for variable in model.variables if is_half(variable)]
    stored = [(variable._value, variable._dtype) for variable in halves]
    plain = keras.DTypePolicy("float32")
    try:
        for layer in layers:
            if layer._dtype_policy.quantization_mode is None:
                layer._dtype_policy = plain
        for variable, (value, _) in zip(halves, stored, strict=True):
            floats = tf.cast(tf.convert_to_tensor(value), tf.float32)
            variable._value = tf.Variable(floats, trainable=False, name=variable.name)
            variable._dtype = "float32"
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            layer._dtype_policy = policy
        for variable, (value, dtype) in zip(halves, stored, strict=True):
            variable._value, variable._dtype = value, dtype
