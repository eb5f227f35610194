"""Which layer plays which role in a family of models, and what the axes of its weights mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import keras

Axis = Literal["width", "heads", "kv_heads", "head_dim", "feedforward", "vocabulary", "context"]
Axes = tuple[Axis, ...]
Kind = Literal["query", "reads", "writes", "inner", "norm", "post_norm"]


def follow(owner: keras.Layer, path: str) -> Any:
    """Returns what a path of attributes leads to, or `None` if one is missing on the way.

    An empty path leads to the owner itself.
    """
    for name in path.split(".") if path else ():
        owner = getattr(owner, name, None)
    return owner


@dataclass(frozen=True)
class Part:
    """A layer inside a block.

    Attributes:
        path: Attributes that lead to it from the block.
        axes: What the axes of its kernel are; may be left out if the family is not shrunk.
        bias: What the axes of its bias are, if it has one.
        kind: `"reads"` the normed stream, `"inner"` is within a branch, `"writes"` to the stream,
            `"query"` reads it and is scaled; `"norm"` is before a branch, `"post_norm"` behind one.
    """

    path: str
    axes: Axes = ()
    bias: Axes = ()
    kind: Kind = "reads"

    def of(self, block: keras.Layer) -> Any:
        """Returns the layer, or `None` if this block has none."""
        return follow(block, self.path)


@dataclass(frozen=True)
class Layout:
    """How a family of models is laid out: where each layer is, and what settings are called.

    Paths of parts begin at a block, those of the model's own layers at the backbone.

    Attributes:
        output: The projection of what the heads found.
        up, down: The projections to and from the neurons.
        attention_norm, feedforward_norm: The norms before the branches.
        attention: Path of the layer that computes attention. Defaults to `""`: the block itself.
        query, key, value: The projections of each, or `None` if they are one. A block may lack
            `value`, if its keys are its values, and both, if it shares those of another block.
        query_key_value: One projection for all three, or `None`: of each head its query, key and
            value, one after the other.
        gate: The projection that gates the neurons, or `None`.
        post_attention_norm, post_feedforward_norm: Norms behind the branches, or `None`.
        query_norm, key_norm, value_norm: Norms over a head, or `None`.
        rotary: Path of the layer that turns queries and keys, or `None`.
        activation: Path of the activation of the neurons, or `None` if the family has a fixed one.
        parallel: Whether both branches of a block read the same input.
        heads, kv_heads: Settings for the numbers of heads; `kv_heads` is `None` if there is but
            one number.
        head_dim: Setting for the size of a head, or `None`: it is `hidden_dim // heads`.
        blocks, token_embedding, final_norm: Paths of these.
        embedding_norm: Path of the norm of the embeddings, or `None`.
        positions: Path of the position table, or `None`.
        norm_offset: What a norm adds to its weight.
        scales_tokens: Whether looked-up tokens are multiplied with `sqrt(hidden_dim)`.
        shares_norms: Whether other layers than the projections read norms of a block, too.
        gates_in_intermediate: Whether `intermediate_dim` counts gates and neurons together.
        shrinks: Whether surgery knows all of it: every part then has `axes`.
        towers: Settings that may hold encoders of images or sound; what reads text alone leaves
            them out.
        own_layers: Classes of layers from outside Keras and KerasHub that this layout describes.

    Raises:
        ValueError: If projections are missing, or `axes` of a family that can be shrunk.
    """

    output: Part
    up: Part
    down: Part
    attention_norm: Part
    feedforward_norm: Part
    attention: str = ""
    query: Part | None = None
    key: Part | None = None
    value: Part | None = None
    query_key_value: Part | None = None
    gate: Part | None = None
    post_attention_norm: Part | None = None
    post_feedforward_norm: Part | None = None
    query_norm: Part | None = None
    key_norm: Part | None = None
    value_norm: Part | None = None
    rotary: str | None = None
    activation: str | None = None
    parallel: bool = False
    heads: str = "num_query_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = None
    blocks: str = "transformer_layers"
    token_embedding: str = "token_embedding"
    final_norm: str = "layer_norm"
    embedding_norm: str | None = None
    positions: str | None = None
    norm_offset: float = 0.0
    scales_tokens: bool = False
    shares_norms: bool = False
    gates_in_intermediate: bool = False
    shrinks: bool = False
    towers: tuple[str, ...] = ()
    own_layers: tuple[type, ...] = ()

    def __post_init__(self) -> None:
        separate = [self.query, self.key, self.value]
        if (self.query_key_value is None) == (None in separate):
            raise ValueError(
                "A layout has `query`, `key` and `value`, or `query_key_value` in place of them. "
                f"Received: {separate} and {self.query_key_value}"
            )
        if self.shrinks and not all(part.axes for part in self.parts):
            missing = [part.path for part in self.parts if not part.axes]
            raise ValueError(f"A family that shrinks needs `axes` of every part: {missing}.")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The layers over the stream: projections, then norms."""
        found = (
            *(self.query, self.key, self.value, self.query_key_value, self.output),
            *(self.up, self.down, self.gate),
            *(self.attention_norm, self.feedforward_norm),
            *(self.post_attention_norm, self.post_feedforward_norm),
        )
        return tuple(part for part in found if part is not None)

    def of_kind(self, *kinds: Kind) -> list[Part]:
        """Returns the parts of some kinds."""
        return [part for part in self.parts if part.kind in kinds]
