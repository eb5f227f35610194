"""The KV cache of a decoder layer: rows of floats, or of int8 integers with a scale each.

An int8 row is held in units of 1/127 of its largest magnitude, which stands beside it as a float.
It is rounded when it is written, whatever it holds: there is nothing to calibrate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Graph, Tensor

CacheDtype = Literal["float32", "int8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = ("float32", "int8")

# Keeps a row of zeros from being divided by zero.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Window:
    """The first positions of the keys, or values, of a layer.

    Attributes:
        rows: float32 `(key-value heads, window, head_dim)`.
        scale: float32 `(key-value heads, window, 1)`, a factor on `rows`, or `None` for 1.
    """

    rows: Tensor
    scale: Tensor | None

    def scaled(self, graph: Graph) -> Tensor:
        """Returns the rows with their scale."""
        return self.rows if self.scale is None else op.binary(graph, "MUL", self.rows, self.scale)

    def scale_of_one(self, graph: Graph, x: Tensor) -> Tensor:
        """Multiplies `(heads, 1, window)`, of one query, by the scale: cheaper than the rows."""
        if self.scale is None:
            return x
        heads, window, _ = self.scale.shape
        return op.binary(graph, "MUL", x, op.reshape(graph, self.scale, (heads, 1, window)))


class Held:
    """The keys, or values, of a layer, as inputs and outputs of a signature.

    Args:
        graph: The graph of the signature.
        name: `"key"` or `"value"`.
        layer: Index of the layer.
        shape: `(key-value heads, context, head_dim)`.
        dtype: `"float32"` or `"int8"`.
    """

    def __init__(
        self, graph: Graph, name: str, layer: int, shape: tuple[int, int, int], dtype: CacheDtype
    ) -> None:
        self._graph = graph
        self._names = [f"{name}_{layer}"]
        self._parts = [graph.input(self._names[0], shape, np.dtype(dtype))]
        if dtype == "int8":
            self._names.append(f"{name}_scale_{layer}")
            self._parts.append(graph.input(self._names[1], (*shape[:2], 1), np.float32))

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

    def window(self, size: int) -> Window:
        """Returns the first `size` positions."""
        parts = [
            op.slice_(self._graph, part, (0, 0, 0), (part.shape[0], size, part.shape[2]))
            for part in self._parts
        ]
        if len(parts) == 1:
            return Window(parts[0], None)
        return Window(op.dequantize(self._graph, parts[0]), parts[1])
