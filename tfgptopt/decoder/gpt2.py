"""Reads KerasHub's GPT-2 and OPT, which share `keras_hub.layers.TransformerDecoder`."""

from __future__ import annotations

from typing import Any

from tfgptopt.decoder.reading import as_floats, read_activation, read_matrix, read_norm
from tfgptopt.decoder.spec import Attention, Block, FeedForward


def _read_block(layer: Any) -> Block:
    attention = layer._self_attention_layer
    up = layer._feedforward_intermediate_dense
    if not layer.normalize_first:
        raise ValueError(f"{layer.path}: only norms before the branches can be exported.")
    return Block(
        attention_norm=read_norm(layer._self_attention_layer_norm),
        attention=Attention(
            query=read_matrix(attention._query_dense),
            key=read_matrix(attention._key_dense),
            value=read_matrix(attention._value_dense),
            output=read_matrix(attention._output_dense),
            num_heads=attention.num_heads,
            num_key_value_heads=attention.num_heads,
            head_dim=attention.key_dim,
            scale=attention.key_dim**-0.5,
        ),
        feedforward_norm=read_norm(layer._feedforward_layer_norm),
        feedforward=FeedForward(
            up=read_matrix(up, activated=True),
            down=read_matrix(layer._feedforward_output_dense),
            activation=read_activation(up.activation),
        ),
    )


def _read(backbone: Any, positions: Any) -> dict[str, Any]:
    return {
        "token_embedding": read_matrix(backbone.token_embedding),
        "position_embedding": as_floats(positions.position_embeddings),
        "blocks": tuple(_read_block(layer) for layer in backbone.transformer_layers),
        "final_norm": read_norm(backbone.layer_norm),
        "context_length": backbone.max_sequence_length,
    }


def read_gpt2(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.GPT2Backbone`."""
    return _read(backbone, backbone.position_embedding)


def read_opt(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.OPTBackbone`, whose positions start at 0 in KerasHub."""
    return _read(backbone, backbone.embeddings.position_embedding)
