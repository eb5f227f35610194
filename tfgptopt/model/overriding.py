"""Other methods for the objects of a model, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# An object, the name of its method, and what stands in for it.
Override = tuple[object, str, Callable[..., Any]]


@contextmanager
def overriding(overrides: Iterable[Override]) -> Iterator[None]:
    """Gives objects other methods for a while.

    Args:
        overrides: Triples of an object, the name of a method, and the function in its place. Each
            method of an object comes once.
    """
    overrides = list(overrides)
    for owner, name, function in overrides:
        # Not through Keras' own __setattr__: there is nothing to track.
        object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in overrides:
            object.__delattr__(owner, name)
