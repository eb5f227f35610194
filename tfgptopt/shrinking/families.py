"""Which families can be shrunk, and what of a family's layout only surgery asks for."""

from __future__ import annotations

from typing import Any

import keras

from tfgptopt.families import Layout, follow, known_families, layout_of


def family_of(model: keras.Model) -> Layout:
    """Returns how a model is laid out.

    Raises:
        ValueError: If it is no model of KerasHub of a family that can be shrunk, or its layers are
            quantized.
    """
    backbone, layout = getattr(model, "backbone", model), layout_of(model)
    if layout is None or not layout.shrinks:
        known = ", ".join(known_families(shrinks=True))
        raise ValueError(
            f"Cannot shrink {type(model).__name__}: it is no model of KerasHub of the families "
            f"{known}."
        )
    if not isinstance(backbone, keras.Model) or any(
        getattr(layer, "quantization_mode", None) for layer in backbone._flatten_layers()
    ):
        raise ValueError(
            f"'{model.name}' was quantized by Keras. Shrink the model before it is quantized."
        )
    return layout


def period_of(model: keras.Model) -> int:
    """Returns after how many blocks their kinds repeat: these can only go together."""
    backbone = getattr(model, "backbone", model)
    # Gemma 2 takes turns between a window and the whole text.
    alternates = family_of(model).scales_tokens and backbone.use_sliding_window_attention
    return 2 if alternates else 1


def positions_of(layout: Layout, backbone: keras.Model) -> Any:
    """Returns the layer of the position table, or `None`."""
    return None if layout.positions is None else follow(backbone, layout.positions)
