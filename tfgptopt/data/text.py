"""Lets distillation and shrinking read text, as a causal LM of KerasHub does."""

from __future__ import annotations

from typing import Any

import keras_hub
import numpy as np
import tensorflow as tf


def is_text(data: Any) -> bool:
    """Returns whether data is strings: a dataset of them, a list, or an array."""
    if isinstance(data, tf.data.Dataset):
        specs = tf.nest.flatten(data.element_spec)
        return len(specs) == 1 and getattr(specs[0], "dtype", None) == tf.string
    if isinstance(data, str):
        return True
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(item, str) for item in data)
    if isinstance(data, tf.Tensor):
        return bool(data.dtype == tf.string)
    return isinstance(data, np.ndarray) and data.dtype.kind in "USO"


def as_tokens(
    data: Any, preprocessor: keras_hub.models.CausalLMPreprocessor | None, batch_size: int | None
) -> tf.data.Dataset:
    """Returns text as batches of `(inputs, labels, sample_weight)`.

    Args:
        data: See `is_text`; a dataset has to be in batches.
        preprocessor: That of a causal LM of KerasHub.
        batch_size: int. Texts in a batch, for lists and arrays. `None` is 32.

    Raises:
        ValueError: If there is no preprocessor.
    """
    if preprocessor is None:
        raise ValueError(
            "Received text, but the model has no preprocessor to make tokens of it. Give data "
            "of ({'token_ids', 'padding_mask'}, labels, sample_weight)."
        )
    if isinstance(data, tf.data.Dataset):
        parallel = data.map(preprocessor, num_parallel_calls=tf.data.AUTOTUNE)
        return parallel.prefetch(tf.data.AUTOTUNE)
    texts = [data] if isinstance(data, str) else list(data)
    return tf.data.Dataset.from_tensor_slices(preprocessor(texts)).batch(batch_size or 32)
