"""Distillation as settings: a technique of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfgptopt.distillation.losses import HardLabels, LogitsKL, Loss
from tfgptopt.distillation.serializing import deserialize_loss, serialize_loss
from tfgptopt.model.history import history_of
from tfgptopt.model.techniques import register_technique
from tfgptopt.model.types import Config


@register_technique
@dataclass(frozen=True)
class Distill:
    """Distillation from the dense model of a job: for a number of steps before anything else is
    pruned or rounded, and on through the steps that prune and round.

    Args:
        steps: int. Training steps of the stage, 0 for none: it teaches in those that prune and
            round alone. `None` in the history of a model whose `Distiller` was called by hand.
            Defaults to `500`.
        losses: See `tfgptopt.Distiller`. Defaults to `(LogitsKL(), HardLabels(0.5))`.

    Raises:
        ValueError: If a setting is out of range or cannot be written to YAML.
    """

    name: ClassVar[str] = "distill"
    order: ClassVar[int] = 1

    steps: int | None = 500
    losses: tuple[Loss, ...] = (LogitsKL(), HardLabels(0.5))

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if self.steps is not None and (not whole or self.steps < 0):
            raise ValueError(f"`steps` of distill must be an int >= 0. Received: {self.steps!r}")
        object.__setattr__(self, "losses", tuple(self.losses))
        if not self.losses:
            raise ValueError("`losses` of distill is empty. Give one at least, or leave it out.")
        for loss in self.losses:
            serialize_loss(loss)

    def to_config(self) -> Config:
        """Returns the technique as plain data."""
        losses = [serialize_loss(loss) for loss in self.losses]
        return {"name": self.name, "steps": self.steps, "losses": losses}

    @classmethod
    def from_config(cls, config: Config) -> Distill:
        """Returns the technique that `to_config` wrote, given without its name.

        Raises:
            TypeError: If a field is not known.
            ValueError: If a field is out of range.
        """
        config = dict(config)
        if "losses" in config:
            if not isinstance(config["losses"], list):
                raise ValueError(f"`losses` of distill is a list. Received: {config['losses']!r}")
            config["losses"] = tuple(deserialize_loss(item) for item in config["losses"])
        return cls(**config)

    def replay(self, model: object) -> None:
        """Does nothing: what a student learned is in its weights."""

    @classmethod
    def found_on(cls, model: object) -> list[Distill]:
        """Returns how a model was taught, as its history shows."""
        return [technique for technique in history_of(model) if isinstance(technique, cls)]
