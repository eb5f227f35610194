"""Writes a SavedModel that TensorFlow loads and calls without Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import tensorflow as tf

from tfgptopt.exporting.writing import replacing


def _generate_function(model: Any) -> Any:
    """Returns greedy generation as a TensorFlow function of padded prompts."""
    sampler = keras_hub.samplers.GreedySampler()
    end = getattr(getattr(model.preprocessor, "tokenizer", None), "end_token_id", None)
    stop = None if end is None else (int(end),)

    def generate(token_ids: Any, padding_mask: Any) -> Any:
        previous = getattr(model, "sampler", None)
        model.sampler = sampler
        try:
            inputs = {"token_ids": token_ids, "padding_mask": tf.cast(padding_mask, tf.bool)}
            outputs = model.generate_step(inputs, stop_token_ids=stop)
        finally:
            model.sampler = previous
        return {
            "token_ids": tf.cast(outputs["token_ids"], tf.int32),
            "padding_mask": tf.cast(outputs["padding_mask"], tf.int32),
        }

    return generate


def write_saved_model(model: keras.Model, target: Path) -> None:
    """Writes a model, dressed or plain, as a SavedModel.

    Args:
        model: A built Keras model.
        target: The folder.
    """
    archive = keras.export.ExportArchive()
    archive.track(model)
    if isinstance(model, keras_hub.models.CausalLM):
        names = ("token_ids", "padding_mask")
        spec = {name: tf.TensorSpec((None, None), tf.int32, name=name) for name in names}
        archive.add_endpoint("serve", lambda inputs: model(inputs, training=False), [spec])
        archive.add_endpoint("generate", _generate_function(model), list(spec.values()))
    else:
        archive.add_endpoint("serve", model.__call__, _signature(model))
    with replacing(target) as temporary:
        archive.write_out(str(temporary), verbose=False)


def _signature(model: keras.Model) -> list[Any]:
    """Returns the inputs of a model with a free batch size."""
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"'{model.name}' has no declared inputs: call it on a batch, or build it as a "
            "Sequential or Functional model, before exporting."
        )

    def spec(tensor: Any) -> tf.TensorSpec:
        return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name=tensor.name)

    # A Sequential that was never called has inputs, but no `input`.
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return [keras.tree.map_structure(spec, inputs)]
