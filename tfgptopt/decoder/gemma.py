"""Reads KerasHub's Gemma, Gemma 2 and Gemma 3 (text)."""

from __future__ import annotations

from typing import Any

from tfgptopt.decoder.reading import read_matrix, read_norm, read_rotary
from tfgptopt.decoder.spec import Attention, Block, FeedForward, Norm


def _norm(layer: Any) -> Norm:
    return read_norm(layer, gamma_offset=1.0)


def _read_attention(attention: Any) -> Attention:
    # The attention layer does not get every setting of the backbone: its own are what it computes.
    size = attention.head_dim
    queries = (
        size
        if attention.query_head_dim_normalize
        else (attention.hidden_dim // attention.num_query_heads)
    )
    normed = getattr(attention, "use_query_key_norm", False)
    return Attention(
        query=read_matrix(attention.query_dense),
        key=read_matrix(attention.key_dense),
        value=read_matrix(attention.value_dense),
        output=read_matrix(attention.output_dense),
        num_heads=attention.num_query_heads,
        num_key_value_heads=attention.num_key_value_heads,
        head_dim=size,
        scale=queries**-0.5,
        # Gemma 1 and 2 interleave the turned halves, of queries and keys alike: no product differs.
        rotary=read_rotary(attention.rope_layer, size),
        window=attention.sliding_window_size if attention.use_sliding_window_attention else None,
        logit_soft_cap=attention.logit_soft_cap,
        query_norm=_norm(attention.query_norm) if normed else None,
        key_norm=_norm(attention.key_norm) if normed else None,
    )


def _read_block(layer: Any) -> Block:
    return Block(
        attention_norm=_norm(layer.pre_attention_norm),
        attention=_read_attention(layer.attention),
        post_attention_norm=(
            _norm(layer.post_attention_norm) if layer.use_post_attention_norm else None
        ),
        feedforward_norm=_norm(layer.pre_ffw_norm),
        feedforward=FeedForward(
            gate=read_matrix(layer.gating_ffw),
            up=read_matrix(layer.gating_ffw_2),
            down=read_matrix(layer.ffw_linear),
            activation="gelu_tanh",
        ),
        post_feedforward_norm=_norm(layer.post_ffw_norm) if layer.use_post_ffw_norm else None,
    )


def read_gemma(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.GemmaBackbone`: Gemma, or Gemma 2 by its settings."""
    return {
        "token_embedding": read_matrix(backbone.token_embedding),
        "embedding_scale": float(backbone.hidden_dim) ** 0.5,
        "blocks": tuple(_read_block(layer) for layer in backbone.transformer_layers),
        "final_norm": _norm(backbone.layer_norm),
        "logit_soft_cap": backbone.token_embedding.logit_soft_cap,
    }


def read_gemma3(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.Gemma3Backbone` without a vision encoder.

    Raises:
        ValueError: If it has one, looks ahead, or is a model of embeddings.
    """
    refused = {
        "a vision encoder (give `vision_encoder=None`)": backbone.vision_encoder is not None,
        "`use_bidirectional_attention=True`": backbone.use_bidirectional_attention,
        "`is_embedding_model=True`": backbone.is_embedding_model,
    }
    for what, given in refused.items():
        if given:
            raise ValueError(f"A Gemma 3 with {what} cannot be exported as a decoder of text.")
    return read_gemma(backbone)
