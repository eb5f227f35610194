"""How far a layer looks back, as families of KerasHub have it."""

from __future__ import annotations

from dataclasses import replace

import keras

from tfgptopt.decoder.spec import Attention


def mistral_window(block: keras.Layer, attention: Attention) -> Attention:
    """Returns the attention of a Mistral or Mixtral layer with its window."""
    return replace(attention, window=block.sliding_window)


def qwen_window(block: keras.Layer, attention: Attention) -> Attention:
    """Returns the attention of a Qwen 2 or Qwen MoE layer with its window."""
    window = block.sliding_window_size if block.use_sliding_window_attention else None
    return replace(attention, window=window)


def qwen3_window(block: keras.Layer, attention: Attention) -> Attention:
    """Returns the attention of a Qwen 3 or Qwen 3 MoE layer with its window."""
    return replace(attention, window=block.sliding_window_size or None)
