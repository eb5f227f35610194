"""What was done to a model and cannot be seen on its layers any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfgptopt.model.techniques import Technique

_ATTRIBUTE = "_tfgptopt_history"


def history_of(model: Any) -> tuple[Technique, ...]:
    """Returns the techniques that were recorded, the oldest first."""
    found: tuple[Technique, ...] = getattr(model, _ATTRIBUTE, ())
    return found


def record(model: Any, *techniques: Technique) -> None:
    """Notes techniques behind those that were recorded before."""
    # Not through Keras' own __setattr__: there is nothing to track.
    object.__setattr__(model, _ATTRIBUTE, (*history_of(model), *techniques))


def rewrite(model: Any, techniques: tuple[Technique, ...]) -> None:
    """Notes techniques in the place of those that were recorded before."""
    object.__setattr__(model, _ATTRIBUTE, techniques)
