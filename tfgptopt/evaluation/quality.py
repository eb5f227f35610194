"""How well models predict held-out text, with intervals, and how far they are from a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tfgptopt.evaluation.artifacts import Artifact
from tfgptopt.evaluation.loss import perplexity
from tfgptopt.evaluation.passages import ChangedPassage, Changes
from tfgptopt.evaluation.reading import Held, Parts, rows_of, spans_of
from tfgptopt.evaluation.texts import Windowed
from tfgptopt.generation.scoring import Scores, score_tokens
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
        ValueError: If there are no tokens with weight, or a model does not know one of them, or
            predicts NaN.
    """
    windowed = data if isinstance(data, Windowed) else Windowed(data)
    sums: dict[str, list[np.ndarray]] = {name: [] for name in artifacts}
    changes = {name: Changes() for name in artifacts if reference and name != reference}
    sizes: list[int] = []
    held = Held()
    count = int(windowed.batches.cardinality())
    shown = track(windowed.batches, "Measuring quality", count if count > 0 else None)
    for inputs, *wanted in shown:
        labels, weights = (np.asarray(one) for one in wanted)
        batch = _batch(artifacts, inputs, labels, weights, reference, held)
        for name, values in batch.items():
            weighted = np.concatenate([np.ones((*labels.shape, 1)), values], -1)
            sums[name].append(np.einsum("bts,bt->bs", weighted, weights.astype(np.float64)))
            if name in changes:
                rises = values[..., _LOSS - 1] - batch[str(reference)][..., _LOSS - 1]
                changes[name].add(labels, weights, rises)
        if decode is not None and windowed.sizes is None:
            sizes += _bytes(decode, labels, weights)
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


def _batch(
    artifacts: Mapping[str, Artifact],
    inputs: Mapping[str, Any],
    labels: np.ndarray,
    weights: np.ndarray,
    reference: str | None,
    held: Held,
) -> dict[str, np.ndarray]:
    """Returns what is summed of each token but its weight, `(batch, tokens, 5)`; zeros where no
    token has weight."""
    spans = spans_of(weights)
    known: list[np.ndarray] | None = None
    found = {}
    for name in sorted(artifacts, key=lambda name: name != reference):
        rows: Iterable[Parts] = rows_of(artifacts[name], inputs, spans)
        if name == reference:
            known = held.hold(rows, spans)
            rows = ((one,) for one in known)
        found[name] = np.zeros((*labels.shape, _SAME))
        for row, (parts, span) in enumerate(zip(rows, spans, strict=True)):
            other = None if known is None or name == reference else known[row]
            one = _scored(name, parts, labels[row, span], weights[row, span], other)
            among = [one.likelier < most for most in (1, _TOP)]
            # Without another one, a model is its own.
            apart = (one.divergences, one.alike) if other is not None else (0 * one.losses, 1.0)
            found[name][row, span] = np.stack(
                np.broadcast_arrays(one.losses, *among, *apart), axis=-1
            )
    return found


def _scored(
    name: str, parts: Parts, labels: np.ndarray, weights: np.ndarray, known: np.ndarray | None
) -> Scores:
    """Returns how tokens were predicted.

    Raises:
        ValueError: If the model does not know one of them, or what it predicts is no number.
    """
    try:
        found = score_tokens(parts, labels, known)
    except IndexError:
        raise ValueError(
            f"'{name}' does not know token {labels.max()} of the data: they are of another "
            "tokenizer. Give texts (`read_texts`), which each model reads with its own tokenizer, "
            "and compare bits per byte, which do not depend on it as perplexities do."
        ) from None
    wrong = int((~np.isfinite(found.losses[weights > 0])).sum())
    if wrong:
        raise ValueError(
            f"'{name}' predicts NaN or infinity for {wrong} of {len(labels)} tokens of a window: a "
            "weight is NaN, or 16 bits overflowed. Measure a checkpoint from before that, or "
            "compute in float32."
        )
    return found


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
    if np.isnan(values.get("kl", 0.0)):  # Of other vocabularies.
        values |= {"kl": None, "agreement": None}
    for name, found in over(drawn, 1).items():
        if values[name] is not None:
            low, high = np.percentile(found, ends)
            intervals[name] = (float(low), float(high))
    values.setdefault("bits_per_byte", None)
    return Quality(**values, tokens=int(sums[:, _WEIGHT].sum()), intervals=intervals)
