"""Which axis of which weight means what, for each family: what surgery cuts along.

A new family needs an entry here, and no other change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import keras
import keras_hub

Axis = Literal["width", "heads", "kv_heads", "head_dim", "feedforward", "vocabulary", "context"]
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Part:
    """A layer inside a block.

    Attributes:
        path: Attributes that lead to it from the block.
        axes: What the axes of its kernel are.
        bias: What the axes of its bias are, if it has one.
        kind: `"reads"` the normed stream, `"inner"` is within a branch, `"writes"` to the stream,
            `"query"` reads it and is scaled; `"norm"` is before a branch, `"post_norm"` behind one.
    """

    path: str
    axes: Axes
    bias: Axes = ()
    kind: Literal["reads", "query", "writes", "norm", "post_norm"] = "reads"

    def of(self, block: Any) -> Any:
        """Returns the layer, or `None` if this block has none."""
        for name in self.path.split("."):
            block = getattr(block, name, None)
        return block


@dataclass(frozen=True)
class Family:
    """How a family of models is laid out.

    Attributes:
        parts: The layers of a block.
        heads, kv_heads: Settings for the numbers of heads; `kv_heads` is `None` if there is but
            one number.
        head_dim: Setting for the size of a head, or `None`: it is `hidden_dim // heads`.
        positions: Attributes that lead to the position table, or `None`.
        norm_offset: What a norm adds to its weight.
        scales_tokens: Whether looked-up tokens are multiplied with `sqrt(hidden_dim)`.
        gates_in_intermediate: Whether `intermediate_dim` counts gates and neurons together.
    """

    parts: tuple[Part, ...]
    heads: str = "num_query_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = None
    positions: str | None = None
    norm_offset: float = 0.0
    scales_tokens: bool = False
    gates_in_intermediate: bool = False

    def period(self, backbone: Any) -> int:
        """Returns after how many blocks their kinds repeat: these can only go together."""
        alternates = self.scales_tokens and backbone.use_sliding_window_attention
        return 2 if alternates else 1

    def part(self, *kinds: str) -> list[Part]:
        """Returns the parts of some kinds."""
        return [part for part in self.parts if part.kind in kinds]

    @property
    def attention_output(self) -> Part:
        """The projection of what the heads found."""
        return next(p for p in self.parts if p.kind == "writes" and "heads" in p.axes)

    @property
    def feedforward_output(self) -> Part:
        """The projection of the neurons."""
        return next(p for p in self.parts if p.kind == "writes" and "feedforward" in p.axes)


_ATTENTION = (
    Part(
        "_self_attention_layer._query_dense",
        ("width", "heads", "head_dim"),
        ("heads", "head_dim"),
        "query",
    ),
    Part(
        "_self_attention_layer._key_dense",
        ("width", "kv_heads", "head_dim"),
        ("kv_heads", "head_dim"),
    ),
    Part(
        "_self_attention_layer._value_dense",
        ("width", "kv_heads", "head_dim"),
        ("kv_heads", "head_dim"),
    ),
    Part(
        "_self_attention_layer._output_dense",
        ("heads", "head_dim", "width"),
        ("width",),
        "writes",
    ),
)
_FEEDFORWARD = (
    Part("_feedforward_intermediate_dense", ("width", "feedforward"), ("feedforward",)),
    Part("_feedforward_output_dense", ("feedforward", "width"), ("width",), "writes"),
)
_GPT2 = Family(
    parts=(
        *_ATTENTION,
        *_FEEDFORWARD,
        Part("_self_attention_layer_norm", ("width",), kind="norm"),
        Part("_feedforward_layer_norm", ("width",), kind="norm"),
    ),
    heads="num_heads",
    kv_heads=None,
    positions="position_embedding",
)
_LLAMA = Family(
    parts=(
        *_ATTENTION,
        *_FEEDFORWARD,
        Part("_feedforward_gate_dense", ("width", "feedforward"), ("feedforward",)),
        Part("_self_attention_layernorm", ("width",), kind="norm"),
        Part("_feedforward_layernorm", ("width",), kind="norm"),
    ),
)
_GEMMA = Family(
    parts=(
        Part("attention.query_dense", ("heads", "width", "head_dim"), kind="query"),
        Part("attention.key_dense", ("kv_heads", "width", "head_dim")),
        Part("attention.value_dense", ("kv_heads", "width", "head_dim")),
        Part("attention.output_dense", ("heads", "head_dim", "width"), kind="writes"),
        Part("gating_ffw", ("width", "feedforward")),
        Part("gating_ffw_2", ("width", "feedforward")),
        Part("ffw_linear", ("feedforward", "width"), kind="writes"),
        Part("pre_attention_norm", ("width",), kind="norm"),
        Part("pre_ffw_norm", ("width",), kind="norm"),
        Part("post_attention_norm", ("width",), kind="post_norm"),
        Part("post_ffw_norm", ("width",), kind="post_norm"),
    ),
    head_dim="head_dim",
    norm_offset=1.0,
    scales_tokens=True,
    gates_in_intermediate=True,
)
_FAMILIES: dict[type, Family] = {
    keras_hub.models.GPT2Backbone: _GPT2,
    keras_hub.models.OPTBackbone: replace(_GPT2, positions="embeddings.position_embedding"),
    keras_hub.models.LlamaBackbone: _LLAMA,
    keras_hub.models.Llama3Backbone: _LLAMA,
    keras_hub.models.MistralBackbone: replace(_LLAMA, head_dim="head_dim"),
    keras_hub.models.QwenBackbone: _LLAMA,
    keras_hub.models.Qwen3Backbone: replace(_LLAMA, head_dim="head_dim"),
    keras_hub.models.GemmaBackbone: _GEMMA,
}


def family_of(model: Any) -> Family:
    """Returns how a model is laid out.

    Raises:
        ValueError: If it is no model of KerasHub of a family that can be shrunk, or its layers are
            quantized.
    """
    backbone = getattr(model, "backbone", model)
    if type(backbone) not in _FAMILIES:
        known = ", ".join(sorted(f.__name__.removesuffix("Backbone") for f in _FAMILIES))
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
    return _FAMILIES[type(backbone)]


def positions_of(family: Family, backbone: Any) -> Any:
    """Returns the layer of the position table, or `None`."""
    if family.positions is None:
        return None
    layer = backbone
    for name in family.positions.split("."):
        layer = getattr(layer, name)
    return layer
