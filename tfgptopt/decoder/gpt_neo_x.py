"""Reads KerasHub's GPT-NeoX."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfgptopt.decoder.reading import read_activation, read_matrix, read_norm, read_rotary
from tfgptopt.decoder.spec import Attention, Block, FeedForward


def _read_attention(attention: Any) -> Attention:
    heads, size = attention.num_heads, attention.attn_head_size
    both = read_matrix(attention._qkv_dense)
    # Each head holds its query, key and value one after the other.
    rows = np.arange(3 * heads * size).reshape(heads, 3, size)
    query, key, value = (
        both.rows(f"{both.name}/{name}", rows[:, i].reshape(-1))
        for i, name in enumerate(("query", "key", "value"))
    )
    return Attention(
        query=query,
        key=key,
        value=value,
        output=read_matrix(attention._output_dense),
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=size,
        scale=size**-0.5,
        rotary=read_rotary(attention.rotary_embedding_layer, attention.rotary_dim),
    )


def _read_block(layer: Any) -> Block:
    up = layer._feedforward_intermediate_dense
    return Block(
        attention_norm=read_norm(layer._self_attention_layer_norm),
        attention=_read_attention(layer._self_attention_layer),
        feedforward_norm=read_norm(layer._feedforward_layer_norm),
        feedforward=FeedForward(
            up=read_matrix(up, activated=True),
            down=read_matrix(layer._feedforward_output_dense),
            activation=read_activation(up.activation),
        ),
        parallel=True,
    )


def read_gpt_neo_x(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.GPTNeoXBackbone`.

    The file computes what the model's own call and its training compute. KerasHub 0.32 does not in
    `generate`: with a cache it turns the query of each new token as if it stood at position 0.
    """
    return {
        "token_embedding": read_matrix(backbone.token_embedding),
        "blocks": tuple(_read_block(layer) for layer in backbone.transformer_layers),
        "final_norm": read_norm(backbone.layer_norm),
    }
