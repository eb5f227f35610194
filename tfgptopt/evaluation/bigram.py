"""A bigram model: the baseline that a trained GPT must beat."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# Windows read for counting, so that memory does not grow with the corpus.
_MOST_TOKENS = 5_000_000
_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def _pairs(dataset: tf.data.Dataset, most: int) -> np.ndarray:
    """Returns pairs of following tokens, int64 `(pairs, 2)`."""
    found, total = [], 0
    for inputs, labels, weights in dataset.as_numpy_iterator():
        real = weights > 0
        found.append(np.stack([inputs["token_ids"][real], labels[real]], axis=1))
        total += len(found[-1])
        if total >= most:
            break
    return np.concatenate(found).astype(np.int64)


def bigram_loss(train: tf.data.Dataset, validation: tf.data.Dataset, vocabulary_size: int) -> float:
    """Returns the held-out loss of a bigram model with Dirichlet smoothing towards unigrams.

    The strength of the smoothing is chosen on the validation data, in favour of the bigram model.

    Args:
        train, validation: Datasets of `({"token_ids", ...}, labels, sample_weight)`.
        vocabulary_size: int. Number of tokens.

    Returns:
        Mean negative log-likelihood per token, in nats.

    Reference: MacKay and Peto, 1995, "A Hierarchical Dirichlet Language Model".
    """
    seen, held_out = _pairs(train, _MOST_TOKENS), _pairs(validation, _MOST_TOKENS)
    unigrams = np.bincount(seen[:, 1], minlength=vocabulary_size) + 1.0
    unigrams /= unigrams.sum()
    firsts = np.bincount(seen[:, 0], minlength=vocabulary_size)
    keys, counts = np.unique(seen[:, 0] * vocabulary_size + seen[:, 1], return_counts=True)
    wanted = held_out[:, 0] * vocabulary_size + held_out[:, 1]
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    joint = np.where(keys[places] == wanted, counts[places], 0)
    context, prior = firsts[held_out[:, 0]], unigrams[held_out[:, 1]]
    losses = [-np.log((joint + s * prior) / (context + s)).mean() for s in _STRENGTHS]
    return float(min(losses))
