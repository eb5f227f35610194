"""Calibration data as batches of inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model.types import Data

_SHORT = 24


class Batches(list[Any]):
    """Inputs of a model, batch by batch: what `batches_of` has read already."""


def batches_of(data: Data) -> Batches:
    """Returns the inputs of each batch of a dataset, without labels and weights.

    Args:
        data: A `tf.data.Dataset` or another iterable of batches, or arrays, which are cut into
            batches of 32: `inputs`, or a tuple `(inputs, labels, weights)`, as a batch may be too.
            Inputs are an array, or a dictionary or a tuple of arrays. What this function returned
            is returned as it is.

    Returns:
        The inputs of the model.

    Raises:
        ValueError: If there is no batch, a batch has no rows, or the dataset never ends.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "The calibration dataset repeats forever. Give a finite one: `dataset.take(16)`."
        )
    if not isinstance(data, Iterable):
        raise ValueError(f"Calibration data is a tf.data.Dataset or arrays. Received: {data!r}")
    if isinstance(data, np.ndarray | tf.Tensor | dict | tuple):
        inputs = _cut(data[0] if isinstance(data, tuple) and data else data)
    else:
        inputs = [batch[0] if isinstance(batch, tuple) else batch for batch in data]
    if not inputs or any(0 in tf.shape(leaf) for x in inputs for leaf in tf.nest.flatten(x)):
        raise ValueError(f"The calibration data is empty. Received: {data!r}")
    return Batches(inputs)


def with_start(model: keras.Layer, batches: Batches) -> Batches:
    """Returns batches whose texts begin as those that a model is given in use.

    What goes into layers behind a start token can be hundreds of times as large as elsewhere.

    Args:
        model: The model. If its preprocessor puts a start token in front of texts, so does this.
        batches: Inputs. A text that does not begin with the token gets it, and loses its last one.

    Returns:
        The batches, or the same ones where there is nothing to do.
    """
    preprocessor = getattr(model, "preprocessor", None)
    start = getattr(getattr(preprocessor, "tokenizer", None), "start_token_id", None)
    if start is None or not getattr(preprocessor, "add_start_token", False):
        return batches
    return Batches([_started(batch, start) for batch in batches])


def _started(batch: Any, start: int) -> Any:
    tokens = batch.get("token_ids") if isinstance(batch, dict) else None
    if tokens is None or len(np.shape(tokens)) != 2:
        return batch
    tokens = np.asarray(tokens)
    moved = np.concatenate([np.full_like(tokens[:, :1], start), tokens[:, :-1]], axis=1)
    started = np.where(tokens[:, :1] == start, tokens, moved)
    return {**batch, "token_ids": tf.convert_to_tensor(started)}


def first_row(batch: Data) -> Any:
    """Returns one row of a batch, and of rows of tokens the first few."""
    leaves = tf.nest.flatten(batch)
    alike = {tuple(np.shape(leaf)) for leaf in leaves}
    ints = isinstance(batch, dict) or leaves[0].dtype in ("int32", "int64")
    if len(alike) == 1 and len(next(iter(alike))) == 2 and ints:
        return tf.nest.map_structure(lambda leaf: leaf[:1, :_SHORT], batch)
    return tf.nest.map_structure(lambda leaf: leaf[:1], batch)


def rows_of(batch: Data) -> int:
    """Returns how many tokens a batch has, or vectors where it has floats."""
    leaf = tf.convert_to_tensor(tf.nest.flatten(batch)[0])
    shape = leaf.shape if leaf.dtype.is_integer else leaf.shape[:-1]
    return int(np.prod(shape))


def _cut(arrays: Any) -> list[Any]:
    """Returns arrays as batches of 32 rows."""
    rows = max((len(leaf) for leaf in tf.nest.flatten(arrays)), default=0)
    return [
        tf.nest.map_structure(lambda leaf, at=at: leaf[at : at + 32], arrays)
        for at in range(0, rows, 32)
    ]
