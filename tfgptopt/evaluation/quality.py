"""How well models predict held-out text, with intervals, and how far they are from a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.evaluation.artifacts import Artifact
from tfgptopt.evaluation.loss import perplexity
from tfgptopt.evaluation.passages import ChangedPassage, Changes
from tfgptopt.evaluation.texts import Windowed
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
        kl: Kullback-Leibler divergence from the reference, in nats per token; `None` without one,
            or one of the same tokens.
        agreement: Share of tokens at which both find the same one likeliest, or `None`.
        change: Perplexity divided by the reference's, less 1, or `None`.
        tokens: How many tokens were predicted.
        intervals: Of these numbers, by name; that of `change` is paired: the same windows of both.
        domains: The same of each domain alone, if the text has several.
        changed: Passages whose loss differs most from the reference's.
    """

    loss: float
    bits_per_byte: float | None
    accuracy: float
    top5_accuracy: float
    kl: float | None = None
    agreement: float | None = None
    change: float | None = None
    tokens: int = 0
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    domains: Mapping[str, Quality] = field(default_factory=dict)
    changed: tuple[ChangedPassage, ...] = ()

    @property
    def perplexity(self) -> float:
        """Perplexity."""
        return perplexity(self.loss)


def compare_quality(
    artifacts: Mapping[str, Artifact],
    data: Data | Windowed,
    reference: str | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> dict[str, Quality]:
    """Measures artifacts of one tokenizer on the same windows.

    Args:
        artifacts: Names to artifacts.
        data: Batches of `({"token_ids", "padding_mask"}, labels, sample_weight)`, or `Windowed`.
        reference: Name of the one that the others are compared with. Defaults to `None`: none.
        decode: Makes text of ids, for bits per byte. Defaults to `None`.

    Returns:
        Names to `Quality`.

    Raises:
        ValueError: If there are no tokens with weight.
    """
    windowed = data if isinstance(data, Windowed) else Windowed(data)
    sums: dict[str, list[np.ndarray]] = {name: [] for name in artifacts}
    changes = {name: Changes() for name in artifacts if reference and name != reference}
    sizes: list[int] = []
    count = int(windowed.batches.cardinality())
    shown = track(windowed.batches, "Measuring quality", count if count > 0 else None)
    for inputs, labels, weights in shown:
        weights = tf.cast(weights, tf.float32)
        known = artifacts[reference].logits(inputs) if reference else None
        for name, artifact in artifacts.items():
            own = artifact.logits(inputs) if known is None or name != reference else known
            alike = known is not None and known.shape[-1] == own.shape[-1]
            found, rise = _sums(
                own, labels, weights, known if alike and name != reference else None
            )
            sums[name].append(found.numpy())
            if alike and name in changes:
                changes[name].add(np.asarray(labels), np.asarray(weights), rise.numpy())
        if decode is not None and windowed.sizes is None:
            sizes += _bytes(decode, np.asarray(labels), np.asarray(weights))
    stacked = {name: np.concatenate(found).astype(np.float64) for name, found in sums.items()}
    total = next(iter(stacked.values()))[:, _WEIGHT].sum() if stacked else 0
    if not total:
        raise ValueError("`data` has no tokens with weight: nothing can be measured.")
    bytes_ = windowed.sizes
    if bytes_ is None and decode is not None:
        bytes_ = np.asarray(sizes, np.float64)
    known_sums = stacked.get(reference) if reference else None
    found = {
        name: _with_domains(one, known_sums, bytes_, windowed.domains)
        for name, one in stacked.items()
    }
    for name, change in changes.items():
        found[name] = replace(found[name], changed=change.largest(decode))
    return found


@tf.function(reduce_retracing=True, autograph=False)
def _sums(
    logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, known: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns what is summed over each window, float32 `(batch, 6)`, and how much more loss each
    token has than in the reference; without one, the model is its own."""
    labels = tf.cast(labels, tf.int32)
    at_label = tf.gather(logits, labels, batch_dims=2)
    total = tf.reduce_logsumexp(logits, axis=-1)
    rank = tf.reduce_sum(tf.cast(logits > at_label[..., None], tf.int32), axis=-1)
    loss = total - at_label
    kl, same, rise = tf.zeros_like(loss), tf.ones_like(loss), tf.zeros_like(loss)
    if known is not None:
        own = tf.nn.log_softmax(known)
        kl = total + tf.reduce_sum(tf.exp(own) * (own - logits), axis=-1)
        same = tf.cast(tf.argmax(logits, -1) == tf.argmax(known, -1), tf.float32)
        rise = loss + tf.gather(own, labels, batch_dims=2)
    among = [tf.cast(rank < most, tf.float32) for most in (1, _TOP)]
    each = (tf.ones_like(weights), loss, *among, kl, same)
    return tf.stack([tf.reduce_sum(one * weights, axis=-1) for one in each], axis=-1), rise


def _bytes(
    decode: Callable[[list[int]], str], labels: np.ndarray, weights: np.ndarray
) -> list[int]:
    """Returns how many bytes of text the tokens with weight are, of each window."""
    rows = [row[weight > 0].tolist() for row, weight in zip(labels, weights, strict=True)]
    return [len(decode(row).encode()) if row else 0 for row in rows]


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
        found["kl"] = np.maximum(sums[..., _KL], 0.0) / weight
        found["agreement"] = sums[..., _SAME] / weight
        found["change"] = np.exp((sums[..., _LOSS] - known[..., _LOSS]) / weight) - 1
    return found


def _with_domains(
    sums: np.ndarray,
    known: np.ndarray | None,
    sizes: np.ndarray | None,
    domains: tuple[str, ...],
) -> Quality:
    """Returns the numbers of all windows, and of those of each domain if there are several."""
    whole, names = _quality(sums, known, sizes), np.asarray(domains)
    if len(set(domains)) < 2:
        return whole
    parts = {}
    for domain in dict.fromkeys(domains):
        rows = np.flatnonzero(names == domain)
        others = (None if one is None else one[rows] for one in (known, sizes))
        parts[domain] = _quality(sums[rows], *others)
    return replace(whole, domains=parts)


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
    return Quality(**values, tokens=int(sums[:, _WEIGHT].sum()), intervals=intervals)
