"""The KV cache of a decoder layer: rows of floats, or of int8 integers with a scale each.

An int8 row is held in units of 1/127 of its largest magnitude, which stands beside it as a float.
It is rounded when it is written, whatever it holds: there is nothing to calibrate.
"""

from __future__ import annotations

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
    """

    def __init__(
        self,
        graph: Graph,
        name: str,
        layer: int,
        shape: tuple[int, int, int],
        dtype: CacheDtype,
        growing: bool,
    ) -> None:
        free = (1,) if growing else ()
        self._graph = graph
        self._names = [names.in_layer(part, layer) for part in names.parts_of(name, dtype)]
        self._parts = [graph.input(self._names[0], shape, np.dtype(dtype), free)]
        if dtype == "int8":
            self._parts.append(graph.input(self._names[1], (*shape[:2], 1), np.float32, free))

    @property
    def tensor(self) -> Tensor:
        """The rows as they are held."""
        return self._parts[0]

    def write(self, rows: Tensor, start: Tensor) -> None:
        """Writes new rows, `(key-value heads, length, head_dim)`, and names the outputs."""
        graph, parts = self._graph, [rows]
        if len(self._parts) > 1:
            largest = op.reduce(graph, "REDUCE_MAX", op.unary(graph, "ABS", rows), 2, keep=True)
            scale = op.binary(graph, "ADD", largest, op.scalar(graph, _SMALLEST))
            parts = [op.quantize(graph, op.binary(graph, "DIV", rows, scale)), scale]
        self._parts = [
            op.dynamic_update_slice(graph, held, part, start)
            for held, part in zip(self._parts, parts, strict=True)
        ]
        for name, held in zip(self._names, self._parts, strict=True):
            graph.output(name, held)

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
    kinds = ((shape[2], np.dtype(dtype)), (1, np.dtype(np.float32)))
    rooms = []
    for name, (size, kind) in zip(names.parts_of(names.ROOM, dtype), kinds, strict=False):
        rooms.append(graph.input(name, (shape[0], 1, size), kind))
    for both in (names.KEYS, names.VALUES):
        for name, room in zip(names.parts_of(both, dtype), rooms, strict=True):
            held = graph.input(name, (*shape[:2], room.shape[2]), room.dtype)
            graph.output(name, op.concatenate(graph, [held, room], 1))
