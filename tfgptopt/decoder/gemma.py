"""What Gemma compute beyond their layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import keras
import keras_hub
import numpy as np

from tfgptopt.decoder.reader import Arithmetic
from tfgptopt.decoder.reading import (
    as_floats,
    read_activation,
    read_matrix,
    read_norm,
    read_rotary,
)
from tfgptopt.decoder.rotary import Rotary
from tfgptopt.decoder.spec import Attention, Block, DecoderSpec, FeedForward
from tfgptopt.decoder.streams import AltUp, Laurel, LayerInput, LayerInputs, Streams


def _refuse(family: str, refused: dict[str, bool]) -> None:
    """Raises for the first setting that a model has.

    Raises:
        ValueError: With the setting.
    """
    for what, given in refused.items():
        if given:
            raise ValueError(f"A {family} with {what} cannot be exported as a decoder of text.")


def _gemma(block: keras.Layer, attention: Attention) -> Attention:
    # The attention layer does not get every setting of the backbone: its own are what it computes.
    # Gemma 1 and 2 interleave the turned halves, of queries and keys alike: no product differs.
    inner, scale = block.attention, attention.scale
    if not inner.query_head_dim_normalize:
        scale = (inner.hidden_dim // inner.num_query_heads) ** -0.5
    return replace(
        attention,
        scale=scale,
        window=inner.sliding_window_size if inner.use_sliding_window_attention else None,
        logit_soft_cap=inner.logit_soft_cap,
    )


def _check_gemma3(backbone: keras.Model) -> None:
    refused = {
        "`use_bidirectional_attention=True`": backbone.use_bidirectional_attention,
        "`is_embedding_model=True`": backbone.is_embedding_model,
    }
    _refuse("Gemma 3", refused)


def _check_gemma4(backbone: keras.Model) -> None:
    rows = backbone.vocab_size_per_layer_input
    refused = {
        "`use_bidirectional_attention=True`": backbone.use_bidirectional_attention,
        "`is_embedding_model=True`": backbone.is_embedding_model,
        "`enable_moe_block=True`": backbone.enable_moe_block,
        "`vocab_size_per_layer_input` below `vocabulary_size`, whose other tokens KerasHub cannot "
        "look up,": bool(rows and rows < backbone.vocabulary_size),
        "`num_kv_shared_layers` of all layers, an assistant of another model,": (
            backbone.num_kv_shared_layers >= backbone.num_layers
        ),
    }
    _refuse("Gemma 4", refused)


def _gemma4_rotary(attention: keras.Layer, rotary: Any, head_dim: int) -> Rotary:
    # Global layers turn the first features of each half of a head only.
    found = read_rotary(rotary, attention.rotary_dim)
    still = np.zeros(head_dim // 2 - found.frequencies.size, np.float32)
    return replace(found, frequencies=np.concatenate([found.frequencies, still]))


def _gemma4(block: keras.Layer, attention: Attention) -> Attention:
    inner = block.attention
    return replace(
        attention,
        scale=1.0,
        window=inner.sliding_window_size if inner.use_sliding_window_attention else None,
        logit_soft_cap=inner.logit_soft_cap,
        num_key_value_heads=inner.effective_num_kv_heads,
        shared_with=block.kv_shared_layer_index if block.is_kv_shared_layer else None,
    )


def _gemma4_block(block: keras.Layer, found: Block) -> Block:
    layer_input = None
    if block.hidden_size_per_layer_input:
        layer_input = LayerInput(
            gate=read_matrix(block.per_layer_input_gate),
            up=read_matrix(block.per_layer_up_proj),
            norm=read_norm(block.post_per_layer_input_norm),
            activation="gelu_tanh",
        )
    scale = float(as_floats(block.layer_scalar))
    return replace(found, layer_input=layer_input, scale=scale)


def _gemma4_decoder(backbone: keras.Model, found: DecoderSpec) -> DecoderSpec:
    size = backbone.hidden_size_per_layer_input
    if not size:
        return found
    layer_inputs = LayerInputs(
        table=read_matrix(backbone.per_layer_token_embedding),
        table_scale=float(size) ** 0.5,
        projection=read_matrix(backbone.per_layer_model_projection),
        projection_scale=float(backbone.hidden_dim) ** -0.5,
        norm=read_norm(backbone.per_layer_projection_norm),
    )
    return replace(found, layer_inputs=layer_inputs)


def _gemma3n(block: keras.Layer, attention: Attention) -> Attention:
    return replace(attention, scale=1.0, window=block.attention.sliding_window)


def _gemma3n_block(block: keras.Layer, found: Block) -> Block:
    altup, laurel, sparsity = block.altup, block.laurel, block.mlp.activation_sparsity
    feedforward = found.feedforward
    if sparsity > 0 and isinstance(feedforward, FeedForward):
        feedforward = replace(feedforward, cutoff=NormalDist().inv_cdf(sparsity))
    norm = read_norm(altup.router_norm)
    assert norm.gamma is not None
    scale = altup.correct_output_scale
    return replace(
        found,
        feedforward=feedforward,
        layer_input=LayerInput(
            gate=read_matrix(block.per_layer_input_gate),
            up=read_matrix(block.per_layer_projection),
            norm=read_norm(block.post_per_layer_input_norm),
            activation=read_activation(block.act_fn),
        ),
        altup=AltUp(
            router=read_matrix(altup.modality_router),
            router_norm=replace(norm, gamma=norm.gamma * np.float32(altup.router_input_scale)),
            prediction=read_matrix(altup.prediction_coefs),
            correction=read_matrix(altup.correction_coefs),
            active=altup.altup_active_idx,
            output_scale=None if scale is None else as_floats(scale),
        ),
        laurel=Laurel(
            left=read_matrix(laurel.linear_left),
            right=read_matrix(laurel.linear_right),
            norm=read_norm(laurel.post_laurel_norm),
        ),
    )


def _sharing(blocks: Sequence[Block], model: Any) -> tuple[Block, ...]:
    """Returns blocks of which the last attend to the keys of others of their type."""
    found, last = list(blocks), {}
    for i, kind in enumerate(model.layer_types):
        if not i >= model.first_kv_shared_layer_idx > 0:
            last[kind] = i
            continue
        if kind not in last:
            raise ValueError(f"Layer {i} of the model shares keys of {kind}, and none has any.")
        attention = replace(
            blocks[i].attention,
            key=None,
            value=None,
            key_norm=None,
            value_norm=None,
            shared_with=last[kind],
        )
        found[i] = replace(blocks[i], attention=attention)
    return tuple(found)


def _gemma3n_decoder(backbone: keras.Model, found: DecoderSpec) -> DecoderSpec:
    model = backbone.language_model
    table = read_matrix(model.embed_tokens_per_layer.embedding)
    # Tokens behind the end of this table have the inputs of the first.
    tokens = np.arange(found.vocabulary_size)
    if len(table.values) < len(tokens):
        table = table.rows(table.name, np.where(tokens < len(table.values), tokens, 0))
    return replace(
        found,
        blocks=_sharing(found.blocks, model),
        embedding_scale=float(model.embed_tokens.embed_scale),
        logit_soft_cap=model.final_logit_soft_cap,
        layer_inputs=LayerInputs(
            table=table,
            table_scale=float(model.embed_tokens_per_layer.embed_scale),
            projection=read_matrix(model.per_layer_model_projection),
            projection_scale=float(model.per_layer_projection_scale),
            norm=read_norm(model.per_layer_projection_norm),
        ),
        streams=Streams(
            projections=tuple(read_matrix(layer) for layer in model.altup_projections),
            unembeddings=tuple(read_matrix(layer) for layer in model.altup_unembed_projections),
            epsilon=1e-5,
        ),
    )


_GEMMA = Arithmetic(activation="gelu_tanh", attention=_gemma)

GEMMA_ARITHMETIC: dict[type, Arithmetic] = {
    keras_hub.models.Gemma3Backbone: replace(_GEMMA, check_backbone=_check_gemma3),
    keras_hub.models.Gemma3nBackbone: Arithmetic(
        attention=_gemma3n, block=_gemma3n_block, decoder=_gemma3n_decoder
    ),
    keras_hub.models.Gemma4Backbone: Arithmetic(
        activation="gelu_tanh",
        rotary=_gemma4_rotary,
        attention=_gemma4,
        block=_gemma4_block,
        decoder=_gemma4_decoder,
        check_backbone=_check_gemma4,
    ),
    keras_hub.models.GemmaBackbone: _GEMMA,
}
