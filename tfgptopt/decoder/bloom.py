"""Reads KerasHub's Bloom and Falcon, which tell positions by ALiBi."""

from __future__ import annotations

from typing import Any

from tfgptopt.decoder.reading import alibi_slopes, read_activation, read_matrix, read_norm
from tfgptopt.decoder.spec import Attention, Block, FeedForward


def _read_bloom_block(layer: Any) -> Block:
    attention = layer._self_attention_layer
    return Block(
        attention_norm=read_norm(layer._pre_attention_layernorm),
        attention=Attention(
            query=read_matrix(attention._query_dense),
            key=read_matrix(attention._key_dense),
            value=read_matrix(attention._value_dense),
            output=read_matrix(attention._output_dense),
            num_heads=attention.num_heads,
            num_key_value_heads=attention.num_heads,
            head_dim=attention.head_dim,
            scale=attention.inv_norm_factor,
            alibi=alibi_slopes(attention.num_heads),
        ),
        feedforward_norm=read_norm(layer._post_attention_layernorm),
        feedforward=FeedForward(
            up=read_matrix(layer._mlp_intermediate_dense),
            down=read_matrix(layer._mlp_output_dense),
            activation="gelu_tanh",
        ),
    )


def read_bloom(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.BloomBackbone`."""
    return {
        "token_embedding": read_matrix(backbone.token_embedding),
        "embedding_norm": read_norm(backbone.embeddings_layer_norm),
        "blocks": tuple(_read_bloom_block(layer) for layer in backbone.transformer_layers),
        "final_norm": read_norm(backbone.layer_norm),
    }


def _read_falcon_block(layer: Any) -> Block:
    attention = layer.attention_layer
    return Block(
        attention_norm=read_norm(layer.input_layernorm),
        attention=Attention(
            query=read_matrix(attention.query_dense),
            key=read_matrix(attention.key_dense),
            value=read_matrix(attention.value_dense),
            output=read_matrix(attention.output_dense),
            num_heads=attention.num_heads,
            num_key_value_heads=attention.num_heads,
            head_dim=attention.head_dim,
            scale=attention.inv_norm_factor,
            # Falcon adds the bias before it scales the products.
            alibi=alibi_slopes(attention.num_heads) * attention.inv_norm_factor,
        ),
        feedforward_norm=read_norm(layer.post_attention_layernorm),
        feedforward=FeedForward(
            up=read_matrix(layer.dense_h_to_4h, activated=True),
            down=read_matrix(layer.dense_4h_to_h),
            activation=read_activation(layer.dense_h_to_4h.activation),
        ),
    )


def read_falcon(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.FalconBackbone`."""
    return {
        "token_embedding": read_matrix(backbone.token_embedding),
        "blocks": tuple(_read_falcon_block(layer) for layer in backbone.transformer_layers),
        "final_norm": read_norm(backbone.final_layernorm),
    }
