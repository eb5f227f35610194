"""The one rounding function.

Training, finalizing and every exporter call `quantize`, so the integers in a file are the integers
that training saw, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

# LiteRT keeps activations in signed 8 bit.
_ACTIVATION_MIN, _ACTIVATION_MAX = -128.0, 127.0


def largest_integer(bits: int) -> int:
    """Returns the largest integer of the symmetric grid: 127 for 8 bits, 7 for 4."""
    return 2 ** (bits - 1) - 1


def _keep_16_bits(x: tf.Tensor) -> tf.Tensor:
    """Rounds positive float32 values to 16 significant bits, half away from zero."""
    pattern = tf.bitcast(x, tf.int32)
    return tf.bitcast(tf.bitwise.bitwise_and(pattern + 0x80, ~0xFF), tf.float32)


def absmax_scale(weights: tf.Tensor, axes: Sequence[int], bits: int) -> tf.Tensor:
    """Returns the scale that maps the largest magnitude along `axes` to the largest integer.

    A scale keeps 16 significant bits, so that integer times scale is exact in float32. Rounding a
    rounded tensor therefore changes nothing. A channel of zeros gets scale 1.

    Args:
        weights: float32 tensor.
        axes: The axes that share a scale: the input axes of a kernel.
        bits: 4 or 8.

    Returns:
        float32 tensor with the rank of `weights` and size 1 along `axes`.
    """
    largest = tf.reduce_max(tf.abs(weights), axis=list(axes), keepdims=True)
    scale = _keep_16_bits(largest / float(largest_integer(bits)))
    # A subnormal scale would not survive kernels that flush subnormals to zero.
    return tf.where(scale < 2.0**-100, tf.ones_like(scale), scale)


def quantize(weights: tf.Tensor, axes: Sequence[int], bits: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds weights to the symmetric grid.

    Args:
        weights: float tensor.
        axes: The axes that share a scale: the input axes of a kernel.
        bits: 4 or 8.

    Returns:
        `(integers, scale)`: whole numbers in float32 with the shape of `weights`, and the float32
        scale, of size 1 along `axes`.
    """
    weights = tf.cast(weights, tf.float32)
    scale = absmax_scale(weights, axes, bits)
    limit = float(largest_integer(bits))
    return tf.clip_by_value(tf.round(weights / scale), -limit, limit), scale


def fake_quantize(weights: tf.Tensor, axes: Sequence[int], bits: int) -> tf.Tensor:
    """Rounds weights to the grid, and passes gradients straight through.

    Args:
        weights: float tensor.
        axes: The axes that share a scale.
        bits: 4 or 8.

    Returns:
        Tensor of the shape and dtype of `weights`, every value an integer times its scale.

    Reference: Bengio et al., 2013, "Estimating or Propagating Gradients Through Stochastic
    Neurons" (straight-through estimator); Jacob et al., 2018 (training with rounded weights).
    """

    @tf.custom_gradient
    def straight_through(x: tf.Tensor):  # type: ignore[no-untyped-def]
        integers, scale = quantize(x, axes, bits)
        return tf.cast(integers * scale, x.dtype), lambda upstream: upstream

    return straight_through(weights)


def fake_quantize_rows(inputs: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Rounds activations as LiteRT's dynamic-range kernels do, gradients straight through.

    Each row (the entries that one product sums over) gets its own asymmetric int8 scale and zero
    point from its own range, which always holds 0.

    Args:
        inputs: float tensor.
        axes: The axes that a row spans: those that the product contracts.

    Returns:
        Tensor of the shape and dtype of `inputs`.

    Reference: XNNPACK, `xnn_f32_qd8_asymmetric_quantization_params`.
    """

    @tf.custom_gradient
    def straight_through(x: tf.Tensor):  # type: ignore[no-untyped-def]
        values = tf.cast(x, tf.float32)
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
        return tf.cast(integers * (1.0 / inverse), x.dtype), lambda upstream: upstream

    return straight_through(inputs)
