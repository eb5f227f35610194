"""What a technique is, which there are, and which were applied to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import keras

from tfgptopt.model.history import history_of
from tfgptopt.model.types import Config


@runtime_checkable
class Technique(Protocol):
    """A frozen dataclass of settings, and what they do to a model that is reloaded.

    Attributes:
        name: Its name in recipes.
        order: Its place: 0 makes a smaller model, 1 trains it, 2 acts in `fit`.
    """

    name: ClassVar[str]
    order: ClassVar[int]

    def to_config(self) -> Config:
        """Returns the technique as plain data, its name included."""

    @classmethod
    def from_config(cls, config: Config) -> Technique:
        """Returns the technique that `to_config` wrote; the name is left out."""

    def replay(self, model: keras.Layer) -> None:
        """Dresses a reloaded model as it was, if there is something to dress."""

    @classmethod
    def found_on(cls, model: keras.Layer) -> Sequence[Technique]:
        """Returns the techniques of this kind that the layers of a model show now."""


# The `order` of techniques that callbacks carry out in `fit`.
IN_FIT = 2

Class = TypeVar("Class", bound=type)
_CLASSES: dict[str, type[Any]] = {}


def register_technique(technique_class: Class) -> Class:
    """Lets recipes and files name a technique, by its `name`. Can be used as a decorator.

    Args:
        technique_class: A frozen dataclass with the members of `Technique`.

    Raises:
        ValueError: If the name is taken by another class.
    """
    name: str = technique_class.name  # type: ignore[attr-defined]
    if _CLASSES.setdefault(name, technique_class) is not technique_class:
        raise ValueError(f"There is a technique '{name}' already: {_CLASSES[name]}")
    return technique_class


def technique_classes() -> Mapping[str, type[Any]]:
    """Returns the techniques by their names, in the order in which they come."""
    return dict(sorted(_CLASSES.items(), key=lambda item: (item[1].order, item[0])))


def kind_of(technique: Technique) -> tuple[str, Any]:
    """Returns what tells whether two techniques act on the same weights in the same way."""
    return technique.name, getattr(technique, "targets", None)


def techniques_of(model: keras.Layer) -> tuple[Technique, ...]:
    """Returns everything that was done to a model, in its order: nothing for a plain one."""
    now = [one for each in technique_classes().values() for one in each.found_on(model)]
    kinds = [kind_of(technique) for technique in now]
    recorded = cast(tuple[Technique, ...], history_of(model))
    earlier = [one for one in recorded if kind_of(one) not in kinds]
    return tuple(sorted([*earlier, *now], key=lambda technique: technique.order))
