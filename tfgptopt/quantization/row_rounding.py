"""How the inputs of products are rounded: row by row, as LiteRT's kernels round them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# LiteRT keeps activations in signed 8 bit.
_ACTIVATION_MIN, _ACTIVATION_MAX = -128.0, 127.0


def fake_quantize_rows(inputs: tf.Tensor, axes: Sequence[int], blocks: int = 1) -> tf.Tensor:
    """Rounds activations as LiteRT's dynamic-range kernels do, gradients straight through.

    Each row (the entries that one product sums over) gets its own asymmetric int8 scale and zero
    point from its own range, which always holds 0.

    Args:
        inputs: float tensor.
        axes: The axes that a row spans: those that the product contracts.
        blocks: int. How many parts of a row, one after the other, have a range of their own.
            Defaults to `1`.

    Returns:
        Tensor of the shape and dtype of `inputs`.

    Reference: XNNPACK, `xnn_f32_qd8_asymmetric_quantization_params`.
    """

    @tf.custom_gradient
    def straight_through(x: tf.Tensor):  # type: ignore[no-untyped-def]
        values = tf.cast(x, tf.float32)
        rounded = _rounded_rows(values, axes) if blocks == 1 else _by_part(values, axes, blocks)
        return tf.cast(rounded, x.dtype), lambda upstream: upstream

    return straight_through(inputs)


def _rounded_rows(values: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    low = tf.minimum(tf.reduce_min(values, axis=list(axes), keepdims=True), 0.0)
    high = tf.maximum(tf.reduce_max(values, axis=list(axes), keepdims=True), 0.0)
    span = high - low
    inverse = tf.where(span == 0.0, tf.ones_like(span), 255.0 / span)
    from_low, from_high = _ACTIVATION_MIN - low * inverse, _ACTIVATION_MAX - high * inverse
    low_error = _ACTIVATION_MIN + low * inverse
    high_error = _ACTIVATION_MAX + high * inverse
    zero_point = tf.where(low_error + high_error > 0.0, from_low, from_high)
    zero_point = tf.round(tf.clip_by_value(zero_point, _ACTIVATION_MIN, _ACTIVATION_MAX))
    integers = tf.clip_by_value(
        tf.round(values * inverse), _ACTIVATION_MIN - zero_point, _ACTIVATION_MAX - zero_point
    )
    return integers * (1.0 / inverse)


def _by_part(values: tf.Tensor, axes: Sequence[int], blocks: int) -> tf.Tensor:
    """Rounds each of some equal parts of rows, in the order of the inputs of the product."""
    rank = len(values.shape)
    inner = [axis % rank for axis in axes]
    order = [*(axis for axis in range(rank) if axis not in inner), *inner]
    in_order = order == list(range(rank))
    moved = values if in_order else tf.transpose(values, order)
    shape = tf.shape(moved)
    parts = tf.reshape(moved, tf.concat([shape[: rank - len(inner)], [blocks, -1]], 0))
    rounded = tf.reshape(_rounded_rows(parts, (-1,)), shape)
    rounded = rounded if in_order else tf.transpose(rounded, np.argsort(order))
    return tf.ensure_shape(rounded, values.shape)
