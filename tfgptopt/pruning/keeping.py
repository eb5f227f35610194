"""Marks the largest scores of a matrix, without sorting it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

_SMALLEST, _LARGEST = -(2**31), 2**31 - 1


def _ordered_bits(scores: tf.Tensor) -> tf.Tensor:
    """Returns int32 numbers that are ordered as the floats are."""
    bits = tf.bitcast(scores + 0.0, tf.int32)  # Adding zero turns -0.0 into 0.0.
    return tf.where(bits < 0, bits ^ _LARGEST, bits)


def _total(values: list[tf.Tensor]) -> tf.Tensor:
    """Returns how many are true in each row, over all tensors, `(rows, 1)`."""
    counts = [tf.math.count_nonzero(v, axis=1, keepdims=True, dtype=tf.int32) for v in values]
    return tf.add_n(counts)


def _threshold_of_one_row(patterns: list[tf.Tensor], count: tf.Tensor) -> tf.Tensor:
    """Returns the `count`-th largest number, from two histograms of 16 bits each."""
    digits = 2**16

    def find(values: list[tf.Tensor], wanted: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the digit that holds the `wanted`-th largest, and how many are above it."""
        flat = [tf.reshape(v, (-1,)) for v in values]
        bins = tf.add_n([tf.math.bincount(v, minlength=digits, maxlength=digits) for v in flat])
        at_least = tf.cumsum(bins, reverse=True)
        digit = tf.math.count_nonzero(at_least >= wanted, dtype=tf.int32) - 1
        return digit, at_least[digit] - bins[digit]

    count = tf.reshape(count, ())
    # Shifting keeps the sign, so the high digits go from -32768 to 32767.
    high, above = find([tf.bitwise.right_shift(p, 16) + digits // 2 for p in patterns], count)
    high -= digits // 2
    same = [tf.boolean_mask(p, tf.equal(tf.bitwise.right_shift(p, 16), high)) for p in patterns]
    low, _ = find([p & (digits - 1) for p in same], count - above)
    return tf.reshape(tf.bitwise.left_shift(high, 16) | low, (1, 1))


def _threshold_of_each_row(patterns: list[tf.Tensor], count: tf.Tensor) -> tf.Tensor:
    """Returns the `count`-th largest number of each row, by bisecting: 32 passes over the data."""

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        middle = low + (high - low + 1) // 2
        enough = _total([p >= tf.cast(middle, tf.int32) for p in patterns]) >= count
        return tf.where(enough, middle, low), tf.where(enough, high, middle - 1)

    rows = (tf.shape(patterns[0])[0], 1)
    bounds = (tf.fill(rows, tf.constant(b, tf.int64)) for b in (_SMALLEST, _LARGEST))
    found, _ = tf.while_loop(
        lambda low, high: tf.reduce_any(low < high), halve, tuple(bounds), parallel_iterations=1
    )
    return tf.cast(found, tf.int32)


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that graphs trace once for each shape, not for each weight that has it.

    Eagerly it is called as it is: TensorFlow would warn of shapes that are traced one by one.
    """
    traced = tf.function(function, autograph=False)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return traced(*args) if tf.inside_function() else function(*args)

    return call


@traced_once
def keep_largest(scores: list[tf.Tensor], count: tf.Tensor) -> list[tf.Tensor]:
    """Marks the `count` largest scores of each row, ties broken by position.

    It looks for a threshold instead of sorting, and makes no copy of several tensors into one.

    Args:
        scores: float32 tensors of shape `(rows, columns)`; a row goes on from tensor to tensor.
        count: int32 scalar, how many to keep in each row.

    Returns:
        bool tensors with the shapes of `scores`.
    """
    patterns = [_ordered_bits(tensor) for tensor in scores]
    single = scores[0].shape[0] == 1
    find = _threshold_of_one_row if single else _threshold_of_each_row
    threshold = find(patterns, count)
    above = [pattern > threshold for pattern in patterns]
    places = count - _total(above)
    kept = []
    for pattern, larger in zip(patterns, above, strict=True):
        ties = tf.equal(pattern, threshold)
        order = tf.cumsum(tf.cast(ties, tf.int32), axis=1)
        kept.append(larger | (ties & (order <= places)))
        places -= order[:, -1:]
    return kept


def count_kept(size: tf.Tensor | int, sparsity: tf.Tensor) -> tf.Tensor:
    """Returns how many of `size` to keep: as many as tfmot does, and one at least."""
    kept = tf.round(tf.cast(size, tf.float32) * (1.0 - sparsity))
    return tf.maximum(tf.cast(kept, tf.int32), 1)
