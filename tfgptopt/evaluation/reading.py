"""Text as an artifact reads it, row by row: only what is asked for, and little of it held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.evaluation.artifacts import Artifact, InParts

# Logits of a text, float32 `(tokens, vocabulary)` each, which follow each other.
Parts = Iterable[np.ndarray]


def logits_behind(artifact: Artifact, ids: Sequence[int], first: int = 0) -> Parts:
    """Returns the logits behind tokens of one text.

    Args:
        artifact: What is asked.
        ids: The text.
        first: Number of the first token whose logits are wanted. Defaults to `0`.
    """
    if isinstance(artifact, InParts):
        return artifact.parts(list(ids), first)
    tokens = tf.constant([list(ids)], tf.int32)
    inputs = {"token_ids": tokens, "padding_mask": tf.ones_like(tokens)}
    return (np.asarray(artifact.logits(inputs))[0, first:],)


def spans_of(weights: np.ndarray) -> list[slice]:
    """Returns the part of each row that has all of its tokens with weight, `(rows, tokens)`."""
    places = [np.flatnonzero(row) for row in weights]
    return [slice(int(x[0]), int(x[-1]) + 1) if len(x) else slice(0, 0) for x in places]


def rows_of(
    artifact: Artifact, inputs: Mapping[str, Any], spans: Sequence[slice]
) -> Iterator[Parts]:
    """Yields the logits of a part of each row of a batch.

    Args:
        artifact: What is asked. One that gives logits in parts reads what lies before a part
            without the head, and nothing behind it.
        inputs: `{"token_ids", "padding_mask"}`.
        spans: The parts.
    """
    if isinstance(artifact, InParts):
        for ids, span in zip(np.asarray(inputs["token_ids"]), spans, strict=True):
            yield artifact.parts(ids[: span.stop].tolist(), span.start) if span.stop else ()
    else:
        whole = np.asarray(artifact.logits(dict(inputs)))
        yield from ((logits[span],) for logits, span in zip(whole, spans, strict=True))


class Held:
    """Holds the logits of a batch, in memory that the next batch is given again."""

    def __init__(self) -> None:
        self._rooms: dict[int, np.ndarray] = {}

    def hold(self, rows: Iterable[Parts], spans: Sequence[slice]) -> list[np.ndarray]:
        """Returns the logits of each row in one array.

        Args:
            rows: What `rows_of` gave.
            spans: As it got them.
        """
        return [
            self._join(number, parts, span.stop - span.start)
            for number, (parts, span) in enumerate(zip(rows, spans, strict=True))
        ]

    def _join(self, number: int, parts: Parts, count: int) -> np.ndarray:
        position, room = 0, np.empty((0, 0), np.float32)
        for part in parts:
            if len(part) == count:
                return part
            if position == 0:
                room = self._rooms.get(number, room)
                if len(room) < count or room.shape[1] != part.shape[1]:
                    room = self._rooms[number] = np.empty((count, part.shape[1]), np.float32)
            room[position : position + len(part)] = part
            position += len(part)
        return room[:count]
