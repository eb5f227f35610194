"""Families of models: one layout each, which every other room reads."""

from __future__ import annotations

import keras

from tfgptopt.families.kerashub import LAYOUTS
from tfgptopt.families.layout import Axes, Axis, Kind, Layout, Part, follow

__all__ = [
    "Axes",
    "Axis",
    "Kind",
    "Layout",
    "Part",
    "blocks_of",
    "follow",
    "known_families",
    "layout_of",
    "register",
]

_LAYOUTS: dict[type, Layout] = dict(LAYOUTS)


def register(backbone_class: type[keras.Model], layout: Layout) -> None:
    """Makes a family known: models of this very class can then be read, exported and distilled.

    Args:
        backbone_class: Class of models from token ids to hidden states; not its subclasses. A
            class of your own is fine. Layers of your own have to be named in `layout.own_layers`.
        layout: Where its layers are.

    Raises:
        ValueError: If it is no class of Keras models, or no layout.

    Example:

    ```python
    layout = dataclasses.replace(tfgptopt.families.layout_of(gpt), own_layers=(MyAttention,))
    tfgptopt.families.register(MyBackbone, layout)
    ```
    """
    if not isinstance(backbone_class, type) or not issubclass(backbone_class, keras.Model):
        raise ValueError(f"Expected a subclass of keras.Model. Received: {backbone_class!r}")
    if not isinstance(layout, Layout):
        raise ValueError(f"Expected a tfgptopt.families.Layout. Received: {layout!r}")
    _LAYOUTS[backbone_class] = layout


def layout_of(model: keras.Model) -> Layout | None:
    """Returns how a model, or its backbone, is laid out; `None` if its family is not known."""
    return _LAYOUTS.get(type(getattr(model, "backbone", model)))


def known_families(shrinks: bool = False) -> list[str]:
    """Returns the names of the families, in order; only those that can be shrunk if wanted."""
    found = [family for family, layout in _LAYOUTS.items() if layout.shrinks or not shrinks]
    return sorted(family.__name__.removesuffix("Backbone") for family in found)


def blocks_of(model: keras.Model) -> list[keras.Layer]:
    """Returns the decoder layers of a model, or nothing if its family keeps them elsewhere."""
    layout = layout_of(model)
    path = layout.blocks if layout else "transformer_layers"
    return list(follow(getattr(model, "backbone", model), path) or [])
