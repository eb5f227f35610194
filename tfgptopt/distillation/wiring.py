"""Which layer of the student learns from which of the teacher, and through which projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from tfgptopt.distillation.features import AttentionMaps, HiddenStates, Pairs
from tfgptopt.distillation.losses import Loss

_FEATURES = (HiddenStates, AttentionMaps)


def width_of(layer: keras.Layer) -> int | None:
    """Returns the number of features that a layer of a built model gives, if it is known."""
    try:
        return int(layer.output.shape[-1])
    except (AttributeError, TypeError, ValueError):
        return None


@dataclass(eq=False)
class Wiring:
    """What is watched in student and teacher. A plain object: Keras tracks nothing of it.

    Attributes:
        pairs: Each loss between layers with its pairs of layers, `(student, teacher)`.
        projections: By id of the loss, variables (or `None`) by pairs of ids of layers.
    """

    pairs: list[tuple[HiddenStates | AttentionMaps, Pairs]]
    projections: dict[int, dict[tuple[int, int], Any]] = field(default_factory=dict)

    @classmethod
    def between(cls, student: keras.Model, teacher: keras.Model, losses: Sequence[Loss]) -> Wiring:
        """Returns the wiring that losses ask for.

        Raises:
            ValueError: If a layer is not there, or widths differ and may not be projected.
        """
        wiring = cls([(x, x.pairs(student, teacher)) for x in losses if isinstance(x, _FEATURES)])
        wiring.shapes()
        return wiring

    def shapes(self) -> dict[int, list[tuple[int, int] | None]]:
        """Returns by id of the loss the shape of each pair's projection, `None` for no need."""
        return {id(loss): [_shape(loss, *pair) for pair in pairs] for loss, pairs in self.pairs}

    def add_projections(self, owner: keras.Layer) -> None:
        """Makes the projections, as weights of `owner`."""
        for loss, pairs in self.pairs:
            made = self.projections[id(loss)] = {}
            for (mine, yours), shape in zip(pairs, self.shapes()[id(loss)], strict=True):
                name = f"projection_{mine.name}_{yours.name}"
                variable = owner.add_weight(shape, "orthogonal", name=name) if shape else None
                made[id(mine), id(yours)] = variable

    def watched(self, kind: type, side: int) -> list[keras.Layer]:
        """Returns the layers of the student (side 0) or the teacher (1) for a kind of loss."""
        layers = [p[side] for loss, pairs in self.pairs if isinstance(loss, kind) for p in pairs]
        return list({id(layer): layer for layer in layers}.values())


def _shape(
    loss: HiddenStates | AttentionMaps, mine: keras.Layer, yours: keras.Layer
) -> tuple[int, int] | None:
    if isinstance(loss, AttentionMaps):
        return None
    widths = width_of(mine), width_of(yours)
    if widths[0] is None or widths[1] is None:
        raise ValueError(
            f"The width of {mine.path or mine.name} or {yours.path or yours.name} is not known "
            "before the model runs. HiddenStates() compares layers of functional models."
        )
    if widths[0] == widths[1]:
        return None
    if not loss.projection:
        raise ValueError(
            f"{mine.path} of the student gives {widths[0]} features and {yours.path} of the "
            f"teacher {widths[1]}: without a projection they cannot be compared. Use "
            "`HiddenStates(projection=True)`."
        )
    return widths[0], widths[1]
