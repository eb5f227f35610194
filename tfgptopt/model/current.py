"""What a weight is now: in full precision, with its adapters added and its mask applied.

Training rounds this, methods without training read it, and every exporter writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model import masks


def full_precision(variable: keras.Variable) -> tf.Tensor:
    """Returns a variable's value as float32, without the cast of mixed precision."""
    value = variable.value
    if value.dtype != tf.as_dtype(variable._dtype):
        value = variable._value
    return tf.cast(tf.convert_to_tensor(value), tf.float32)


def has_adapters(layer: keras.Layer) -> bool:
    """Returns whether a layer has LoRA adapters."""
    return bool(getattr(layer, "lora_enabled", False))


def _kind(layer: keras.Layer) -> str:
    return "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"


def _weight(layer: keras.Layer) -> keras.Variable:
    """Returns the weight of a layer that adapters lie beside."""
    variable: keras.Variable = getattr(layer, f"_{_kind(layer)}")
    return variable


def _factors(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the LoRA adapters of a layer, whose product is added to its weight."""
    return [getattr(layer, f"lora_{_kind(layer)}_{part}") for part in ("a", "b")]


def _adapters(layer: keras.Layer) -> tf.Tensor:
    """Returns what the LoRA adapters of a layer add to its weight."""
    first, second = map(full_precision, _factors(layer))
    return (layer.lora_alpha / layer.lora_rank) * tf.matmul(first, second)


def current(layer: keras.Layer, variable: keras.Variable) -> tf.Tensor:
    """Returns a weight of a layer as it is now.

    Args:
        layer: The layer that has the weight.
        variable: Its kernel or table, or the own head of a ReversibleEmbedding.

    Returns:
        float32 tensor of the shape of the variable.
    """
    values = full_precision(variable)
    if has_adapters(layer) and variable is _weight(layer):
        values = values + _adapters(layer)
    return variable.constraint.zeroed(values) if masks.masked(variable) else values


@contextmanager
def without_adapters(layer: keras.Layer) -> Iterator[None]:
    """Runs a layer on its own weight alone, which its adapters were added to."""
    enabled = has_adapters(layer)
    if enabled:
        object.__setattr__(layer, "lora_enabled", False)
    try:
        yield
    finally:
        if enabled:
            object.__setattr__(layer, "lora_enabled", True)


def check_mergeable(model: keras.Layer) -> None:
    """Raises if LoRA adapters of a model lie beside weights that they cannot be added to.

    Raises:
        ValueError: If Keras' own `quantize` made integers of one.
    """
    for layer in model._flatten_layers():
        if has_adapters(layer) and getattr(layer, "quantization_mode", None) is not None:
            raise ValueError(
                f"{layer.path} was quantized by Keras, so that its LoRA adapters cannot be merged: "
                "its weight is integers. Load it unquantized, and quantize with tfgptopt."
            )


def merge_adapters(layer: keras.Layer) -> None:
    """Adds the LoRA adapters of a layer to its weight, and takes them off."""
    variable = _weight(layer)
    variable.assign(tf.cast(current(layer, variable), variable._dtype))
    drop_adapters(layer)


def merged_weights(model: keras.Layer) -> list[np.ndarray]:
    """Returns weights in the order of `set_weights` of a copy that has no LoRA adapters."""
    check_mergeable(model)
    merged: dict[int, np.ndarray] = {}
    adapters: set[int] = set()
    for layer in model._flatten_layers():
        if has_adapters(layer):
            variable = _weight(layer)
            merged[id(variable)] = current(layer, variable).numpy()
            adapters |= {id(factor) for factor in _factors(layer)}
    return [
        merged[id(v)] if id(v) in merged else keras.ops.convert_to_numpy(v)
        for v in model.weights
        if id(v) not in adapters
    ]


def drop_adapters(layer: keras.Layer) -> None:
    """Takes merged LoRA adapters off a layer."""
    kind = _kind(layer)
    layer._tracker.unlock()
    for part in ("a", "b"):
        layer._untrack_variable(getattr(layer, f"lora_{kind}_{part}"))
        delattr(layer, f"lora_{kind}_{part}")
    getattr(layer, f"_{kind}").trainable = True
    layer._tracker.lock()
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
