"""Where mixtures of experts keep their routers and their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras


@dataclass(frozen=True)
class Experts:
    """The experts of one decoder layer.

    Attributes:
        router: The product whose outputs say how well each expert fits a token.
        bank: The layer with the kernels of all experts; the experts are their first axis.
        top_k: How many of them compute a token.
    """

    router: keras.layers.Dense
    bank: keras.Layer
    top_k: int


def experts_of(model: keras.Layer) -> list[Experts]:
    """Returns the experts of each decoder layer that has some, in order; an empty list if none."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    return [found for layer in layers if (found := _in_layer(layer)) is not None]


def _in_layer(layer: Any) -> Experts | None:
    if hasattr(layer, "expert_bank"):
        # Qwen 3.5 MoE; Mixtral, Qwen MoE, Qwen 3 MoE
        names = ("_router_gate", "_sparse_feedforward_gate_dense")
        router = next(getattr(layer, name) for name in names if hasattr(layer, name))
        return Experts(router, layer.expert_bank, layer.top_k)
    if hasattr(layer, "experts") and hasattr(layer, "router"):  # GPT-OSS
        return Experts(layer.router.router_dense, layer.experts, layer.top_k)
    return None
