"""What KerasHub's families compute beyond their layouts: windows, caps, scalings, ALiBi."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import keras_hub
import numpy as np

from tfgptopt.decoder.experts import MIXTURE_ARITHMETIC
from tfgptopt.decoder.gemma import GEMMA_ARITHMETIC
from tfgptopt.decoder.reader import Arithmetic
from tfgptopt.decoder.reading import alibi_slopes, as_floats, read_rotary
from tfgptopt.decoder.rotary import Rotary
from tfgptopt.decoder.spec import Attention
from tfgptopt.decoder.windows import mistral_window, qwen3_window, qwen_window


def _check_norms_first(block: keras.Layer) -> None:
    if not block.normalize_first:
        raise ValueError(f"{block.path}: only norms before the branches can be exported.")


def _bloom(block: keras.Layer, attention: Attention) -> Attention:
    return replace(attention, alibi=alibi_slopes(attention.num_heads))


def _falcon(block: keras.Layer, attention: Attention) -> Attention:
    # Falcon adds the bias before it scales the products.
    return replace(attention, alibi=alibi_slopes(attention.num_heads) * attention.scale)


def _gpt_neo_x_rotary(attention: keras.Layer, rotary: Any, head_dim: int) -> Rotary:
    # With a cache, KerasHub 0.32 turns the query of each new token as if it stood at position 0.
    # The file computes what the model's own call and its training compute.
    return read_rotary(rotary, attention.rotary_dim)


def _phi3_rotary(attention: keras.Layer, rotary: Any, head_dim: int) -> Rotary:
    """Reads rotations of any scaling.

    With "su" scaling KerasHub turns by other angles as soon as a text is longer than the model was
    pretrained with. A cache holds turned keys, so the file takes the angles for its whole context:
    the long ones if the context is longer than that.
    """
    if not hasattr(rotary, "inverese_freq_short_factor"):
        return read_rotary(rotary, head_dim)
    plain = np.asarray(rotary._get_inverse_freq(head_dim))
    return Rotary(
        frequencies=plain / np.asarray(rotary.inverese_freq_short_factor, np.float32),
        magnitude=float(rotary.embedding_scaling_factor),
        long_frequencies=plain / np.asarray(rotary.inverese_freq_long_factor, np.float32),
        original_length=rotary.pretraining_sequence_length,
    )


def _smollm3_rotary(attention: keras.Layer, rotary: Any, head_dim: int) -> Rotary | None:
    # KerasHub does not look at `layer_types`: all layers attend to the whole text, here as there.
    frequencies = as_floats(rotary.inv_freq)
    if attention.use_rope and 2 * frequencies.size != head_dim:
        raise ValueError(
            f"SmolLM3 with partial_rotary_factor={attention.partial_rotary_factor} cannot be "
            "exported: KerasHub itself computes it with 1.0 only."
        )
    return Rotary(frequencies) if attention.use_rope else None


_NORMS_FIRST = Arithmetic(check_block=_check_norms_first)

# Llama and Llama 3 add nothing: KerasHub ignores their `rope_position_scaling_factor`.
ARITHMETIC: dict[type, Arithmetic] = {
    keras_hub.models.BloomBackbone: Arithmetic(activation="gelu_tanh", attention=_bloom),
    keras_hub.models.FalconBackbone: Arithmetic(attention=_falcon),
    keras_hub.models.GPT2Backbone: _NORMS_FIRST,
    keras_hub.models.GPTNeoXBackbone: Arithmetic(rotary=_gpt_neo_x_rotary),
    keras_hub.models.MistralBackbone: Arithmetic(attention=mistral_window),
    keras_hub.models.OPTBackbone: _NORMS_FIRST,
    keras_hub.models.Phi3Backbone: Arithmetic(rotary=_phi3_rotary),
    keras_hub.models.Qwen3Backbone: Arithmetic(attention=qwen3_window),
    keras_hub.models.QwenBackbone: Arithmetic(attention=qwen_window),
    keras_hub.models.SmolLM3Backbone: Arithmetic(activation="silu", rotary=_smollm3_rotary),
    **GEMMA_ARITHMETIC,
    **MIXTURE_ARITHMETIC,
}
