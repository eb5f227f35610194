"""The KV cache of a decoder layer: rows of floats, or of int8 integers with a scale each.

An int8 row is held in units of 1/127 of its largest magnitude, which stands beside it as a float.
It is rounded when it is written, whatever it holds: there is nothing to calibrate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Graph, Tensor
from tfgptopt.file import names
from tfgptopt.file.metadata import CacheDtype

# Keeps a row of zeros from being divided by zero.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Rows:
    """The keys, or values, of a layer.

    Attributes:
        values: float32 `(key-value heads, positions, head_dim)`.
        scale: float32 `(key-value heads, positions, 1)`, a factor on them, or `None` for 1.
    """

    values: Tensor
    scale: Tensor | None

    def scaled(self, graph: Graph) -> Tensor:
        """Returns the values with their scale."""
        if self.scale is None:
            return self.values
        return op.binary(graph, "MUL", self.values, self.scale)

    def scale_of_one(self, graph: Graph, x: Tensor) -> Tensor:
        """Multiplies `(heads, 1, positions)`, of one query, by the scale: there are fewer."""
        if self.scale is None:
            return x
        return op.binary(graph, "MUL", x, op.reshape(graph, self.scale, x.shape, free=2))


class Held:
    """The keys, or values, of a layer, as inputs and outputs of a signature.

    Args:
        graph: The graph of the signature.
        name: `names.KEYS` or `names.VALUES`.
        layer: Index of the layer.
        shape: `(key-value heads, positions, head_dim)`. Nothing in the graph depends on the
            number of positions: a runtime may resize that axis.
        dtype: `"float32"` or `"int8"`.
        growing: Whether the file says so of that axis.
        texts: How many texts have their rows here, one behind the other along the first axis.
    """

    def __init__(
        self,
        graph: Graph,
        name: str,
        layer: int,
        shape: tuple[int, int, int],
        dtype: CacheDtype,
        growing: bool,
        texts: int,
    ) -> None:
        free = (1,) if growing else ()
        shape = (texts * shape[0], *shape[1:])
        self._graph = graph
        self._names = [names.in_layer(part, layer) for part in names.parts_of(name, dtype)]
        self._parts = [graph.input(self._names[0], shape, np.dtype(dtype), free)]
        if dtype == "int8":
            self._parts.append(graph.input(self._names[1], (*shape[:2], 1), np.float32, free))

    @property
    def tensor(self) -> Tensor:
        """The rows as they are held."""
        return self._parts[0]

    def write(self, rows: Tensor, starts: list[Tensor]) -> None:
        """Writes new rows, and names the outputs.

        Args:
            rows: `(key-value heads, length, head_dim)`.
            starts: Where each text's begin; of several, each has one.
        """
        graph, parts = self._graph, [rows]
        if len(self._parts) > 1:
            largest = op.reduce(graph, "REDUCE_MAX", op.unary(graph, "ABS", rows), 2, keep=True)
            scale = op.binary(graph, "ADD", largest, op.scalar(graph, _SMALLEST))
            parts = [op.quantize(graph, op.binary(graph, "DIV", rows, scale)), scale]
        for i, part in enumerate(parts):
            for text, start in enumerate(starts):
                new = part
                if len(starts) > 1:
                    one = (part.shape[0], 1, part.shape[2])
                    new = op.slice_(graph, part, (0, text, 0), one)
                self._parts[i] = op.dynamic_update_slice(graph, self._parts[i], new, start)
                last = text == len(starts) - 1
                name = self._names[i] if last else names.of_text(self._names[i], text)
                graph.output(name, self._parts[i])

    def rows(self) -> Rows:
        """Returns what is held now."""
        if len(self._parts) == 1:
            return Rows(self._parts[0], None)
        return Rows(op.dequantize(self._graph, self._parts[0]), self._parts[1])


def add_growth(graph: Graph, shape: tuple[int, int, int], dtype: CacheDtype) -> None:
    """Makes a signature that appends positions to the cache of one layer.

    Inputs and outputs have the names of a layer without its number. What is appended is the input
    `room`, for scales `room_scale`, with one position, which a runtime resizes to as many as it
    wants and fills with zeros.

    Args:
        graph: The graph of the signature.
        shape: `(key-value heads, positions, head_dim)`.
        dtype: `"float32"` or `"int8"`.
    """
    rooms = []
    for name, part, kind in _parts(names.ROOM, shape, dtype):
        rooms.append(graph.input(name, (shape[0], 1, part[2]), kind))
    for both in (names.KEYS, names.VALUES):
        for name, room in zip(names.parts_of(both, dtype), rooms, strict=True):
            held = graph.input(name, (*shape[:2], room.shape[2]), room.dtype)
            graph.output(name, op.concatenate(graph, [held, room], 1))


def add_placing(graph: Graph, shape: tuple[int, int, int], texts: int, dtype: CacheDtype) -> None:
    """Makes a signature that puts the cache of one text into that of a batch, for one layer.

    Inputs and outputs have the names of a layer without its number, and those of the one text
    `text_` before them. `start` is where its rows begin in those of the batch.

    Args:
        graph: The graph of the signature.
        shape: `(key-value heads, positions, head_dim)` of one text. A runtime resizes both.
        texts: How many the batch has.
        dtype: `"float32"` or `"int8"`.
    """
    start = graph.input(names.START, (3,), np.int32)
    for both in (names.KEYS, names.VALUES):
        for name, part, kind in _parts(both, shape, dtype):
            held = graph.input(name, (texts * part[0], *part[1:]), kind)
            text = graph.input(f"{names.TEXT}_{name}", part, kind)
            graph.output(name, op.dynamic_update_slice(graph, held, text, start))


def add_reordering(
    graph: Graph, caches: list[tuple[int, int, int]], texts: int, dtype: CacheDtype
) -> None:
    """Makes a signature that gives each text of a batch some rows of another, or its own.

    `parents` int32 `(texts,)` says whose, `rows` int32 which ones, all behind each other.

    Args:
        graph: The graph of the signature.
        caches: `(key-value heads, positions, head_dim)` of each layer.
        texts: How many the batch has.
        dtype: `"float32"` or `"int8"`.
    """
    count = names.moved_rows(caches[0][1])
    parents = graph.input(names.PARENTS, (texts,), np.int32)
    rows = graph.input(names.ROWS, (count,), np.int32)
    start = op.row_start(graph, rows, 0, 0)
    for layer, shape in enumerate(caches):
        for both in (names.KEYS, names.VALUES):
            for name, (heads, positions, size), kind in _parts(both, shape, dtype):
                name = names.in_layer(name, layer)
                held = graph.input(name, (texts * heads, positions, size), kind)
                found = op.gather(graph, held, rows, 1)
                by_text = op.reshape(graph, found, (texts, heads * count * size))
                moved = op.reshape(graph, op.gather(graph, by_text, parents, 0), found.shape)
                graph.output(name, op.dynamic_update_slice(graph, held, moved, start))


def _parts(
    name: str, shape: tuple[int, int, int], dtype: CacheDtype
) -> Iterator[tuple[str, tuple[int, int, int], np.dtype[np.generic]]]:
    """Yields name, shape and dtype of the parts of keys or values."""
    kinds = ((shape[2], np.dtype(dtype)), (1, np.dtype(np.float32)))
    for part, (size, kind) in zip(names.parts_of(name, dtype), kinds, strict=False):
        yield part, (*shape[:2], size), kind
