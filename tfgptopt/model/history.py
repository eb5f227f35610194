"""What was done to a model that its layers do not show: it was shrunk, or it learned of another."""

from __future__ import annotations

from typing import Protocol

_ATTRIBUTE = "_tfgptopt_history"


class Recorded(Protocol):
    """A technique as settings, which can be written as plain data."""

    def to_config(self) -> dict[str, object]:
        """Returns the technique as plain data."""


def history_of(model: object) -> tuple[Recorded, ...]:
    """Returns the techniques that were recorded on a model, the first one first."""
    found: tuple[Recorded, ...] = getattr(model, _ATTRIBUTE, ())
    return found


def record(model: object, *techniques: Recorded) -> None:
    """Adds techniques to what a model's history shows.

    Args:
        model: The very object that is exported later. The history is not saved with weights.
        *techniques: What was done to it, in its order.
    """
    # Not through Keras' own __setattr__: there is nothing to track.
    object.__setattr__(model, _ATTRIBUTE, (*history_of(model), *techniques))


def rewrite(model: object, techniques: tuple[Recorded, ...]) -> None:
    """Puts techniques in the place of what a model's history shows."""
    object.__setattr__(model, _ATTRIBUTE, techniques)
