"""Reads the weights of Keras layers as matrices, rounded as they were trained."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np

from tfgptopt.decoder.spec import Matrix, Norm
from tfgptopt.pruning import masks
from tfgptopt.quantization import layers, rounding
from tfgptopt.targets import Target, target_of


def _current_values(target: Target) -> np.ndarray:
    """Returns the weights with the mask applied that training holds, if any."""
    values = keras.ops.convert_to_numpy(target.variable.value).astype(np.float32)
    if masks.masked(target.variable):
        mask = keras.ops.convert_to_numpy(target.variable.constraint.mask.value)
        values = values * mask.astype(np.float32)
    return values


def _as_rows(array: np.ndarray, target: Target) -> np.ndarray:
    """Returns a kernel as `(outputs, inputs)`."""
    order = target.output_axes + target.input_axes
    outputs = int(np.prod([array.shape[axis] for axis in target.output_axes]))
    return np.ascontiguousarray(array.transpose(order).reshape(outputs, -1))


def read_matrix(layer: keras.Layer) -> Matrix:
    """Reads the kernel or table of a layer, with the integers it was trained to.

    Args:
        layer: A built Dense, EinsumDense, Embedding or ReversibleEmbedding, dressed or plain.

    Returns:
        `Matrix` with the integers that the one rounding function gives.
    """
    target = target_of(layer)
    values = _current_values(target)
    bias = getattr(layer, "bias", None)
    bias = None if bias is None else keras.ops.convert_to_numpy(bias).astype(np.float32).reshape(-1)
    bits = layers.bits_of(layer)
    if bits is None:
        return Matrix(target.path, _as_rows(values, target), bias=bias)
    integers, scale = (x.numpy() for x in rounding.quantize(values, target.input_axes, bits))
    if not layers.is_dressed(layer) and not np.array_equal(integers * scale, values):
        warnings.warn(
            f"{target.path} changed since `finalize`: it is rounded to {bits} bits again, which "
            "it was not trained for.",
            stacklevel=2,
        )
    return Matrix(
        name=target.path,
        values=_as_rows(integers * scale, target),
        bits=bits,
        integers=_as_rows(integers, target).astype(np.int8),
        scale=_as_rows(scale, target).reshape(-1),
        bias=bias,
    )


def read_norm(layer: Any) -> Norm:
    """Reads a LayerNormalization over the last axis."""
    width = layer.gamma.shape[0]
    beta = np.zeros(width) if layer.beta is None else keras.ops.convert_to_numpy(layer.beta)
    return Norm(
        name=layer.path,
        gamma=keras.ops.convert_to_numpy(layer.gamma).astype(np.float32),
        beta=beta.astype(np.float32),
        epsilon=float(layer.epsilon),
    )
