"""What Gemma compute beyond their layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import keras_hub
import numpy as np

from tfgptopt.decoder.reader import Arithmetic
from tfgptopt.decoder.reading import as_floats, read_matrix, read_norm, read_rotary
from tfgptopt.decoder.spec import Attention, Block, DecoderSpec, Rotary
from tfgptopt.decoder.streams import LayerInput, LayerInputs


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
        "a vision encoder (give `vision_encoder=None`)": backbone.vision_encoder is not None,
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


_GEMMA = Arithmetic(activation="gelu_tanh", attention=_gemma)

GEMMA_ARITHMETIC: dict[type, Arithmetic] = {
    keras_hub.models.Gemma3Backbone: replace(_GEMMA, check_backbone=_check_gemma3),
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
