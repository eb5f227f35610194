"""DecoderSpec: one plain description of a GPT, and the readers that write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import keras_hub

from tfgptopt.decoder import bloom, gemma, gpt2, gpt_neo_x, llama, smollm3
from tfgptopt.decoder.spec import (
    Attention,
    Block,
    DecoderSpec,
    FeedForward,
    Matrix,
    Norm,
    Rotary,
)

__all__ = [
    "Attention",
    "Block",
    "DecoderSpec",
    "FeedForward",
    "Matrix",
    "Norm",
    "Rotary",
    "check_readable",
    "has_reader",
    "read_decoder",
]

_READERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    keras_hub.models.BloomBackbone: bloom.read_bloom,
    keras_hub.models.FalconBackbone: bloom.read_falcon,
    keras_hub.models.GPT2Backbone: gpt2.read_gpt2,
    keras_hub.models.GPTNeoXBackbone: gpt_neo_x.read_gpt_neo_x,
    keras_hub.models.Gemma3Backbone: gemma.read_gemma3,
    keras_hub.models.GemmaBackbone: gemma.read_gemma,
    keras_hub.models.Llama3Backbone: llama.read_llama,
    keras_hub.models.LlamaBackbone: llama.read_llama,
    keras_hub.models.MistralBackbone: llama.read_mistral,
    keras_hub.models.OPTBackbone: gpt2.read_opt,
    keras_hub.models.Phi3Backbone: llama.read_phi3,
    keras_hub.models.Qwen3Backbone: llama.read_qwen3,
    keras_hub.models.QwenBackbone: llama.read_qwen,
    keras_hub.models.SmolLM3Backbone: smollm3.read_smollm3,
}


def _why_unreadable(model: keras.Layer) -> str | None:
    """Returns why no reader fits a model, or `None` if one does."""
    backbone = getattr(model, "backbone", model)
    if type(backbone) not in _READERS:
        return f"there is no reader for {type(backbone).__name__}"
    if model is not backbone and not isinstance(model, keras_hub.models.CausalLM):
        return f"{type(model).__name__} is no causal language model"
    # A layer of somebody else may compute anything.
    known = ("keras", "keras_hub", "tfgptopt")
    for layer in (model, *model._flatten_layers(include_self=False)):
        if type(layer).__module__.split(".")[0] not in known:
            return f"it has a layer of its own, {type(layer).__name__} '{layer.path or layer.name}'"
    return None


def has_reader(model: keras.Layer) -> bool:
    """Returns whether a model is of a family with a reader."""
    return _why_unreadable(model) is None


def check_readable(model: keras.Layer) -> None:
    """Raises unless the model's family has a reader.

    Raises:
        ValueError: If it has none, with the reason.
    """
    reason = _why_unreadable(model)
    if reason:
        families = ", ".join(sorted(f.__name__.removesuffix("Backbone") for f in _READERS))
        raise ValueError(
            f"Cannot describe {type(model).__name__} as a decoder: {reason}. Known families of "
            f"KerasHub: {families}."
        )


def read_decoder(model: keras.Layer) -> DecoderSpec:
    """Reads a Keras model as a `DecoderSpec`.

    Args:
        model: A causal LM of KerasHub, or its backbone, dressed or plain. Families with a reader:
            Bloom, Falcon, Gemma 1 to 3, GPT-2, GPT-NeoX, Llama, Mistral, OPT, Phi-3, Qwen 2 and 3,
            SmolLM3.

    Returns:
        `DecoderSpec` with the weights as training rounds them.

    Raises:
        ValueError: If the family has no reader, or its configuration cannot be exported.

    Example:

    ```python
    print(read_decoder(keras_hub.models.GemmaCausalLM.from_preset("gemma_2b_en")))
    ```
    """
    check_readable(model)
    backbone: Any = getattr(model, "backbone", model)
    parts = _READERS[type(backbone)](backbone)
    return DecoderSpec(
        family=type(backbone).__name__,
        config=keras.saving.serialize_keras_object(backbone)["config"],
        **parts,
    )
