"""The stages of a recipe that come before pruning and rounding: shrinking and distillation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from tfgptopt.distillation.losses import HardLabels, LogitsKL, Loss
from tfgptopt.distillation.serializing import deserialize_loss, serialize_loss
from tfgptopt.model.cloning import with_backbone
from tfgptopt.model.techniques import register_technique
from tfgptopt.shrinking.importance import check_depth_score
from tfgptopt.shrinking.shapes import resolve
from tfgptopt.shrinking.shrinker import check_request, shrink
from tfgptopt.shrinking.surgery import build
from tfgptopt.shrinking.vocabularies import shrink_preprocessor


@register_technique
@dataclass(frozen=True)
class Shrink:
    """Shrinking, before any training. See `tfgptopt.shrink` for the settings.

    The vocabulary is not among them: the text of a job is tokenized once, and perplexities of
    different tokens do not compare. Shrink it before.

    Raises:
        ValueError: If nothing is to be shrunk, or settings do not go together.
    """

    depth: int | float | None = None
    heads: int | float | None = None
    kv_heads: int | float | None = None
    feedforward: int | float | None = None
    width: int | float | None = None
    context: int | float | None = None
    parameters: float | None = None
    latency: float | None = None
    depth_score: str = "influence"

    name: ClassVar[str] = "shrink"
    order: ClassVar[int] = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shrink:
        """Returns the stage that `to_config` wrote."""
        return cls(**config)

    @classmethod
    def found_on(cls, model: keras.Layer) -> list[Shrink]:
        """Returns none yet."""
        return []

    def __post_init__(self) -> None:
        check_request(**self._cuts())
        check_depth_score(self.depth_score)

    def _cuts(self) -> dict[str, Any]:
        return {name: value for name, value in self._settings().items() if name != "depth_score"}

    def _settings(self) -> dict[str, Any]:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in settings.items() if value is not None}

    def to_config(self) -> dict[str, Any]:
        """Returns the stage as plain data."""
        return {"name": "shrink", **self._settings()}

    def replay(self, model: keras.Layer) -> None:
        """Does nothing: a model that is reloaded has its smaller shape."""

    def preview(self, model: Any) -> Any:
        """Returns a model of the shape that `apply` gives, with random weights.

        It is made in full, to be checked and thrown away. For a budget, whose shape is searched
        on data, this is the model itself.

        Raises:
            ValueError: If the family cannot have the shape.
        """
        if check_request(**self._cuts()):
            return model
        shape = resolve(model, **self._cuts())
        preprocessor = getattr(model, "preprocessor", None)
        preprocessor = shrink_preprocessor(preprocessor, None, shape.context)
        return with_backbone(model, build(model, shape), preprocessor)

    def apply(self, model: Any, calibration: Any) -> Any:
        """Returns the smaller model."""
        return shrink(model, calibration=calibration, **self._settings())


@register_technique
@dataclass(frozen=True)
class Distill:
    """Distillation from the dense model of a job: for a number of steps before anything else is
    pruned or rounded, and on through the steps that prune and round.

    Args:
        steps: int. Training steps of the stage. Defaults to `500`.
        losses: See `tfgptopt.Distiller`. Defaults to `(LogitsKL(), HardLabels(0.5))`.

    Raises:
        ValueError: If a setting is out of range or cannot be written to YAML.
    """

    steps: int = 500
    losses: tuple[Loss, ...] = (LogitsKL(), HardLabels(0.5))

    name: ClassVar[str] = "distill"
    order: ClassVar[int] = 1

    @classmethod
    def found_on(cls, model: keras.Layer) -> list[Distill]:
        """Returns none yet."""
        return []

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"`steps` of distill must be an int >= 1. Received: {self.steps!r}")
        object.__setattr__(self, "losses", tuple(self.losses))
        if not self.losses:
            raise ValueError("`losses` of distill is empty. Give one at least, or leave it out.")
        for loss in self.losses:
            serialize_loss(loss)

    def to_config(self) -> dict[str, Any]:
        """Returns the stage as plain data."""
        losses = [serialize_loss(loss) for loss in self.losses]
        return {"name": "distill", "steps": self.steps, "losses": losses}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Distill:
        """Returns the stage that `to_config` wrote. All may be missing."""
        config = dict(config)
        if "losses" in config:
            if not isinstance(config["losses"], list):
                raise ValueError(f"`losses` of distill is a list. Received: {config['losses']!r}")
            config["losses"] = tuple(deserialize_loss(item) for item in config["losses"])
        return cls(**config)

    def replay(self, model: keras.Layer) -> None:
        """Does nothing: what a student learned is in its weights."""
