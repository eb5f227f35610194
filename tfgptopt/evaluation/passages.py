"""Passages of held-out text that compression changed most."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_LENGTH, _KEPT = 32, 3


@dataclass(frozen=True)
class ChangedPassage:
    """Tokens that follow each other.

    Attributes:
        tokens: Their texts, or their ids as text without a tokenizer.
        rises: How much more loss each has than in the reference, in nats.
    """

    tokens: tuple[str, ...]
    rises: tuple[float, ...]

    @property
    def rise(self) -> float:
        """Mean over the tokens, in nats."""
        return sum(self.rises) / len(self.rises)


class Changes:
    """Keeps the passages of 32 tokens whose mean loss moved most, without the rest."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, labels: np.ndarray, weights: np.ndarray, rises: np.ndarray) -> None:
        """Looks at windows.

        Args:
            labels: Ids, `(windows, tokens)`.
            weights: Those of the tokens, of the same shape; tokens without weight are passed over.
            rises: How much more loss each has than in the reference, of the same shape.
        """
        for ids, weight, row in zip(labels, weights, rises, strict=True):
            kept = weight > 0
            ids, row = ids[kept], row[kept]
            for first in range(0, len(ids) - _LENGTH // 2 + 1, _LENGTH):
                piece = slice(first, first + _LENGTH)
                self._count += 1
                entry = (abs(float(row[piece].mean())), self._count, ids[piece], row[piece])
                heapq.heappush(self._heap, entry)
                if len(self._heap) > _KEPT:
                    heapq.heappop(self._heap)

    def largest(self, decode: Callable[[list[int]], str] | None) -> tuple[ChangedPassage, ...]:
        """Returns the passages, the most changed one first.

        Args:
            decode: Makes text of ids, or `None`.
        """
        found = []
        for _, _, ids, rises in sorted(self._heap, key=lambda entry: entry[:2], reverse=True):
            texts = [f"{i} " if decode is None else decode([int(i)]) for i in ids]
            found.append(ChangedPassage(tuple(texts), tuple(round(float(x), 4) for x in rises)))
        return tuple(found)
