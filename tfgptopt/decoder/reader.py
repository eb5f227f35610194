"""Reads a model as a `DecoderSpec`, along the layout of its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfgptopt.decoder.mixtures import Mixture
from tfgptopt.decoder.reading import (
    as_floats,
    read_activation,
    read_head,
    read_matrix,
    read_norm,
    read_rotary,
    read_table_turn,
    read_turned_norm,
    turn_matrix,
)
from tfgptopt.decoder.rotary import Rotary
from tfgptopt.decoder.spec import (
    Activation,
    Attention,
    Block,
    DecoderSpec,
    FeedForward,
    Matrix,
    Norm,
)
from tfgptopt.families import Layout, Part, follow
from tfgptopt.model.turning import turns_of


def _rotary_of(attention: keras.Layer, rotary: Any, head_dim: int) -> Rotary | None:
    return read_rotary(rotary, head_dim)


def _as_it_is(block: keras.Layer, attention: Attention) -> Attention:
    return attention


def _with_nothing(block: keras.Layer, found: Block) -> Block:
    return found


def _as_laid_out(block: keras.Layer) -> None:
    """Leaves it to the layout where the neurons are."""


def _as_read(backbone: keras.Model, found: DecoderSpec) -> DecoderSpec:
    return found


def _accept(layer: keras.Layer) -> None:
    """Refuses nothing."""


@dataclass(frozen=True)
class Arithmetic:
    """What a family computes that its layout does not say.

    Attributes:
        activation: Of the neurons, where the layout has no path to it.
        rotary: Called with the attention layer, its rotary layer and the size of a head; returns
            the `Rotary`, or `None` if this block turns nothing.
        attention: Called with a block and its `Attention` of a plain scale, `head_dim ** -0.5`;
            returns what differs from it.
        network: Called with a block; returns its feed-forward network, or `None` if that is where
            the layout says.
        block: Called with a block and its `Block`; returns what else is in it.
        decoder: Called with the backbone and its `DecoderSpec`; returns what else is in that.
        check_block, check_backbone: Raise a `ValueError` for settings that no graph computes.
    """

    activation: Activation | None = None
    rotary: Callable[[Any, Any, int], Rotary | None] = _rotary_of
    attention: Callable[[Any, Attention], Attention] = _as_it_is
    network: Callable[[Any], FeedForward | Mixture | None] = _as_laid_out
    block: Callable[[Any, Block], Block] = _with_nothing
    decoder: Callable[[Any, DecoderSpec], DecoderSpec] = _as_read
    check_block: Callable[[Any], None] = _accept
    check_backbone: Callable[[Any], None] = _accept


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads one backbone."""

    backbone: keras.Model
    layout: Layout
    arithmetic: Arithmetic

    def decoder(self) -> DecoderSpec:
        layout, backbone = self.layout, self.backbone
        self.arithmetic.check_backbone(backbone)
        table = follow(backbone, layout.token_embedding)
        positions = follow(backbone, layout.positions) if layout.positions else None
        normed, offset = layout.embedding_norm, layout.norm_offset
        first, embedding_turn = None, read_table_turn(table)
        if normed:
            first, embedding_turn = read_turned_norm(follow(backbone, normed), offset)
        last, head_turn = read_turned_norm(follow(backbone, layout.final_norm), offset)
        found = DecoderSpec(
            family=type(backbone).__name__,
            config=keras.saving.serialize_keras_object(backbone)["config"],
            token_embedding=read_matrix(table),
            blocks=tuple(self._block(block) for block in follow(backbone, layout.blocks)),
            final_norm=last,
            head=read_head(table) if hasattr(table, "tie_weights") else None,
            position_embedding=(
                None if positions is None else as_floats(positions.position_embeddings)
            ),
            embedding_scale=float(backbone.hidden_dim) ** 0.5 if layout.scales_tokens else 1.0,
            embedding_norm=first,
            logit_soft_cap=getattr(table, "logit_soft_cap", None),
            context_length=None if positions is None else backbone.max_sequence_length,
            embedding_turn=embedding_turn,
            head_turn=head_turn,
        )
        return self.arithmetic.decoder(backbone, found)

    def _norm(self, layer: keras.Layer) -> Norm:
        return read_norm(layer, self.layout.norm_offset)

    def _norm_at(self, part: Part | None, block: keras.Layer) -> Norm | None:
        """Returns a norm that only some families, or some of their models, have."""
        layer = part.of(block) if part else None
        return None if layer is None else self._norm(layer)

    def _block(self, block: keras.Layer) -> Block:
        layout = self.layout
        self.arithmetic.check_block(block)
        found = Block(
            attention_norm=self._norm(layout.attention_norm.of(block)),
            attention=self.arithmetic.attention(block, self._attention(block)),
            post_attention_norm=self._norm_at(layout.post_attention_norm, block),
            feedforward_norm=self._norm(layout.feedforward_norm.of(block)),
            feedforward=self.arithmetic.network(block) or self._feedforward(block),
            post_feedforward_norm=self._norm_at(layout.post_feedforward_norm, block),
            parallel=layout.parallel,
        )
        return self.arithmetic.block(block, found)

    def _attention(self, block: keras.Layer) -> Attention:
        layout = self.layout
        heads = int(follow(self.backbone, layout.heads))
        query, key, value = self._projections(block, heads)
        size = query.values.shape[0] // heads
        rotary = None
        if layout.rotary:
            inner = follow(block, layout.attention)
            rotary = self.arithmetic.rotary(inner, follow(block, layout.rotary), size)
        return Attention(
            query=query,
            key=key,
            value=value,
            output=read_matrix(layout.output.of(block)),
            num_heads=heads,
            num_key_value_heads=0 if key is None else key.values.shape[0] // size,
            head_dim=size,
            scale=size**-0.5,
            rotary=rotary,
            query_norm=self._norm_at(layout.query_norm, block),
            key_norm=self._norm_at(layout.key_norm, block),
            value_norm=self._norm_at(layout.value_norm, block),
        )

    def _projections(
        self, block: keras.Layer, heads: int
    ) -> tuple[Matrix, Matrix | None, Matrix | None]:
        """Returns the projections to queries, keys and values; some blocks have no keys of theirs,
        or keys that are values too.
        """
        layout = self.layout
        if layout.query and layout.key and layout.value:
            key, value = (part.of(block) for part in (layout.key, layout.value))
            return (
                read_matrix(layout.query.of(block)),
                None if key is None else read_matrix(key),
                None if value is None else read_matrix(value),
            )
        assert layout.query_key_value is not None
        both = read_matrix(layout.query_key_value.of(block))
        # Each head holds its query, key and value one after the other.
        rows = np.arange(both.values.shape[0]).reshape(heads, 3, -1)
        query, key, value = (
            both.rows(f"{both.name}/{name}", rows[:, i].reshape(-1))
            for i, name in enumerate(("query", "key", "value"))
        )
        return query, key, value

    def _feedforward(self, block: keras.Layer) -> FeedForward:
        layout, activation = self.layout, self.arithmetic.activation
        if layout.activation:
            activation = read_activation(follow(block, layout.activation))
        if activation is None:
            raise ValueError(
                f"Nothing says which activation {type(self.backbone).__name__} has. Give its "
                "layout a path to it, or register `Arithmetic(activation=...)`."
            )
        turned = turns_of(layout.down.of(block)).before
        of_the_layer = layout.activation == f"{layout.up.path}.activation"
        return FeedForward(
            up=read_matrix(layout.up.of(block), activated=of_the_layer),
            down=read_matrix(layout.down.of(block)),
            gate=read_matrix(layout.gate.of(block)) if layout.gate else None,
            activation=activation,
            turn=None if turned is None else turn_matrix(turned),
        )


def read_with(backbone: keras.Model, layout: Layout, arithmetic: Arithmetic) -> DecoderSpec:
    """Reads a backbone.

    Args:
        backbone: A built model from token ids to hidden states.
        layout: Where its layers are.
        arithmetic: What it computes beyond that.

    Raises:
        ValueError: If its configuration cannot be described.
    """
    return _Reader(backbone, layout, arithmetic).decoder()
