"""Reads KerasHub's GPT-2."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tfgptopt.decoder.matrices import read_matrix, read_norm
from tfgptopt.decoder.spec import Block, DecoderSpec


def _read_block(layer: Any) -> Block:
    attention = layer._self_attention_layer
    return Block(
        attention_norm=read_norm(layer._self_attention_layer_norm),
        query=read_matrix(attention._query_dense),
        key=read_matrix(attention._key_dense),
        value=read_matrix(attention._value_dense),
        output=read_matrix(attention._output_dense),
        feedforward_norm=read_norm(layer._feedforward_layer_norm),
        up=read_matrix(layer._feedforward_intermediate_dense),
        down=read_matrix(layer._feedforward_output_dense),
    )


def read(backbone: Any) -> DecoderSpec:
    """Reads a `keras_hub.models.GPT2Backbone`, dressed or plain.

    Args:
        backbone: The backbone of a `GPT2CausalLM`.

    Returns:
        `DecoderSpec`.
    """
    positions = keras.ops.convert_to_numpy(backbone.position_embedding.position_embeddings)
    return DecoderSpec(
        family=type(backbone).__name__,
        config=keras.saving.serialize_keras_object(backbone)["config"],
        num_heads=backbone.num_heads,
        head_dim=backbone.hidden_dim // backbone.num_heads,
        context_length=backbone.max_sequence_length,
        activation="gelu_tanh",
        token_embedding=read_matrix(backbone.token_embedding),
        position_embedding=positions.astype(np.float32),
        blocks=tuple(_read_block(layer) for layer in backbone.transformer_layers),
        final_norm=read_norm(backbone.layer_norm),
    )
