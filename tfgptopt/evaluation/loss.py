"""Held-out loss of a Keras model and of an exported file, on the same windows."""

from __future__ import annotations

import math

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.generation import TFLiteCausalLM


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

    @tf.function(reduce_retracing=True)
    def batch_loss(
        inputs: dict[str, tf.Tensor], labels: tf.Tensor, weights: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        logits = tf.cast(model(inputs, training=False), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(losses * weights), tf.reduce_sum(weights)

    sums = [[float(x) for x in batch_loss(*batch)] for batch in dataset]
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
    for inputs, labels, weights in dataset.as_numpy_iterator():
        for tokens, targets, weight in zip(inputs["token_ids"], labels, weights, strict=True):
            real = int((weight > 0).sum())
            if real:
                row = [*tokens[:real].tolist(), int(targets[real - 1])]
                total -= float(lm.score(row).astype(np.float64).sum())
                count += real
    return total / count
