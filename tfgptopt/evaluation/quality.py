"""How well models predict held-out text, with intervals, and how far they are from a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras_hub
import numpy as np
import tensorflow as tf

from tfgptopt.evaluation.loss import perplexity
from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import track

Interval = tuple[float, float]
_SAMPLES, _OUTSIDE = 1000, 5.0
_TOP = 5
# What is summed over the tokens of a window.
_WEIGHT, _LOSS, _RIGHT, _AMONG, _KL, _SAME = range(6)


@dataclass(frozen=True)
class Quality:
    """What a model makes of held-out text.

    Intervals hold 95 % of what windows drawn anew would give (bootstrap).

    Attributes:
        loss: Negative log-likelihood per token, in nats.
        bits_per_byte: The same per byte of the text, in bits, which models of other tokenizers can
            be compared by; `None` without a tokenizer.
        accuracy: Share of tokens that were the likeliest.
        top5_accuracy: Share of tokens among the five likeliest.
        kl: Kullback-Leibler divergence from the reference, in nats per token; `None` without one.
        agreement: Share of tokens at which both find the same one likeliest, or `None`.
        change: Perplexity divided by the reference's, less 1, or `None`.
        intervals: Of these numbers, by name; that of `change` is paired: the same windows of both.
    """

    loss: float
    bits_per_byte: float | None
    accuracy: float
    top5_accuracy: float
    kl: float | None = None
    agreement: float | None = None
    change: float | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Perplexity."""
        return perplexity(self.loss)


def compare_quality(
    models: Mapping[str, keras_hub.models.CausalLM | TFLiteCausalLM],
    data: Data,
    reference: str | None = None,
    detokenize: Callable[[list[int]], str] | None = None,
) -> dict[str, Quality]:
    """Measures models on the same windows.

    Args:
        models: Names to models of one tokenizer.
        data: Batches of `({"token_ids", "padding_mask"}, labels, sample_weight)`.
        reference: Name of the model that the others are compared with. Defaults to `None`: none.
        detokenize: Makes text of ids, for bits per byte. Defaults to `None`.

    Returns:
        Names to `Quality`.

    Raises:
        ValueError: If there are no tokens with weight.
    """
    calls = {name: _logits_of(model) for name, model in models.items()}
    sums: dict[str, list[np.ndarray]] = {name: [] for name in models}
    sizes: list[int] = []
    count = int(data.cardinality())
    for inputs, labels, weights in track(data, "Measuring quality", count if count > 0 else None):
        weights = tf.cast(weights, tf.float32)
        logits = {name: call(inputs) for name, call in calls.items()}
        known = logits[reference] if reference else None
        for name, own in logits.items():
            alike = known is not None and known.shape[-1] == own.shape[-1]
            found = _sums(own, labels, weights, known if alike else own)
            sums[name].append(found.numpy())
        if detokenize is not None:
            sizes += _bytes(detokenize, np.asarray(labels), np.asarray(weights))
    stacked = {name: np.concatenate(found).astype(np.float64) for name, found in sums.items()}
    total = next(iter(stacked.values()))[:, _WEIGHT].sum() if stacked else 0
    if not total:
        raise ValueError("`data` has no tokens with weight: nothing can be measured.")
    bytes_ = np.asarray(sizes, np.float64) if detokenize is not None else None
    known_sums = stacked.get(reference) if reference else None
    return {name: _quality(found, known_sums, bytes_) for name, found in stacked.items()}


def _logits_of(
    model: keras_hub.models.CausalLM | TFLiteCausalLM,
) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """Returns a function from a batch to logits, float32 `(batch, length, vocabulary)`."""
    if not isinstance(model, TFLiteCausalLM):

        @tf.function(reduce_retracing=True)
        def call(inputs: dict[str, tf.Tensor]) -> tf.Tensor:
            return tf.cast(model(inputs, training=False), tf.float32)

        return call  # type: ignore[no-any-return]

    def rows(inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        tokens = np.asarray(inputs["token_ids"])
        return tf.convert_to_tensor(np.stack([model.logits(row.tolist()) for row in tokens]))

    return rows


@tf.function(reduce_retracing=True)
def _sums(logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
    """Returns what is summed over each window, float32 `(batch, 6)`."""
    labels = tf.cast(labels, tf.int32)
    logs, own = tf.nn.log_softmax(logits), tf.nn.log_softmax(known)
    loss = -tf.gather(logs, labels, batch_dims=2)
    at_label = tf.gather(logits, labels, batch_dims=2)[..., None]
    rank = tf.reduce_sum(tf.cast(logits > at_label, tf.int32), axis=-1)
    kl = tf.reduce_sum(tf.exp(own) * (own - logs), axis=-1)
    same = tf.argmax(logits, -1) == tf.argmax(known, -1)
    each = (
        tf.ones_like(weights),
        loss,
        tf.cast(rank < 1, tf.float32),
        tf.cast(rank < _TOP, tf.float32),
        kl,
        tf.cast(same, tf.float32),
    )
    return tf.stack([tf.reduce_sum(one * weights, axis=-1) for one in each], axis=-1)


def _bytes(
    detokenize: Callable[[list[int]], str], labels: np.ndarray, weights: np.ndarray
) -> list[int]:
    """Returns how many bytes of text the tokens with weight are, of each window."""
    rows = [row[weight > 0].tolist() for row, weight in zip(labels, weights, strict=True)]
    return [len(detokenize(row).encode()) if row else 0 for row in rows]


def _numbers(
    sums: np.ndarray, known: np.ndarray | None, sizes: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Returns the numbers by name from sums over windows, `(..., 6)`."""
    weight = sums[..., _WEIGHT]
    found = {
        "loss": sums[..., _LOSS] / weight,
        "accuracy": sums[..., _RIGHT] / weight,
        "top5_accuracy": sums[..., _AMONG] / weight,
    }
    if sizes is not None:
        found["bits_per_byte"] = sums[..., _LOSS] / np.log(2) / np.maximum(sizes, 1)
    if known is not None:
        found["kl"] = sums[..., _KL] / weight
        found["agreement"] = sums[..., _SAME] / weight
        found["change"] = np.exp((sums[..., _LOSS] - known[..., _LOSS]) / weight) - 1
    return found


def _quality(sums: np.ndarray, known: np.ndarray | None, sizes: np.ndarray | None) -> Quality:
    """Returns the numbers with their intervals."""

    def over(rows: np.ndarray, axis: int) -> dict[str, np.ndarray]:
        return _numbers(
            sums[rows].sum(axis),
            None if known is None else known[rows].sum(axis),
            None if sizes is None else sizes[rows].sum(axis),
        )

    windows = np.flatnonzero(sums[:, _WEIGHT])
    values: dict[str, Any] = {name: float(x) for name, x in over(windows, 0).items()}
    # The same draws for all models, so that differences are paired.
    drawn = np.random.default_rng(0).choice(windows, (_SAMPLES, len(windows)))
    ends = (_OUTSIDE / 2, 100 - _OUTSIDE / 2)
    intervals = {}
    for name, found in over(drawn, 1).items():
        low, high = np.percentile(found, ends)
        intervals[name] = (float(low), float(high))
    values.setdefault("bits_per_byte", None)
    return Quality(**values, intervals=intervals)
