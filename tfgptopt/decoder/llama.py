"""Reads KerasHub's Llama and the families built like it: Mistral, Qwen2, Qwen3, Phi-3."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfgptopt.decoder.reading import (
    read_activation,
    read_head,
    read_matrix,
    read_norm,
    read_rotary,
)
from tfgptopt.decoder.spec import Attention, Block, FeedForward, Rotary


def _read_feedforward(layer: Any, prefix: str = "_") -> FeedForward:
    return FeedForward(
        up=read_matrix(getattr(layer, f"{prefix}feedforward_intermediate_dense")),
        down=read_matrix(getattr(layer, f"{prefix}feedforward_output_dense")),
        gate=read_matrix(getattr(layer, f"{prefix}feedforward_gate_dense")),
        activation=read_activation(layer.activation),
    )


def _read_attention(layer: Any, head_dim: int, **more: Any) -> Attention:
    attention = layer._self_attention_layer
    return Attention(
        query=read_matrix(attention._query_dense),
        key=read_matrix(attention._key_dense),
        value=read_matrix(attention._value_dense),
        output=read_matrix(attention._output_dense),
        num_heads=layer.num_query_heads,
        num_key_value_heads=layer.num_key_value_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rotary=read_rotary(attention.rotary_embedding_layer, head_dim),
        **more,
    )


def _read_block(layer: Any, attention: Attention) -> Block:
    return Block(
        attention_norm=read_norm(layer._self_attention_layernorm),
        attention=attention,
        feedforward_norm=read_norm(layer._feedforward_layernorm),
        feedforward=_read_feedforward(layer),
    )


def _read(backbone: Any, blocks: list[Block]) -> dict[str, Any]:
    return {
        "token_embedding": read_matrix(backbone.token_embedding),
        "blocks": tuple(blocks),
        "final_norm": read_norm(backbone.layer_norm),
        "head": read_head(backbone.token_embedding),
    }


def read_llama(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.LlamaBackbone` or `Llama3Backbone`.

    KerasHub ignores `rope_position_scaling_factor`, and so does this.
    """
    size = backbone.hidden_dim // backbone.num_query_heads
    layers = backbone.transformer_layers
    return _read(backbone, [_read_block(x, _read_attention(x, size)) for x in layers])


def read_mistral(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.MistralBackbone`."""
    size = backbone.head_dim or backbone.hidden_dim // backbone.num_query_heads
    layers = backbone.transformer_layers
    attentions = [_read_attention(x, size, window=x.sliding_window) for x in layers]
    return _read(backbone, [_read_block(x, a) for x, a in zip(layers, attentions, strict=True)])


def read_qwen(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.QwenBackbone` (Qwen 2 and 2.5)."""
    size = backbone.hidden_dim // backbone.num_query_heads
    blocks = []
    for layer in backbone.transformer_layers:
        window = layer.sliding_window_size if layer.use_sliding_window_attention else None
        blocks.append(_read_block(layer, _read_attention(layer, size, window=window)))
    return _read(backbone, blocks)


def read_qwen3(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.Qwen3Backbone`."""
    blocks = []
    for layer in backbone.transformer_layers:
        inner = layer._self_attention_layer
        attention = _read_attention(
            layer,
            inner.head_dim,
            window=layer.sliding_window_size or None,
            query_norm=read_norm(inner._query_dense_layer_norm),
            key_norm=read_norm(inner._key_dense_layer_norm),
        )
        blocks.append(_read_block(layer, attention))
    return _read(backbone, blocks)


def _read_phi3_rotary(layer: Any, size: int) -> Rotary:
    if not hasattr(layer, "inverese_freq_short_factor"):
        return read_rotary(layer, size)
    plain = np.asarray(layer._get_inverse_freq(size))
    return Rotary(
        frequencies=plain / np.asarray(layer.inverese_freq_short_factor, np.float32),
        magnitude=float(layer.embedding_scaling_factor),
        long_frequencies=plain / np.asarray(layer.inverese_freq_long_factor, np.float32),
        original_length=layer.pretraining_sequence_length,
    )


def _read_phi3_block(layer: Any, size: int) -> Block:
    attention = layer.attention
    return Block(
        attention_norm=read_norm(layer.pre_attention_layernorm),
        attention=Attention(
            query=read_matrix(attention.query_dense),
            key=read_matrix(attention.key_dense),
            value=read_matrix(attention.value_dense),
            output=read_matrix(attention.output_dense),
            num_heads=layer.num_query_heads,
            num_key_value_heads=layer.num_key_value_heads,
            head_dim=size,
            scale=size**-0.5,
            rotary=_read_phi3_rotary(attention.rotary_embedding_layer, size),
        ),
        feedforward_norm=read_norm(layer.post_attention_layernorm),
        feedforward=_read_feedforward(layer, prefix=""),
    )


def read_phi3(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.Phi3Backbone`.

    With "su" scaling KerasHub turns by other angles as soon as a text is longer than the model was
    pretrained with. A cache holds turned keys, so the file takes the angles for its whole context:
    the long ones if the context is longer than that.
    """
    size = backbone.hidden_dim // backbone.num_query_heads
    return _read(backbone, [_read_phi3_block(x, size) for x in backbone.transformer_layers])
