"""What logits say of the tokens that came: how likely they were, and how many were likelier."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

# Numbers that are looked at together: a part that stays in a core's cache.
_AT_ONCE = 1 << 18
# Fewer numbers are not worth threads of their own.
_THREADED = 1 << 22
_MOST_THREADS = 8


@dataclass(frozen=True)
class Scores:
    """How tokens were predicted, each.

    Attributes:
        losses: Negative log-likelihoods, in nats.
        likelier: How many tokens had a larger logit.
        divergences: Kullback-Leibler divergences from another model, in nats; NaN without one of
            the same vocabulary.
        alike: Whether both find the same token likeliest.
    """

    losses: np.ndarray
    likelier: np.ndarray
    divergences: np.ndarray
    alike: np.ndarray


def score_tokens(
    logits: Iterable[np.ndarray], tokens: np.ndarray, known: np.ndarray | None = None
) -> Scores:
    """Looks at logits once, as they come, and keeps none.

    Args:
        logits: float32 arrays `(tokens, vocabulary)`, which follow each other.
        tokens: Ids that came, as many as there are rows in all.
        known: Logits of another model, `(tokens, its vocabulary)`. Defaults to `None`: none.

    Returns:
        `Scores`, arrays of `(tokens,)`.
    """
    count, position = len(tokens), 0
    found = Scores(
        np.empty(count), np.empty(count, int), np.full(count, np.nan), np.zeros(count, bool)
    )
    for whole in logits:
        end = position + len(whole)
        theirs = None
        if known is not None and known.shape[1] == whole.shape[1]:
            theirs = known[position:end]
        _score_all(whole, tokens[position:end], theirs, _part(found, slice(position, end)))
        position = end
    return found


def _part(scores: Scores, rows: slice) -> Scores:
    """Returns views of some rows."""
    return Scores(
        scores.losses[rows], scores.likelier[rows], scores.divergences[rows], scores.alike[rows]
    )


def _score_all(
    logits: np.ndarray, tokens: np.ndarray, known: np.ndarray | None, found: Scores
) -> None:
    """Writes down what rows say; many numbers are shared out to threads."""
    count, vocabulary = logits.shape
    size = max(1, min(count, _AT_ONCE // vocabulary))

    def score(first: int, end: int) -> None:
        scratch = np.empty((2, size, vocabulary), np.float32)
        for begin in range(first, end, size):
            rows = slice(begin, min(begin + size, end))
            theirs = None if known is None else known[rows]
            _score(logits[rows], tokens[rows], theirs, scratch, _part(found, rows))

    threads = min(os.cpu_count() or 1, _MOST_THREADS, logits.size // _THREADED)
    if threads < 2:
        score(0, count)
        return
    ends = np.linspace(0, count, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(score, ends[:-1], ends[1:]))


def _score(
    own: np.ndarray,
    tokens: np.ndarray,
    known: np.ndarray | None,
    scratch: np.ndarray,
    found: Scores,
) -> None:
    """Writes down what some rows say, with room for twice as many numbers."""
    values, shares = scratch[:, : len(own)]
    total, chosen = _total(own, values), own[np.arange(len(own)), tokens]
    found.losses[:] = total - chosen
    rows = zip(own, chosen, strict=True)
    found.likelier[:] = [np.count_nonzero(row > value) for row, value in rows]
    if known is not None:
        before = _total(known, shares)
        np.subtract(known, own, out=values)
        values *= shares
        gaps = values.sum(-1, dtype=np.float32) / shares.sum(-1, dtype=np.float32)
        found.divergences[:] = total - before + gaps
        found.alike[:] = own.argmax(-1) == known.argmax(-1)


def _total(logits: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the sums of exponentials of rows, float64; leaves the
    exponentials, divided by the largest of a row, in `shares`."""
    largest = logits.max(-1, keepdims=True)
    np.exp(np.subtract(logits, largest, out=shares), out=shares)
    sums = shares.sum(-1, dtype=np.float32).astype(np.float64)
    total: np.ndarray = np.log(sums) + largest[:, 0]
    return total
