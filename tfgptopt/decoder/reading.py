"""Reads what Keras layers hold: weights as they were trained, norms, activations, rotations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from tfgptopt.decoder.rotary import Rotary
from tfgptopt.decoder.spec import Activation, Matrix, Norm
from tfgptopt.model.current import current
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.turning import Turn, factors_of, turns_of
from tfgptopt.quantization import layers
from tfgptopt.quantization.integers import Integers, read_integers
from tfgptopt.quantization.quantizers import row_blocks_of


def as_floats(variable: keras.Variable) -> np.ndarray:
    """Returns a variable as a float32 array."""
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float32)


def _as_rows(array: np.ndarray, target: Target) -> np.ndarray:
    """Returns a kernel as `(outputs, inputs)`."""
    order = target.output_axes + target.input_axes
    outputs = int(np.prod([array.shape[axis] for axis in target.output_axes]))
    return np.ascontiguousarray(array.transpose(order).reshape(outputs, -1))


def _scales_of_rows(stored: Integers) -> np.ndarray:
    """Returns scales as `(outputs,)`, or as `(outputs, blocks)`."""
    if stored.grid.block_size is None:
        return stored.scale.reshape(-1)
    return np.ascontiguousarray(stored.scale[:, 0, :].T)


def read_matrix(layer: keras.Layer, activated: bool = False) -> Matrix:
    """Reads the kernel or table of a layer, with the integers it was trained to.

    Args:
        layer: A built Dense, EinsumDense, Embedding or ReversibleEmbedding, dressed or plain.
        activated: Whether the caller reads the activation of the layer, too.

    Returns:
        `Matrix` with the integers that the one rounding function gives.

    Raises:
        ValueError: If the layer has an activation that nobody reads.
    """
    target = target_of(layer)
    activation = getattr(layer, "activation", None)
    if not activated and activation not in (None, keras.activations.linear):
        raise ValueError(f"{target.path}: expected a layer without activation, has {activation}.")
    values = current(target.layer, target.variable).numpy()
    bias = getattr(layer, "bias", None)
    bias = None if bias is None else as_floats(bias).reshape(-1)
    if layers.spec_of(layer) is None:
        return Matrix(target.path, _as_rows(values, target), bias=bias)
    stored = read_integers(layer)[0]
    return Matrix(
        name=target.path,
        values=_as_rows(stored.integers, target),
        bits=stored.grid.bits,
        scale=_scales_of_rows(stored),
        bias=bias,
        block_size=stored.grid.block_size,
        rounds_inputs=layer.quantization_spec.activations is not None,
        activation_blocks=row_blocks_of(layers.rounded_target(layer), layer.quantization_spec),
    )


def read_head(embedding: keras.Layer) -> Matrix | None:
    """Reads the head of a ReversibleEmbedding: `None` if it is the token table."""
    if embedding.tie_weights:
        return None
    variable = embedding.reverse_embeddings
    spec = layers.spec_of(embedding)
    if spec is None:
        return Matrix(variable.path, np.ascontiguousarray(as_floats(variable).T))
    stored = read_integers(embedding)[1]
    return Matrix(
        name=variable.path,
        values=np.ascontiguousarray(stored.integers.T),
        bits=stored.grid.bits,
        scale=_scales_of_rows(stored),
        block_size=stored.grid.block_size,
        rounds_inputs=spec.activations is not None,
    )


def read_norm(layer: keras.Layer, gamma_offset: float = 0.0) -> Norm:
    """Reads a layer normalization, or a root-mean-square one (with `scale` in place of `gamma`, or
    without any).

    Args:
        layer: A built normalization over the last axis.
        gamma_offset: What the layer adds to its `scale`: 1 in Gemma.

    Raises:
        ValueError: If it has weights of other names.
    """
    if hasattr(layer, "gamma"):
        gamma = as_floats(layer.gamma)
        beta = None if layer.beta is None else as_floats(layer.beta)
        return Norm(layer.path, "layer", gamma, float(layer.epsilon), beta)
    epsilon = layer.epsilon if hasattr(layer, "epsilon") else layer.eps
    scale = getattr(layer, "scale", None)
    if not isinstance(scale, keras.Variable):
        if layer.weights:
            raise ValueError(f"{layer.path} has weights, and none is its `gamma` or `scale`.")
        return Norm(layer.path, "rms", None, float(epsilon))
    return Norm(layer.path, "rms", np.float32(gamma_offset) + as_floats(scale), float(epsilon))


def read_turned_norm(layer: keras.Layer, gamma_offset: float = 0.0) -> tuple[Norm, Matrix | None]:
    """Reads a normalization that may turn what it reads and gives.

    Normalizing and turning can change places, factors and turning cannot: they are one product.

    Args:
        layer: A built normalization.
        gamma_offset: What the layer adds to its `scale`.

    Returns:
        `(norm, turn)`; the product behind the norm is `None` for a plain layer.
    """
    norm, turns = read_norm(layer, gamma_offset), turns_of(layer)
    if turns.after is None:
        return norm, None
    after = turns.after.matrix.astype(np.float64)
    rows = after if norm.gamma is None else norm.gamma[:, np.newaxis] * after
    if turns.before is not None:
        rows = turns.before.matrix @ rows
    bias = None if norm.beta is None else (norm.beta @ after).astype(np.float32)
    values = np.ascontiguousarray(rows.T, np.float32)
    return replace(norm, gamma=None, beta=None), Matrix(f"{layer.path}/turn", values, bias=bias)


def read_table_turn(table: keras.Layer) -> Matrix | None:
    """Reads what a table multiplies looked-up rows with, or `None` for a plain one."""
    turns = turns_of(table)
    if turns.after is None:
        return None
    rows = turns.after.matrix * factors_of(turns.exponents, turns.after.size)
    return Matrix(f"{table.path}/turn", np.ascontiguousarray(rows.T))


@functools.lru_cache(maxsize=8)
def turn_matrix(turn: Turn) -> Matrix:
    """Returns a turn as a product: one object for all layers that turn alike."""
    return Matrix(f"turn/{turn.size}/{turn.seed}", np.ascontiguousarray(turn.matrix.T))


def _erf_gelu(x: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.activations.gelu(x, approximate=False))


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.activations.gelu(x, approximate=True))


_ACTIVATIONS: dict[Activation, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": _erf_gelu,
    "gelu_tanh": _tanh_gelu,
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
}


def read_activation(function: Callable[[Any], Any]) -> Activation:
    """Returns the name of an activation, found by what it computes.

    Raises:
        ValueError: If it computes none that is known.
    """
    x = np.linspace(-6.0, 6.0, 97, dtype=np.float32)
    y = keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(x)))
    for name, known in _ACTIVATIONS.items():
        if np.allclose(y, known(x), atol=1e-6):
            return name
    raise ValueError(f"The activation {function} is none of {', '.join(_ACTIVATIONS)}.")


def read_rotary(layer: keras.Layer, size: int) -> Rotary:
    """Reads a `keras_hub.layers.RotaryEmbedding` of any scaling.

    Args:
        layer: The layer.
        size: How many features of a head it turns.
    """
    frequencies = as_floats(layer._get_inverse_freq(size))
    cosines, _ = layer._compute_cos_sin_embedding(keras.ops.zeros((1, 1, 1, size)))
    return Rotary(frequencies, float(as_floats(cosines).reshape(-1)[0]))


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns the slopes of ALiBi, float32, one for each head.

    Reference: Press et al., 2022, "Train Short, Test Long: Attention with Linear Biases Enables
    Input Length Extrapolation" (https://arxiv.org/abs/2108.12409).
    """
    power = 2 ** int(np.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, between[: num_heads - power]]).astype(np.float32)
