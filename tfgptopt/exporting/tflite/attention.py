"""Attention of a decoder layer on its KV cache.

Keys and values are held by head, `(key-value heads, positions, head_dim)`, with as many positions
as the runtime chooses: to copy the first of many takes time behind long texts.
Query heads that share a key-value head are neighbours, as in KerasHub: nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from tfgptopt.decoder.spec import Attention, Matrix, Norm
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Graph, Tensor
from tfgptopt.exporting.tflite.kv_cache import Held, Rows
from tfgptopt.file import names

# Large enough to vanish in a softmax, small enough to stay finite after a multiplication.
_MASKED = 1e9
# The same for half precision, where LiteRT-LM's mask has -45824: the sum of both is finite.
_MASKED_IN_HALF = 16384.0


def _joined(name: str, parts: Iterable[Matrix]) -> Matrix | None:
    """Returns matrices of one input as one matrix, or `None` if they are not stored alike."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    if len({part.form for part in parts}) > 1:
        return None
    scales = [part.scale for part in parts if part.scale is not None]
    biases = [np.zeros(len(m.values), np.float32) if m.bias is None else m.bias for m in parts]
    return replace(
        parts[0],
        name=name,
        values=np.concatenate([part.values for part in parts]),
        scale=np.concatenate(scales) if scales else None,
        bias=np.concatenate(biases) if any(m.bias is not None for m in parts) else None,
    )


@dataclass(frozen=True, eq=False)
class Projection:
    """What a layer does to make query, key and value, put together once for all signatures.

    Attributes:
        matrices: Those that there are as one, or one by one if they are not stored alike.
        norm: Norm over the heads of queries and keys, gamma of shape `(heads, 1, head_dim)`.
        table: Cosines and sines of all positions, or `None`.
    """

    matrices: tuple[Matrix, ...]
    norm: Norm | None
    table: np.ndarray | None

    @classmethod
    def of(cls, attention: Attention, tables: dict[bytes, np.ndarray], context: int) -> Projection:
        """Puts it together; `tables` holds the tables that layers share."""
        found = (attention.query, attention.key, attention.value)
        parts = tuple(part for part in found if part is not None)
        both = _joined(f"{attention.query.name}+key+value", parts)
        table = None
        if attention.rotary is not None:
            table = attention.rotary.table(context)
            table = tables.setdefault(table.tobytes(), table)
        return cls(parts if both is None else (both,), _norm_of_both(attention), table)


def _norm_of_both(attention: Attention) -> Norm | None:
    """Returns the norms of queries and keys as one over all their heads.

    Raises:
        ValueError: If they are of two kinds.
    """
    first, second = attention.query_norm, attention.key_norm
    if attention.key is not None and (
        (first is None) is not (second is None)
        or (first and second and (first.gamma is None) is not (second.gamma is None))
    ):
        raise ValueError(
            f"Queries and keys must be normed alike, with a scale or without. Received: {first} "
            f"and {second}"
        )
    if first is None:
        return None
    if first.gamma is None:
        return first
    gammas = [first.gamma] * attention.num_heads
    if attention.key is not None:
        assert second is not None and second.gamma is not None
        if (first.kind, first.epsilon) != (second.kind, second.epsilon):
            raise ValueError(f"{first.name} and {second.name} must have the same kind and epsilon.")
        gammas += [second.gamma] * attention.num_key_value_heads
    return Norm(f"{first.name}+key", first.kind, np.stack(gammas)[:, None, :], first.epsilon)


