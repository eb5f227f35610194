"""Regularization as a technique: its settings and their checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from tfgptopt.model.targets import Selector, Target, check_regex, select
from tfgptopt.model.techniques import register_technique
from tfgptopt.model.types import Config
from tfgptopt.pruning.penalties import (
    GroupLasso,
    deserialize_penalty,
    serialize_penalty,
)


def overlap(target: Target) -> str:
    """Returns what is wrong where a weight is penalized twice."""
    return f"Two Regularization callbacks act on {target.path}. Give each its own `targets`."


@register_technique
@dataclass(frozen=True)
class Regularize:
    """A penalty on weights while they train, which leaves nothing on the model afterwards.

    Args:
        penalty: `keras.regularizers.L1`, `L2`, `L1L2`, a `GroupLasso`, or another callable from a
            matrix `(inputs, outputs)` to a number.
        targets: Selector of the weights; in a recipe a regular expression on their paths. Defaults
            to `None`: all kernels but the head.

    Raises:
        ValueError: If `penalty` cannot be called.
    """

    penalty: Callable[[Any], Any]
    targets: Selector | None = None

    name: ClassVar[str] = "regularize"
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if isinstance(self.penalty, type) or not callable(self.penalty):
            raise ValueError(
                "`penalty` must be such as keras.regularizers.L1(1e-5) or "
                f"GroupLasso(1e-5, Rows()). Received: {self.penalty!r}"
            )

    def check(self, model: keras.Layer) -> list[Target]:
        """Returns the weights of a model that would be penalized, after checking that they can be.

        Raises:
            ValueError: If nothing matches, or a weight cannot have the pattern.
        """
        chosen = select(model, self.targets)
        for target in chosen:
            if isinstance(self.penalty, GroupLasso):
                self.penalty.pattern.check(target.matrix_shape, target.path)
        return chosen

    def to_config(self) -> Config:
        """Returns the technique as plain data.

        Raises:
            ValueError: If `targets` is no regular expression, or recipes do not know the penalty.
        """
        penalty: Any = self.penalty
        return {
            "name": self.name,
            "penalty": serialize_penalty(penalty),
            "targets": check_regex(self.targets),
        }

    @classmethod
    def from_config(cls, config: Config) -> Regularize:
        """Returns the technique that `to_config` wrote.

        Raises:
            KeyError: If the penalty is missing.
            ValueError: If a setting is not known or out of range.
        """
        config = dict(config)
        return cls(**{**config, "penalty": deserialize_penalty(config["penalty"])})

    def replay(self, model: keras.Layer) -> None:
        """Does nothing: what a penalty brought is in the weights."""

    @classmethod
    def found_on(cls, model: keras.Layer) -> Sequence[Regularize]:
        """Returns nothing: a penalty leaves nothing on a model."""
        return []
