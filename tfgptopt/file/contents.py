"""What takes the bytes of a file: its constants, by the part of the model they are of."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

from ai_edge_litert import schema_py_generated as schema

from tfgptopt.terminal.tables import across_layers

_TYPES = {value: name.lower() for name, value in vars(schema.TensorType).items() if name.isupper()}
_REST = "norms, biases, constants"


@dataclass(frozen=True)
class Part:
    """Constants of a file that stand in the same place of each layer.

    Attributes:
        name: Where they stand, the number of the layer left out.
        number: `"int8"`, `"float32"` and so on.
        count: How many there are.
        elements: How many numbers they have together.
        size: Bytes, scales included.
    """

    name: str
    number: str
    count: int
    elements: int
    size: int

    @property
    def bits(self) -> float:
        """Bits for each number, scales included."""
        return 8.0 * self.size / max(self.elements, 1)


def parts_of(path: str | Path, begin: int = 0) -> list[Part]:
    """Returns what takes the bytes of a file, matrices first, in the order of the file.

    Args:
        path: A whole file.
        begin: Where its TFLite model begins. Defaults to 0.

    Returns:
        List of `Part`. What they do not account for is the graph and what the file says of itself.
    """
    found: dict[tuple[str, str], Part] = {}
    with (
        Path(path).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        model = schema.Model.GetRootAs(data, begin)
        seen: set[int] = set()
        graph = model.Subgraphs(0)
        of_blocks = {scales for i in range(graph.TensorsLength())
                     if (scales := _block_scales(graph.Tensors(i))) is not None}  # fmt: skip
        for i in range(graph.TensorsLength()):
            tensor = graph.Tensors(i)
            size = _size(model, tensor)
            if i in of_blocks or size <= 1 or tensor.Buffer() in seen:
                continue
            seen.add(tensor.Buffer())
            scales = _block_scales(tensor)
            part = _part(
                tensor, size + (0 if scales is None else _size(model, graph.Tensors(scales)))
            )
            before = found.get((part.name, part.number))
            if before is not None:
                part = Part(part.name, part.number, before.count + 1,
                            before.elements + part.elements, before.size + part.size)  # fmt: skip
            found[part.name, part.number] = part
    return sorted(found.values(), key=lambda part: part.name == _REST)


def _size(model: schema.Model, tensor: schema.Tensor) -> int:
    buffer = model.Buffers(tensor.Buffer())
    return int(buffer.DataLength() or buffer.Size())


def _block_scales(tensor: schema.Tensor) -> int | None:
    """Returns which tensor holds the scales of blocks, if a tensor has such."""
    quantization = tensor.Quantization()
    kind = schema.QuantizationDetails.BlockwiseQuantization
    if quantization is None or quantization.DetailsType() != kind:
        return None
    details, blocks = quantization.Details(), schema.BlockwiseQuantization()
    blocks.Init(details.Bytes, details.Pos)
    return int(blocks.Scales())


def _part(tensor: schema.Tensor, size: int) -> Part:
    shape = [tensor.Shape(axis) for axis in range(tensor.ShapeLength())]
    quantization = tensor.Quantization()
    scales = 0 if quantization is None else 4 * quantization.ScaleLength()
    elements = math.prod(shape)
    name = across_layers((tensor.Name() or b"").decode())
    matrix = len(shape) > 1 and "/" in name
    number = _TYPES.get(tensor.Type(), "?")
    return Part(name if matrix else _REST, number, 1, elements, size + scales)