class Positions:
    """What depends on the positions only, and is shared by all layers of a signature.

    Args:
        graph: The graph of the signature.
        length: Tokens read in one call.
        keys: Keys of a layer, `(key-value heads, positions, head_dim)`.
        any_length: Whether `length` stands for any number, found when the graph runs.
        apart: Whether each token belongs to a text of its own.
        mask: What is added to scores for tokens that come later, an input `(1, 1, length,
            positions)`; or `None`: it is found from the positions.
    """

    def __init__(
        self,
        graph: Graph,
        length: int,
        keys: Tensor,
        any_length: bool,
        apart: bool,
        mask: Tensor | None = None,
    ) -> None:
        self.any_length = any_length
        self.apart = apart
        free = (0,) if any_length else ()
        self.indices = graph.input(names.POSITIONS, (length,), np.int32, free)
        # Positions as rows of the cache: the same, unless the first rows are not held.
        self.rows = self.indices
        self.keys = keys
        self._graph = graph
        self._mask = mask
        self._starts: dict[int, list[Tensor]] = {}
        self._biases: dict[object, Tensor] = {}
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}

    def behind_start(self, keys: Tensor) -> Positions:
        """Returns the positions in caches that hold no rows before an input, `window_start`.

        Args:
            keys: Keys of such a layer.
        """
        behind = copy(self)
        start = self._graph.input(names.WINDOW_START, (1,), np.int32)
        behind.rows = op.binary(self._graph, "SUB", self.indices, start)
        behind.keys = keys
        behind._starts, behind._biases = {}, {}
        return behind

    def free(self, axis: int) -> int | None:
        """Returns an axis of `length`, if that is found when the graph runs, or `None`."""
        return axis if self.any_length else None

    def starts(self, heads: int) -> list[Tensor]:
        """Returns where the new rows of each text begin, in a cache of so many heads a text."""
        if heads not in self._starts:
            # Rows follow each other from the first on, whatever the positions of padding are.
            texts = self.indices.shape[0] if self.apart else 1
            starts = [op.row_start(self._graph, self.rows, i, i * heads) for i in range(texts)]
            self._starts[heads] = starts
        return self._starts[heads]

    def bias(self, attention: Attention) -> Tensor:
        """Returns what is added to the scores: very negative where a token may not look.

        The shape is `(1, length, positions)`, or `(heads, length, positions)` with ALiBi. For any
        length it is repeated along the second axis for each head that shares keys. For texts apart
        it is `(length, 1, positions)`, with ALiBi `(length, heads, positions)`.
        """
        alibi = attention.alibi
        copies = attention.num_heads // attention.num_key_value_heads if self.any_length else 1
        key = (attention.window, None if alibi is None else alibi.tobytes(), copies)
        if key not in self._biases:
            mask, make = self._mask, self._make_biases
            parts = make(attention, copies) if mask is None else [self._given(attention, mask)]
            joined = parts[0] if copies == 1 else op.concatenate(self._graph, parts, 1)
            self._biases[key] = joined
        return self._biases[key]

    def _make_biases(self, attention: Attention, copies: int) -> list[Tensor]:
        graph, length = self._graph, self.indices.shape[0]
        rows = op.cast_to_float(graph, self.rows)
        by_row = (length, 1, 1) if self.apart else (1, length, 1)
        rows = op.reshape(graph, rows, by_row, self.free(1))
        shape = (1, 1, self.keys.shape[1])
        columns = op.reshape(graph, op.indices(graph, self.keys, 1), shape, free=2)
        distance = op.binary(graph, "SUB", rows, columns)
        refused = op.binary(graph, "MINIMUM", distance, op.scalar(graph, 0))
        if attention.window is not None and attention.window < self.keys.shape[1]:
            left = op.binary(graph, "SUB", op.scalar(graph, attention.window - 1), distance)
            refused = op.binary(graph, "MINIMUM", refused, left)
        bias = op.binary(graph, "MUL", refused, op.scalar(graph, _MASKED))
        if attention.alibi is None:
            return [bias] * copies
        by_head = (1, -1, 1) if self.apart else (-1, 1, 1)
        slopes = [-attention.alibi[i::copies].reshape(by_head) for i in range(copies)]
        steps = [op.binary(graph, "MUL", distance, graph.constant(one)) for one in slopes]
        return [op.binary(graph, "ADD", step, bias) for step in steps]

    def _given(self, attention: Attention, mask: Tensor) -> Tensor:
        """Returns a mask that is given, with what windows and ALiBi add to it."""
        graph, length, size = self._graph, self.indices.shape[0], self.keys.shape[1]
        bias = op.reshape(graph, mask, (1, length, size))
        window = attention.window if (attention.window or size) < size else None
        if window is None and attention.alibi is None:
            return bias
        rows = op.reshape(graph, op.cast_to_float(graph, self.indices), (1, length, 1))
        columns = np.arange(size, dtype=np.float32).reshape(1, 1, -1)
        distance = op.binary(graph, "SUB", rows, graph.constant(columns))
        if window is not None:
            left = op.binary(graph, "SUB", op.scalar(graph, window - 1), distance)
            left = op.binary(graph, "MAXIMUM", left, op.scalar(graph, -1))
            refused = op.binary(graph, "MINIMUM", left, op.scalar(graph, 0))
            refused = op.binary(graph, "MUL", refused, op.scalar(graph, _MASKED_IN_HALF))
            bias = op.binary(graph, "ADD", bias, refused)
        if attention.alibi is not None:
            slopes = graph.constant(-attention.alibi.reshape(-1, 1, 1))
            bias = op.binary(graph, "ADD", bias, op.binary(graph, "MUL", distance, slopes))
        return bias

    def turn(self, table: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns cosines and signed sines, `(length, size)`, from a table of all positions."""
        if id(table) not in self._turns:
            graph, size = self._graph, table.shape[1]
            rows = op.embedding_lookup(graph, self.indices, graph.weight("rotary", table))
            part = (rows.shape[0], size // 2)
            cosine, sine = (
                op.slice_(graph, rows, (0, at), part, self.free(0)) for at in (0, size // 2)
            )
            minus = op.binary(graph, "MUL", sine, op.scalar(graph, -1))
            self._turns[id(table)] = (
                op.concatenate(graph, [cosine, cosine], -1),
                op.concatenate(graph, [minus, sine], -1),
            )
        return self._turns[id(table)]


def _turned(graph: Graph, x: Tensor, table: np.ndarray, positions: Positions) -> Tensor:
    """Rotates the first features of every head, `(heads, length, head_dim)`."""
    heads, length, head_dim = x.shape
    turn, size, free = positions.turn(table), table.shape[1], positions.free(1)
    half = (heads, length, size // 2)
    halves = [op.slice_(graph, x, (0, 0, at), half, free) for at in (size // 2, 0)]
    ahead = op.slice_(graph, x, (0, 0, 0), (heads, length, size), free)
    turned = op.binary(
        graph,
        "ADD",
        op.binary(graph, "MUL", ahead, turn[0]),
        op.binary(graph, "MUL", op.concatenate(graph, halves, -1), turn[1]),
    )
    if size == head_dim:
        return turned
    rest = op.slice_(graph, x, (0, 0, size), (heads, length, head_dim - size), free)
    return op.concatenate(graph, [turned, rest], -1)


def project(
    graph: Graph, attention: Attention, projection: Projection, x: Tensor, positions: Positions
) -> list[Tensor]:
    """Returns query, key and value of `x`, each `(heads, length, head_dim)`, turned and normed.

    The query alone if the layer has no keys of its own.
    """
    length, size = x.shape[0], attention.head_dim
    queries, keys = attention.num_heads, attention.num_key_value_heads
    keys = 0 if attention.key is None else keys
    values = 0 if attention.value is None else keys
    products = [op.fully_connected(graph, x, matrix) for matrix in projection.matrices]
    both = products[0] if len(products) == 1 else op.concatenate(graph, products, -1)
    if length == 1:
        by_head = op.reshape(graph, both, (queries + keys + values, 1, size))
    else:
        shape = (length, queries + keys + values, size)
        by_head = op.reshape(graph, both, shape, positions.free(0))
        by_head = op.transpose(graph, by_head, (1, 0, 2))
    # Without values of their own, keys are values before they are normed and turned.
    free = positions.free(1)
    value = op.slice_(graph, by_head, (queries + values, 0, 0), (keys, length, size), free)
    if projection.norm is not None or projection.table is not None:
        by_head = op.slice_(graph, by_head, (0, 0, 0), (queries + keys, length, size), free)
    if projection.norm is not None:
        by_head = op.normalize(graph, by_head, projection.norm)
    if projection.table is not None:
        by_head = _turned(graph, by_head, projection.table, positions)
    query = op.slice_(graph, by_head, (0, 0, 0), (queries, length, size), free)
    if keys == 0:
        return [query]
    key = op.slice_(graph, by_head, (queries, 0, 0), (keys, length, size), free)
    if attention.value_norm is not None:
        value = op.normalize(graph, value, attention.value_norm)
    return [query, key, value]


def attend(
    graph: Graph, attention: Attention, query: Tensor, cache: list[Held], positions: Positions
) -> Tensor:
    """Returns the attended values, `(length, heads * head_dim)`."""
    num_heads, tokens, size = query.shape
    if positions.apart:  # Texts are more heads, each with one token.
        query = op.transpose(graph, query, (1, 0, 2))
        query = op.reshape(graph, query, (tokens * num_heads, 1, size))
    keys, values = (held.rows() for held in cache)
    cap, scale = attention.logit_soft_cap, attention.scale
    factor = scale / cap if cap else scale
    if factor != 1.0:
        query = op.binary(graph, "MUL", query, op.scalar(graph, factor))
    alone = query.shape[1] == 1 and num_heads == attention.num_key_value_heads
    if alone:
        scores = _scores_of_one(graph, query, keys)
    else:
        scores = _scores_of_many(graph, query, keys, positions)
    if cap:
        scores = op.binary(graph, "MUL", op.unary(graph, "TANH", scores), op.scalar(graph, cap))
    if positions.apart:
        scores = op.reshape(graph, scores, (tokens, num_heads, scores.shape[2]), free=2)
    scores = op.binary(graph, "ADD", scores, positions.bias(attention))
    weights = _softmax(graph, scores, attention.sinks, positions.apart)
    if alone:
        mixed = _mix_of_one(graph, weights, values)
    else:
        mixed = _mix_of_many(graph, weights, values, query.shape, positions)
    return op.reshape(graph, mixed, (tokens, num_heads * size)) if positions.apart else mixed


def _softmax(graph: Graph, scores: Tensor, sinks: np.ndarray | None, apart: bool) -> Tensor:
    """Returns the softmax over positions; sinks, one for each head, take their share of it."""
    if sinks is None:
        return op.softmax(graph, scores)
    own = graph.constant(sinks.reshape((1, -1, 1) if apart else (-1, 1, 1)))
    first = (*scores.shape[:2], 1)
    if own.shape != first:  # As many as there are rows: LiteRT's delegate broadcasts by adding.
        column = op.slice_(graph, scores, (0, 0, 0), first)
        own = op.binary(graph, "ADD", op.binary(graph, "MUL", column, op.scalar(graph, 0)), own)
    weights = op.softmax(graph, op.concatenate(graph, [own, scores], -1))
    return op.slice_(graph, weights, (0, 0, 1), scores.shape, free=2)


def _scores_of_one(graph: Graph, query: Tensor, keys: Rows) -> Tensor:
    """Scores of one token, `(heads, 1, positions)`: broadcasting does not repack the cache."""
    heads, positions, _ = keys.values.shape
    scores = op.reduce(graph, "SUM", op.binary(graph, "MUL", keys.values, query), 2, keep=False)
    return keys.scale_of_one(graph, op.reshape(graph, scores, (heads, 1, positions), free=2))


def _mix_of_one(graph: Graph, weights: Tensor, values: Rows) -> Tensor:
    heads, positions, size = values.values.shape
    weights = values.scale_of_one(graph, weights)
    weights = op.reshape(graph, weights, (heads, positions, 1), free=1)
    mixed = op.reduce(graph, "SUM", op.binary(graph, "MUL", values.values, weights), 1, keep=False)
    return op.reshape(graph, mixed, (1, heads * size))


def _scores_of_many(graph: Graph, query: Tensor, keys: Rows, positions: Positions) -> Tensor:
    """Scores, `(heads, length, positions)`: one product for the heads that share keys.

    For any length `(key-value heads, heads that share keys * length, positions)`, since a reshape
    finds the size of one axis only.
    """
    heads, length, size = query.shape
    groups, room, _ = keys.values.shape
    shape = (groups, heads // groups * length, size)
    shared = op.reshape(graph, query, shape, positions.free(1))
    scores = op.batch_matmul(graph, shared, keys.scaled(graph), transpose_y=True)
    if positions.any_length:
        return scores
    return op.reshape(graph, scores, (heads, length, room), free=2)


def _mix_of_many(
    graph: Graph, weights: Tensor, values: Rows, shape: tuple[int, ...], positions: Positions
) -> Tensor:
    heads, length, size = shape
    groups, room, _ = values.values.shape
    by_group = op.reshape(graph, weights, (groups, heads // groups * length, room), free=2)
    mixed = op.batch_matmul(graph, by_group, values.scaled(graph))
    if length > 1:
        mixed = op.reshape(graph, mixed, (heads, length, size), positions.free(1))
        mixed = op.transpose(graph, mixed, (1, 0, 2))
    return op.reshape(graph, mixed, (length, heads * size), positions.free(0))
