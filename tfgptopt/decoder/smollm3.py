"""Reads KerasHub's SmolLM3."""

from __future__ import annotations

from typing import Any

from tfgptopt.decoder.reading import as_floats, read_matrix, read_norm
from tfgptopt.decoder.spec import Attention, Block, FeedForward, Rotary


def _read_attention(attention: Any) -> Attention:
    frequencies = as_floats(attention.rotary_embedding.inv_freq)
    if attention.use_rope and 2 * frequencies.size != attention.head_dim:
        raise ValueError(
            f"SmolLM3 with partial_rotary_factor={attention.partial_rotary_factor} cannot be "
            "exported: KerasHub itself computes it with 1.0 only."
        )
    return Attention(
        query=read_matrix(attention.q_proj),
        key=read_matrix(attention.k_proj),
        value=read_matrix(attention.v_proj),
        output=read_matrix(attention.o_proj),
        num_heads=attention.num_attention_heads,
        num_key_value_heads=attention.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.head_dim**-0.5,
        rotary=Rotary(frequencies) if attention.use_rope else None,
    )


def _read_block(layer: Any) -> Block:
    return Block(
        attention_norm=read_norm(layer.input_layernorm),
        attention=_read_attention(layer.self_attn),
        feedforward_norm=read_norm(layer.post_attention_layernorm),
        feedforward=FeedForward(
            gate=read_matrix(layer.mlp.gate_proj),
            up=read_matrix(layer.mlp.up_proj),
            down=read_matrix(layer.mlp.down_proj),
            activation="silu",
        ),
    )


def read_smollm3(backbone: Any) -> dict[str, Any]:
    """Reads a `keras_hub.models.SmolLM3Backbone`.

    KerasHub does not look at `layer_types`: all layers attend to the whole text, here as there.
    """
    return {
        "token_embedding": read_matrix(backbone.token_embedding),
        "blocks": tuple(_read_block(layer) for layer in backbone.transformer_layers),
        "final_norm": read_norm(backbone.norm),
    }
