"""The one rounding function.

Training, post-training methods, finalizing and every exporter call `quantize`, so the integers in
a file are the integers that training saw, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

from tfgptopt.file.number_types import NumberType, number_type

# Shares of the largest magnitude that the search for the smallest squared error tries.
_CLIP_RATIOS = tuple(1.0 - 0.05 * i for i in range(13))


@dataclass(frozen=True)
class PerOutput:
    """One scale for each output: the shape of a scale is that of the weights, with 1 for inputs.

    Attributes:
        axes: The axes that a product sums over: the input axes of a kernel.
    """

    axes: tuple[int, ...]

    @property
    def reduced(self) -> list[int]:
        """The axes of grouped weights that share a scale."""
        return list(self.axes)

    def group(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns weights so that they and their scales broadcast: as they are."""
        return weights

    def ungroup(self, grouped: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Returns what `group` made in its own shape again."""
        return grouped

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the scales of weights of a shape."""
        return tuple(1 if i in self.axes else int(n) for i, n in enumerate(shape))

    def representable(self, scale: tf.Tensor) -> tf.Tensor:
        """Rounds positive scales to 16 significant bits; those of zeros become 1.

        Integer times scale is exact in float32 then, and rounding what is rounded changes nothing.
        """
        kept = _keep_bits(scale, 16)
        # A subnormal scale would not survive kernels that flush subnormals to zero.
        return tf.where(kept < 2.0**-100, tf.ones_like(kept), kept)


@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of inputs of each output: scales are `(blocks, 1, outputs)`.

    Attributes:
        axes: As of `PerOutput`.
        block_size: How many inputs, one after the other, share a scale.
    """

    axes: tuple[int, ...]
    block_size: int

    @property
    def reduced(self) -> list[int]:
        """The axes of grouped weights that share a scale."""
        return [1]

    def _order(self, rank: int) -> list[int]:
        return [*self.axes, *(axis for axis in range(rank) if axis not in self.axes)]

    def _inputs(self, shape: Sequence[int]) -> int:
        return int(np.prod([shape[axis] for axis in self.axes]))

    def group(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns weights as `(blocks, block_size, outputs)`."""
        order = self._order(len(weights.shape))
        moved = weights if order == sorted(order) else tf.transpose(weights, order)
        blocks = self._inputs(weights.shape) // self.block_size
        return tf.reshape(moved, (blocks, self.block_size, -1))

    def ungroup(self, grouped: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Returns what `group` made in its own shape again."""
        order = self._order(len(shape))
        sizes = [-1 if shape[axis] is None else shape[axis] for axis in order]
        moved = tf.reshape(grouped, sizes)
        return moved if order == sorted(order) else tf.transpose(moved, np.argsort(order))

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the scales of weights of a shape."""
        inputs = self._inputs(shape)
        return inputs // self.block_size, 1, int(np.prod(shape)) // inputs

    def representable(self, scale: tf.Tensor) -> tf.Tensor:
        """Rounds positive scales to 8 significant bits, within the range of float16.

        LiteRT stores the scale of a block as float16 and computes with bfloat16. Scales of zeros
        become 1.
        """
        kept = tf.minimum(_keep_bits(scale, 8), 65280.0)
        kept = tf.where(kept < 2.0**-16, tf.round(kept * 2.0**24) * 2.0**-24, kept)
        return tf.where(kept == 0.0, tf.ones_like(kept), kept)


Granularity = PerOutput | PerBlock


@dataclass(frozen=True)
class Grid:
    """What weights are rounded to: a number type, and which of them share a scale.

    Attributes:
        bits: Of the number type; `tfgptopt.file.number_types` has those that there are.
        axes: The axes that a product sums over: the input axes of a kernel.
        block_size: How many inputs, one after the other, share a scale; `None` for all of them.

    Raises:
        ValueError: If there is no number type of so many bits.
    """

    bits: int
    axes: tuple[int, ...]
    block_size: int | None = None
    number: NumberType = field(init=False, repr=False, compare=False)
    granularity: Granularity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        size = self.block_size
        granularity = PerOutput(self.axes) if size is None else PerBlock(self.axes, size)
        object.__setattr__(self, "number", number_type(self.bits))
        object.__setattr__(self, "granularity", granularity)

    @property
    def limit(self) -> int:
        """The largest integer of the symmetric grid: 127 for 8 bits, 7 for 4."""
        return self.number.limit

    @property
    def reduced(self) -> list[int]:
        """The axes of grouped weights that share a scale."""
        return self.granularity.reduced

    def group(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns weights as they are, or as `(blocks, block_size, outputs)`."""
        return self.granularity.group(weights)

    def ungroup(self, grouped: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Returns what `group` made in its own shape again."""
        return self.granularity.ungroup(grouped, shape)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the scales of weights of a shape."""
        return self.granularity.scale_shape(shape)

    def representable(self, scale: tf.Tensor) -> tf.Tensor:
        """Rounds positive scales to those that runtimes hold; those of zeros become 1."""
        return self.granularity.representable(scale)

    def rounded(self, grouped: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
        """Returns grouped weights as whole numbers in float32, clipped to the grid."""
        limit = float(self.limit)
        return tf.clip_by_value(tf.round(grouped / scale), -limit, limit)

    def encode(self, weights: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
        """Returns float32 weights as whole numbers in float32, in the same shape."""
        return self.ungroup(self.rounded(self.group(weights), scale), weights.shape)

    def decode(self, integers: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
        """Returns whole numbers in float32 times their scales, in the same shape."""
        return self.ungroup(self.group(integers) * scale, integers.shape)


def _keep_bits(x: tf.Tensor, bits: int) -> tf.Tensor:
    """Rounds positive float32 values to significant bits, half away from zero."""
    dropped = 24 - bits
    pattern = tf.bitcast(x, tf.int32)
    half, mask = 1 << (dropped - 1), ~((1 << dropped) - 1)
    return tf.bitcast(tf.bitwise.bitwise_and(pattern + half, mask), tf.float32)


def absmax_scale(weights: tf.Tensor, grid: Grid) -> tf.Tensor:
    """Returns the scale that maps the largest magnitude to the largest integer.

    Args:
        weights: float32 tensor.
        grid: The grid.

    Returns:
        float32 tensor of `grid.scale_shape(weights.shape)`. A channel of zeros has scale 1.
    """
    grouped = grid.group(weights)
    # Two passes that write nothing, where magnitudes would be a tensor of their own.
    highest = tf.reduce_max(grouped, axis=grid.reduced, keepdims=True)
    lowest = tf.reduce_min(grouped, axis=grid.reduced, keepdims=True)
    return grid.representable(tf.maximum(highest, -lowest) / float(grid.limit))


def mse_scale(weights: tf.Tensor, grid: Grid, importance: tf.Tensor | None = None) -> tf.Tensor:
    """Returns the scale with the smallest squared error, which clips the largest weights.

    Args:
        weights: float32 tensor.
        grid: The grid.
        importance: float32 tensor that broadcasts to `weights`, a factor on each squared error.
            Defaults to `None`: all alike.

    Returns:
        float32 tensor of `grid.scale_shape(weights.shape)`.

    Reference: Banner et al., 2019, "Post training 4-bit quantization of convolutional networks for
    rapid-deployment" (https://arxiv.org/abs/1810.05723), which has the clipping in closed form.
    """
    grouped = grid.group(weights)
    factor = None
    if importance is not None:
        factor = grid.group(tf.broadcast_to(importance, weights.shape))
    largest = tf.reduce_max(tf.abs(grouped), axis=grid.reduced, keepdims=True)
    best, least = None, None
    for ratio in _CLIP_RATIOS:
        scale = grid.representable(largest * (ratio / grid.limit))
        error = tf.square(grid.rounded(grouped, scale) * scale - grouped)
        error = error if factor is None else error * factor
        error = tf.reduce_sum(error, axis=grid.reduced, keepdims=True)
        if best is None:
            best, least = scale, error
        else:
            best, least = tf.where(error < least, scale, best), tf.minimum(error, least)
    return best


def found_scale(weights: tf.Tensor, grid: Grid) -> tf.Tensor | None:
    """Returns the scale of weights that lie on a grid already, exactly, or `None`.

    Where several grids hold the weights, such as one of half the step, the finest that reaches the
    largest weight with an integer is returned: all give the same values.

    Args:
        weights: float32 tensor.
        grid: The grid.
    """
    grouped = grid.group(weights)
    largest = tf.reduce_max(tf.abs(grouped), axis=grid.reduced, keepdims=True)
    scale = tf.ones_like(largest)
    missing = largest > 0.0
    for integer in range(grid.limit, 0, -1):
        candidate = largest / float(integer)
        steps = grouped / tf.where(candidate == 0.0, tf.ones_like(candidate), candidate)
        whole = tf.logical_and(
            tf.reduce_all(tf.round(steps) * candidate == grouped, grid.reduced, keepdims=True),
            grid.representable(candidate) == candidate,
        )
        scale = tf.where(tf.logical_and(missing, whole), candidate, scale)
        missing = tf.logical_and(missing, tf.logical_not(whole))
        if not bool(tf.reduce_any(missing)):
            return scale
    return None


def quantize(
    weights: tf.Tensor, grid: Grid, scale: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds weights to the symmetric grid.

    Args:
        weights: float tensor.
        grid: The grid.
        scale: Scale of `grid.scale_shape(weights.shape)`. Defaults to `None`: `absmax_scale`.

    Returns:
        `(integers, scale)`: whole numbers in float32 with the shape of `weights`, and the float32
        scale.
    """
    weights = tf.cast(weights, tf.float32)
    if scale is not None:
        return grid.encode(weights, scale), scale
    scale = absmax_scale(weights, grid)
    if grid.block_size is not None:  # Such a scale has bounds of its own.
        return grid.encode(weights, scale), scale
    # Nothing is beyond the largest integer, and passes over large tables cost.
    return tf.round(weights / scale), scale


def dequantize(integers: tf.Tensor, scale: tf.Tensor, grid: Grid) -> tf.Tensor:
    """Returns integers times their scales, float32 of the shape of `integers`."""
    return grid.decode(integers, scale)


def fake_quantize(
    weights: tf.Tensor,
    grid: Grid,
    scale_of: Callable[[tf.Tensor], tf.Tensor] | None = None,
    pass_clipped: bool = False,
) -> tf.Tensor:
    """Rounds weights to the grid, and passes gradients straight through.

    A weight that is clipped gets no gradient: moving it would change nothing.

    Args:
        weights: float tensor.
        grid: The grid.
        scale_of: Gives the scale of float32 weights. Defaults to `None`: `absmax_scale`.
        pass_clipped: Whether clipped weights get their gradient too.

    Returns:
        Tensor of the shape and dtype of `weights`, every value an integer times its scale.

    Reference: Bengio et al., 2013, "Estimating or Propagating Gradients Through Stochastic
    Neurons" (straight-through estimator); Jacob et al., 2018 (training with rounded weights).
    """

    @tf.custom_gradient
    def straight_through(x: tf.Tensor):  # type: ignore[no-untyped-def]
        values = tf.cast(x, tf.float32)
        integers, scale = quantize(values, grid, scale_of(values) if scale_of else None)

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            if pass_clipped or scale_of is None:  # The largest magnitude clips nothing.
                return upstream
            return tf.where(inside(values, scale, grid), upstream, tf.zeros_like(upstream))

        return tf.cast(dequantize(integers, scale, grid), x.dtype), gradient

    return straight_through(weights)


def inside(weights: tf.Tensor, scale: tf.Tensor, grid: Grid) -> tf.Tensor:
    """Returns whether each weight is rounded rather than clipped, a bool tensor."""
    grouped = grid.group(weights)
    return grid.ungroup(tf.abs(grouped) <= (grid.limit + 0.5) * scale, weights.shape)


def scale_gradient(
    weights: tf.Tensor, upstream: tf.Tensor, scale: tf.Tensor, grid: Grid
) -> tf.Tensor:
    """Returns the gradient of a loss with respect to the scale, before LSQ's own factor.

    Args:
        weights: float32 tensor.
        upstream: Gradient of the loss with respect to the rounded weights.
        scale: The scale.
        grid: The grid.

    Returns:
        float32 tensor of the shape of `scale`.

    Reference: Esser et al., 2020, "Learned Step Size Quantization"
    (https://arxiv.org/abs/1902.08153), equation 3.
    """
    steps = grid.group(weights) / scale
    clipped = tf.abs(steps) >= grid.limit
    slope = tf.where(clipped, tf.sign(steps) * grid.limit, tf.round(steps) - steps)
    return tf.reduce_sum(slope * grid.group(upstream), axis=grid.reduced, keepdims=True)
