"""Divergences between the next-token distributions of a teacher and a student.

Their gradients are written out: one tensor of the size of the logits is kept for the backward
pass, where automatic differentiation would keep four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import tensorflow as tf

Direction = Literal["forward", "reverse", "jensen_shannon"]


def log_softmax(logits: tf.Tensor, temperature: float) -> tf.Tensor:
    """Returns float32 log-probabilities of logits divided by a temperature."""
    logits = tf.cast(logits, tf.float32)
    return tf.nn.log_softmax(logits if temperature == 1.0 else logits / temperature)


def _forward(log_p: tf.Tensor, log_q: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    p = tf.exp(log_p)
    return tf.reduce_sum(p * (log_p - log_q), axis=-1), tf.exp(log_q) - p


def _reverse(log_p: tf.Tensor, log_q: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    q, ratio = tf.exp(log_q), log_q - log_p
    value = tf.reduce_sum(q * ratio, axis=-1)
    return value, q * (ratio - value[..., tf.newaxis])


def _jensen_shannon(log_p: tf.Tensor, log_q: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    q = tf.exp(log_q)
    larger, smaller = tf.maximum(log_p, log_q), tf.minimum(log_p, log_q)
    log_m = larger + tf.math.log1p(tf.exp(smaller - larger)) - math.log(2.0)
    ratio = log_q - log_m
    of_q = tf.reduce_sum(q * ratio, axis=-1)
    of_p = tf.reduce_sum(tf.exp(log_p) * (log_p - log_m), axis=-1)
    return 0.5 * (of_p + of_q), 0.5 * q * (ratio - of_q[..., tf.newaxis])


# Each gives the divergence, and its gradient with respect to the logits of q.
_KINDS: dict[str, Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jensen_shannon": _jensen_shannon,
}
DIRECTIONS = tuple(_KINDS)


def divergence(
    log_p: tf.Tensor, logits: tf.Tensor, temperature: float, direction: Direction
) -> tf.Tensor:
    """Returns the divergence of a student's distribution from a teacher's, times `T ** 2`.

    Args:
        log_p: float32 log-probabilities of the teacher at the temperature, `(..., vocabulary)`.
            No gradient flows to them.
        logits: Logits of the student, `(..., vocabulary)`.
        temperature: float. Divides the student's logits.
        direction: `"forward"` is KL(teacher, student), `"reverse"` KL(student, teacher).

    Returns:
        float32 tensor `(...)`, in nats.
    """

    @tf.custom_gradient
    def scaled(logits: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        value, gradient = _KINDS[direction](log_p, log_softmax(logits, temperature))

        def backward(upstream: tf.Tensor) -> tf.Tensor:
            return (temperature * upstream)[..., tf.newaxis] * gradient

        return temperature**2 * value, backward

    return scaled(tf.cast(logits, tf.float32))


def divergence_of_top_k(
    indices: tf.Tensor,
    log_p: tf.Tensor,
    logits: tf.Tensor,
    temperature: float,
    direction: Direction,
) -> tf.Tensor:
    """Returns the divergence where the teacher's `k` likeliest tokens are known.

    All other tokens count as one, with the probability that is left, for teacher and student.
    That is a lower bound of the divergence over the whole vocabulary.

    Args:
        indices: int32 tokens, `(..., k)`.
        log_p: float32 log-probabilities of the teacher at the temperature, `(..., k)`.
        logits: Logits of the student, `(..., vocabulary)`.
        temperature: float. Divides the student's logits.
        direction: See `divergence`.

    Returns:
        float32 tensor `(...)`, in nats, times `temperature ** 2`.
    """
    scaled = tf.cast(logits, tf.float32) / temperature
    total = tf.reduce_logsumexp(scaled, axis=-1, keepdims=True)
    log_q = tf.gather(scaled, indices, batch_dims=len(indices.shape) - 1) - total
    # Recorded numbers are rounded, so they do not sum to exactly 1.
    log_p, log_q = tf.nn.log_softmax(_with_rest(log_p)), _with_rest(log_q)
    # A softmax of log-probabilities gives them back, with the gradient that a student needs.
    return divergence(log_p, log_q * temperature, temperature, direction)


def _with_rest(log_probabilities: tf.Tensor) -> tf.Tensor:
    """Appends the log-probability of all tokens that are not listed."""
    listed = tf.reduce_sum(tf.exp(log_probabilities), axis=-1, keepdims=True)
    # Sums of rounded numbers can surpass 1.
    rest = tf.math.log(tf.maximum(1.0 - listed, 1e-6))
    return tf.concat([log_probabilities, rest], axis=-1)
