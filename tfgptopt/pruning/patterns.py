"""Which weights go together when a kernel is pruned."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf


def keep_largest(scores: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Marks the `count` largest scores of each row, ties broken by position.

    The threshold is found by bisecting the bit patterns of the scores: 31 passes over the data
    where a sort would take many more.

    Args:
        scores: float32 tensor of shape `(rows, columns)`, none negative.
        count: int32 scalar, how many to keep in each row.

    Returns:
        float32 tensor of zeros and ones.
    """
    # Non-negative floats are ordered as their bit patterns are.
    pattern = tf.bitcast(tf.abs(scores), tf.int32)

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        middle = low + (high - low + 1) // 2
        enough = tf.reduce_sum(tf.cast(pattern >= middle, tf.int32), axis=1, keepdims=True) >= count
        return tf.where(enough, middle, low), tf.where(enough, high, middle - 1)

    rows = tf.shape(scores)[0]
    low = tf.zeros((rows, 1), tf.int32)
    high = tf.fill((rows, 1), tf.constant(0x7F800000, tf.int32))
    threshold, _ = tf.while_loop(
        lambda low, high: tf.reduce_any(low < high), halve, (low, high), parallel_iterations=1
    )
    above = tf.cast(pattern > threshold, tf.int32)
    ties = tf.cast(tf.equal(pattern, threshold), tf.int32)
    places = count - tf.reduce_sum(above, axis=1, keepdims=True)
    kept_ties = ties * tf.cast(tf.cumsum(ties, axis=1) <= places, tf.int32)
    return tf.cast(above + kept_ties, tf.float32)


@dataclass(frozen=True)
class Unstructured:
    """Any weight of a tensor may go: best quality for a sparsity, smaller downloads, no speed.

    Reference: Zhu and Gupta, 2017, "To prune, or not to prune" (https://arxiv.org/abs/1710.01878).
    """

    def mask(self, scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        """Returns the mask that keeps the highest scores of a tensor.

        Args:
            scores: float32 tensor of any shape, none negative.
            sparsity: float32 scalar in `[0, 1)`, the share of weights to drop.

        Returns:
            float32 tensor of zeros and ones with the shape of `scores`.
        """
        size = tf.cast(tf.size(scores), tf.float32)
        # tfmot's count, so that both keep the same number of weights.
        count = tf.maximum(tf.cast(tf.round(size * (1.0 - sparsity)), tf.int32), 1)
        return tf.reshape(keep_largest(tf.reshape(scores, (1, -1)), count), tf.shape(scores))
