"""DecoderSpec: one plain description of a GPT, and the readers that write it."""

from __future__ import annotations

import keras
import keras_hub

from tfgptopt.decoder import gpt2
from tfgptopt.decoder.spec import Block, DecoderSpec, Matrix, Norm

__all__ = ["Block", "DecoderSpec", "Matrix", "Norm", "check_readable", "read_decoder"]


def check_readable(model: keras.Layer) -> None:
    """Raises unless the model's family has a reader.

    Raises:
        ValueError: If it has none.
    """
    backbone = getattr(model, "backbone", model)
    if type(backbone) is not keras_hub.models.GPT2Backbone:
        raise ValueError(
            f"Cannot write a decoder with a KV cache for {type(model).__name__}: there is a reader "
            "for keras_hub.models.GPT2CausalLM only. Export a SavedModel instead: give a folder, "
            "not a name that ends with .tflite."
        )


def read_decoder(model: keras.Layer) -> DecoderSpec:
    """Reads a Keras model as a `DecoderSpec`.

    Args:
        model: A `keras_hub.models.GPT2CausalLM` or its backbone.

    Returns:
        `DecoderSpec` with the weights as training rounds them.

    Raises:
        ValueError: If the model's family has no reader.
    """
    check_readable(model)
    return gpt2.read(getattr(model, "backbone", model))
