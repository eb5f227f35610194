"""Which weights go together when a matrix is pruned.

A pattern turns scores into a mask. It sees a weight as a matrix `(inputs, outputs)`, whatever the
rank of the variable is, and knows nothing of how the scores came about. A pattern of your own is a
frozen dataclass with the members of `Pattern`; `register_pattern` lets recipes name it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf

from tfgptopt.model.types import Config
from tfgptopt.pruning.blocks import Block, Columns, Rows
from tfgptopt.pruning.nm import NM
from tfgptopt.pruning.unstructured import Unstructured

__all__ = [
    "NM",
    "Block",
    "Columns",
    "Pattern",
    "Rows",
    "Unstructured",
    "check_pattern",
    "check_reaches",
    "deserialize_pattern",
    "register_pattern",
    "serialize_pattern",
]


@runtime_checkable
class Pattern(Protocol):
    """What a pattern has to answer."""

    @property
    def sparsity(self) -> float | None:
        """Sparsity at which the pattern is complete, or `None` if it has any."""

    @property
    def takes_allocation(self) -> bool:
        """Whether each weight may have a sparsity of its own."""

    @property
    def inputs_together(self) -> int | None:
        """How many inputs, one after the other, a choice has to see at once.

        For methods that go through a matrix input by input; `None` if the more the better.
        """

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns bool masks of score matrices; see `Unstructured.masks`."""

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a weight cannot have the pattern."""

    def holds(self, kept: np.ndarray) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has the pattern."""

    def supports(self, score: str) -> bool:
        """Returns whether a score, by its name in recipes, can be used with the pattern."""

    def keep(self, scores: np.ndarray, sparsity: float) -> np.ndarray:
        """Returns the mask of some inputs of a matrix, `(inputs, outputs)`, for `supports`."""


_CLASSES: dict[str, type[Any]] = {
    "unstructured": Unstructured,
    "nm": NM,
    "block": Block,
    "rows": Rows,
    "columns": Columns,
}


def register_pattern(name: str, pattern_class: type[Any]) -> None:
    """Lets recipes name a pattern of your own.

    Args:
        name: str. Its name in YAML.
        pattern_class: A frozen dataclass with the members of `Pattern`.

    Raises:
        ValueError: If the name is taken by another class.
    """
    if _CLASSES.setdefault(name, pattern_class) is not pattern_class:
        raise ValueError(f"There is a pattern '{name}' already: {_CLASSES[name]}")


def serialize_pattern(pattern: Pattern) -> Config:
    """Returns a pattern as plain data.

    Raises:
        ValueError: If it is of a class that was not registered.
    """
    names = {pattern_class: name for name, pattern_class in _CLASSES.items()}
    if type(pattern) not in names:
        raise ValueError(
            f"Recipes cannot name {pattern!r}: call "
            f"`tfgptopt.pruning.register_pattern('name', {type(pattern).__name__})` first."
        )
    return {"name": names[type(pattern)], **asdict(pattern)}  # type: ignore[call-overload]


def deserialize_pattern(config: Config) -> Pattern:
    """Returns the pattern that `serialize_pattern` wrote.

    Raises:
        ValueError: If the name or a setting is not known or out of range.
    """
    config = dict(config)
    name = config.pop("name", None)
    if name not in _CLASSES:
        raise ValueError(f"A pattern is one of {', '.join(_CLASSES)}. Received: {name!r}")
    try:
        pattern: Pattern = _CLASSES[name](**config)
    except TypeError as error:
        raise ValueError(f"Wrong settings for {name}: {sorted(config)} ({error})") from None
    return pattern


def check_reaches(pattern: Pattern, sparsity: float | None) -> None:
    """Raises if a pattern with a sparsity of its own is to end at another.

    Raises:
        ValueError: If it is.
    """
    if sparsity is None or pattern.sparsity is None:
        return
    if abs(sparsity - pattern.sparsity) > 0.01:
        raise ValueError(
            f"{pattern} is complete at sparsity {pattern.sparsity:.3g}, but is asked for "
            f"{sparsity:.3g}. End the schedule at {pattern.sparsity:.3g}, or choose another "
            "pattern."
        )


def check_pattern(pattern: Any) -> None:
    """Raises unless `pattern` is one.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(pattern, type) or not isinstance(pattern, Pattern):
        raise ValueError(
            "`pattern` must be Unstructured(), NM(2, 4), Block(rows, columns), Rows(), Columns() "
            f"or an object with the members of tfgptopt.pruning.Pattern. Received: {pattern!r}"
        )
