"""Lets masks and scales come back with the weights that they belong to.

`model.get_weights()` returns the numbers of the weights alone. `EarlyStopping` and others keep them
and put them back with `set_weights`, when masks and scales have moved on. On a model that is
dressed, `get_weights` therefore returns a list that also knows masks and scales; `set_weights`
restores them from it, and applies those that are there to weights of which nothing is known.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import keras

from tfgptopt.model import masks
from tfgptopt.model.retracing import retrace

_CARRIERS = "_tfgptopt_carriers"
_METHODS = ("get_weights", "set_weights")


class Carrier(Protocol):
    """Something beside a weight that has to come back with it."""

    def snapshot(self) -> Any:
        """Returns what has to come back."""

    def restore(self, snapshot: Any) -> str | None:
        """Puts it back, or settles what is there if it is `None`; returns what to warn of."""


class Weights(list[Any]):
    """What `get_weights` returns: a list of arrays that also knows masks and scales."""

    def __init__(self, arrays: list[Any], states: list[Any]) -> None:
        super().__init__(arrays)
        self.states = states


def attach(layer: keras.Layer, carriers: list[Carrier]) -> None:
    """Hangs on a layer what has to come back with its weights, besides its mask."""
    object.__setattr__(layer, _CARRIERS, carriers)


def detach(layer: keras.Layer) -> None:
    """Takes it off."""
    if hasattr(layer, _CARRIERS):
        object.__delattr__(layer, _CARRIERS)


def _carriers(layer: keras.Layer) -> Iterator[Carrier]:
    """Yields what has to come back with the weights of a layer and the layers inside it."""
    for inner in layer._flatten_layers():
        masks.read_if_fresh(inner)
        mask = masks.mask_on(inner)
        if mask is not None:
            yield mask
        yield from getattr(inner, _CARRIERS, ())


def carry(model: keras.Layer) -> None:
    """Lets masks and scales come back with the weights of a model and of all layers inside it."""
    for layer in model._flatten_layers():
        wrapped = "get_weights" in vars(layer)
        if any(True for _ in _carriers(layer)):
            if not wrapped:
                _wrap(layer)
        elif wrapped:
            for name in _METHODS:
                object.__delattr__(layer, name)


def _wrap(layer: keras.Layer) -> None:
    plain_get, plain_set = layer.get_weights, layer.set_weights

    def get_weights() -> list[Any]:
        return Weights(plain_get(), [one.snapshot() for one in _carriers(layer)])

    def set_weights(weights: list[Any]) -> None:
        plain_set(weights)
        carriers = list(_carriers(layer))
        states = weights.states if isinstance(weights, Weights) else []
        if len(states) != len(carriers):
            states = [None] * len(carriers)
        said = [one.restore(state) for one, state in zip(carriers, states, strict=True)]
        for message in dict.fromkeys(message for message in said if message):
            warnings.warn(message, stacklevel=2)
        retrace(layer)

    object.__setattr__(layer, "get_weights", get_weights)
    object.__setattr__(layer, "set_weights", set_weights)
