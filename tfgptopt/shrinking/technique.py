"""Shrinking as settings: a technique of a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from tfgptopt.model.history import history_of
from tfgptopt.model.techniques import register_technique
from tfgptopt.model.types import Config
from tfgptopt.shrinking.shapes import check_depth_score, check_request


@register_technique
@dataclass(frozen=True)
class Shrink:
    """Shrinking, before any training. See `tfgptopt.shrink` for the settings.

    A job cannot change the vocabulary: its text is tokenized once, and perplexities of different
    tokens do not compare. Shrink it before.

    Raises:
        ValueError: If nothing is to be shrunk, or settings do not go together.
    """

    name: ClassVar[str] = "shrink"
    order: ClassVar[int] = 0

    depth: int | float | None = None
    heads: int | float | None = None
    kv_heads: int | float | None = None
    feedforward: int | float | None = None
    width: int | float | None = None
    context: int | float | None = None
    parameters: float | None = None
    latency: float | None = None
    depth_score: str = "influence"
    vocabulary: int | float | None = None
    experts: int | float | None = None

    def __post_init__(self) -> None:
        check_request(**self.cuts())
        check_depth_score(self.depth_score)

    @property
    def budget(self) -> tuple[str, float] | None:
        """Name and value of the budget, or `None` if numbers are given."""
        return check_request(**self.cuts())

    def cuts(self) -> Config:
        """Returns what is to be shrunk, by the arguments of `tfgptopt.shrink`."""
        return {name: value for name, value in self.settings().items() if name != "depth_score"}

    def settings(self) -> Config:
        """Returns all arguments of `tfgptopt.shrink` that are given."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in settings.items() if value is not None}

    def to_config(self) -> Config:
        """Returns the technique as plain data."""
        return {"name": self.name, **self.settings()}

    @classmethod
    def from_config(cls, config: Config) -> Shrink:
        """Returns the technique that `to_config` wrote, given without its name.

        Raises:
            TypeError: If a field is not known.
            ValueError: If a field is out of range.
        """
        return cls(**config)

    def replay(self, model: object) -> None:
        """Does nothing: a model that is reloaded has its smaller shape."""

    @classmethod
    def found_on(cls, model: object) -> list[Shrink]:
        """Returns how a model was shrunk, as its history shows."""
        return [technique for technique in history_of(model) if isinstance(technique, cls)]
