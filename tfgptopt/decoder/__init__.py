"""DecoderSpec: one plain description of a GPT, and the reader that writes it."""

from __future__ import annotations

from dataclasses import replace

import keras
import keras_hub

from tfgptopt.decoder.kerashub import ARITHMETIC
from tfgptopt.decoder.reader import Arithmetic, read_with
from tfgptopt.decoder.rotary import Rotary
from tfgptopt.decoder.spec import Attention, Block, DecoderSpec, FeedForward, Matrix, Norm
from tfgptopt.families import known_families, layout_of

__all__ = [
    "Arithmetic",
    "Attention",
    "Block",
    "DecoderSpec",
    "FeedForward",
    "Matrix",
    "Norm",
    "Rotary",
    "check_readable",
    "is_decoder_only",
    "read_decoder",
    "read_known",
    "register",
    "why_unreadable",
]

_ARITHMETIC: dict[type, Arithmetic] = dict(ARITHMETIC)


def register(backbone_class: type[keras.Model], arithmetic: Arithmetic) -> None:
    """Says what a family computes beyond the layout that `tfgptopt.families.register` was given.

    Args:
        backbone_class: The class that the layout is registered for.
        arithmetic: Windows, soft caps, scalings and the like. A family without any needs no entry.

    Raises:
        ValueError: If it is no `Arithmetic`.
    """
    if not isinstance(arithmetic, Arithmetic):
        raise ValueError(f"Expected a tfgptopt.decoder.Arithmetic. Received: {arithmetic!r}")
    _ARITHMETIC[backbone_class] = arithmetic


def is_decoder_only(model: keras.Layer) -> bool:
    """Returns whether a model is a causal LM of KerasHub without an encoder in front of it."""
    # There, BART and T5 are causal LMs too.
    models = keras_hub.models
    return isinstance(model, models.CausalLM) and not isinstance(model, models.Seq2SeqLM)


def why_unreadable(model: keras.Layer) -> str | None:
    """Returns why a model cannot be read as a decoder, or `None` if it can."""
    backbone, layout = getattr(model, "backbone", model), layout_of(model)
    if layout is None:
        return f"there is no reader for {type(backbone).__name__}"
    if model is not backbone and not is_decoder_only(model):
        return f"{type(model).__name__} is no causal language model"
    # A layer of somebody else may compute anything, unless the layout answers for it.
    known, described = ("keras", "keras_hub", "tfgptopt"), (type(backbone), *layout.own_layers)
    for layer in (model, *model._flatten_layers(include_self=False)):
        if type(layer).__module__.split(".")[0] not in known and type(layer) not in described:
            return f"it has a layer of its own, {type(layer).__name__} '{layer.path or layer.name}'"
    return None


def check_readable(model: keras.Layer) -> None:
    """Raises unless a model can be read as a decoder.

    Raises:
        ValueError: If it cannot, with the reason.
    """
    reason = why_unreadable(model)
    if reason:
        raise ValueError(
            f"Cannot describe {type(model).__name__} as a decoder: {reason}. Known families of "
            f"KerasHub: {', '.join(known_families())}."
        )


def read_decoder(model: keras.Layer) -> DecoderSpec:
    """Reads a Keras model as a `DecoderSpec`.

    Args:
        model: A causal LM of KerasHub, or its backbone, dressed or plain. Families with a reader:
            Bloom, Falcon, Gemma 1 to 4, Gemma 3n, GPT-2, GPT-NeoX, Llama, Mistral, OPT, Phi-3, Qwen
            2 and 3, SmolLM3; the mixtures GPT-OSS, Mixtral, Qwen MoE, Qwen 3 MoE; and those of
            `tfgptopt.families.register`.

    Returns:
        `DecoderSpec` with the weights as training rounds them.

    Raises:
        ValueError: If the family has no reader, or its configuration cannot be exported.

    Example:

    ```python
    print(read_decoder(gpt))
    ```
    """
    check_readable(model)
    return read_known(model)


def read_known(model: keras.Layer) -> DecoderSpec:
    """Reads a model that `why_unreadable` has nothing against."""
    backbone: keras.Model = getattr(model, "backbone", model)
    layout = layout_of(backbone)
    assert layout is not None
    found = read_with(backbone, layout, _ARITHMETIC.get(type(backbone), Arithmetic()))
    cap = getattr(model, "final_logit_cap", None)  # Gemma 4's, outside of its backbone.
    if cap is not None and found.logit_soft_cap is not None:
        raise ValueError(
            f"{type(model).__name__} caps its logits twice, `final_logit_cap={cap}` behind the "
            f"backbone's {found.logit_soft_cap}: a decoder has one soft cap. Leave one out."
        )
    return found if cap is None else replace(found, logit_soft_cap=float(cap))
