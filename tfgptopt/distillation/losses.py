"""What a student learns from a teacher, as small settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf

from tfgptopt.distillation.divergences import (
    DIRECTIONS,
    Direction,
    divergence,
    divergence_of_top_k,
    log_softmax,
)
from tfgptopt.distillation.views import Lesson, View
from tfgptopt.model.types import Data

# A factor, or one that depends on the optimizer's step; keras' LearningRateSchedule is callable.
Weight = float | Callable[[Any], Any]


@runtime_checkable
class Loss(Protocol):
    """One term of what the student minimizes: a number for each token."""

    @property
    def weight(self) -> Weight:
        """The factor of the term."""

    @property
    def name(self) -> str:
        """What the term is called in logs."""

    def per_token(self, student: View, lesson: Lesson, labels: Data) -> tf.Tensor:
        """Returns float32 values of shape `(batch, tokens)`."""


def check_weight(weight: Any) -> None:
    """Raises unless `weight` is a finite number >= 0, a schedule, or a callable.

    Raises:
        ValueError: If it is something else.
    """
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if number and 0.0 <= weight < float("inf"):
        return
    if callable(weight) and not isinstance(weight, type):
        return
    raise ValueError(
        "`weight` must be a finite number >= 0, a keras LearningRateSchedule or a callable from "
        f"the step to a number. Received: {weight!r}"
    )


def check_temperature(temperature: Any) -> None:
    """Raises unless `temperature` is a number above 0.

    Raises:
        ValueError: If it is not.
    """
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0.0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be a number above 0. Received: {temperature!r}")


def weight_at(weight: Weight, step: tf.Tensor) -> tf.Tensor:
    """Returns the factor of a loss at a step of the optimizer."""
    value = weight(tf.cast(step, tf.float32)) if callable(weight) else weight
    return tf.cast(value, tf.float32)


@dataclass(frozen=True)
class LogitsKL:
    """The student's next-token distribution should be the teacher's.

    Times `temperature ** 2`, so that the size of gradients does not depend on the temperature.

    Args:
        temperature: float above 0. Divides both logits; above 1, unlikely tokens count more.
            Defaults to `1.0`.
        direction: `"forward"`, KL(teacher, student), covers all that the teacher might say;
            `"reverse"`, KL(student, teacher), says only what the teacher would; or
            `"jensen_shannon"`, between them. Defaults to `"forward"`.
        weight: float, or a schedule over the optimizer's steps: a keras `LearningRateSchedule` or
            a callable. Defaults to `1.0`.

    Raises:
        ValueError: If a setting is out of range.

    Reference: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network"
    (https://arxiv.org/abs/1503.02531); Gu et al., 2024, "MiniLLM"
    (https://arxiv.org/abs/2306.08543), for the reverse direction.
    """

    temperature: float = 1.0
    direction: Direction = "forward"
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_weight(self.weight)
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"`direction` must be one of {', '.join(DIRECTIONS)}. Received: {self.direction!r}"
            )

    @property
    def name(self) -> str:
        """What the term is called in logs."""
        return "logits_kl"

    def per_token(self, student: View, lesson: Lesson, labels: Data) -> tf.Tensor:
        """Returns the divergence at each token, in nats; see `Loss`.

        Raises:
            ValueError: If student and teacher have different vocabularies.
        """
        temperature = float(self.temperature)
        if lesson.top_k is not None:
            indices, log_p = lesson.top_k
            return divergence_of_top_k(indices, log_p, student.logits, temperature, self.direction)
        log_p = log_softmax(lesson.view.logits, temperature)
        if log_p.shape[-1] != student.logits.shape[-1]:
            raise ValueError(
                f"The teacher gives logits for {log_p.shape[-1]} tokens, and the student for "
                f"{student.logits.shape[-1]}: they need the same vocabulary."
            )
        return divergence(log_p, student.logits, temperature, self.direction)


@dataclass(frozen=True)
class HardLabels:
    """The student should predict the next token of the text: cross-entropy with the labels.

    Args:
        weight: float, or a schedule over the optimizer's steps. Defaults to `1.0`.

    Raises:
        ValueError: If `weight` is negative or of another type; in `fit`, if there are no labels.
    """

    weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)

    @property
    def name(self) -> str:
        """What the term is called in logs."""
        return "hard_labels"

    def per_token(self, student: View, lesson: Lesson, labels: Data) -> tf.Tensor:
        """Returns the negative log-likelihood of each label, in nats; see `Loss`.

        Raises:
            ValueError: If there are no labels.
        """
        if labels is None:
            raise ValueError("HardLabels() needs labels: give `fit` data of (inputs, labels).")
        logits = tf.cast(student.logits, tf.float32)
        labels = tf.cast(labels, tf.int32)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
