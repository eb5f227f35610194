"""Held-out loss of a Keras model and of an exported file, on the same windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.terminal.progress import track


def perplexity(loss: float) -> float:
    """Returns the perplexity of a mean loss in nats per token."""
    return math.exp(min(loss, 700.0))


def keras_loss(model: keras.Model, dataset: tf.data.Dataset) -> float:
    """Returns the mean loss of a causal LM over the tokens that have weight.

    Args:
        model: A Keras model from `{"token_ids", "padding_mask"}` to logits.
        dataset: Batches of `(inputs, labels, sample_weight)`.

    Returns:
        Negative log-likelihood per token, in nats.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def batch_loss(
        inputs: dict[str, tf.Tensor], labels: tf.Tensor, weights: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        logits = tf.cast(model(inputs, training=False), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(losses * weights), tf.reduce_sum(weights)

    sums = [[float(x) for x in batch_loss(*batch)] for batch in _shown(dataset)]
    loss, weight = np.sum(sums, axis=0)
    return float(loss / weight)


def tflite_loss(lm: TFLiteCausalLM, dataset: tf.data.Dataset) -> float:
    """Returns the mean loss of an exported file, scored through its own signatures.

    Args:
        lm: The loaded file.
        dataset: Batches of `(inputs, labels, sample_weight)`, rows no longer than the context.

    Returns:
        Negative log-likelihood per token, in nats.
    """
    total = count = 0.0
    for inputs, labels, weights in _shown(dataset):
        for tokens, targets, weight in zip(
            np.asarray(inputs["token_ids"]), np.asarray(labels), np.asarray(weights), strict=True
        ):
            if weight.any():
                length = int(np.nonzero(weight)[0][-1]) + 1
                row = [*tokens[:length].tolist(), int(targets[length - 1])]
                logs = lm.score(row).astype(np.float64)
                total -= float((logs * weight[:length]).sum())
                count += float(weight.sum())
    return total / count


def _shown(dataset: tf.data.Dataset) -> Iterator[Any]:
    """Yields batches, and shows how many are done."""
    count = int(dataset.cardinality())
    return track(dataset, "Measuring the loss", count if count > 0 else None)
