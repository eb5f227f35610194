"""Turns a TFLite file from objects into bytes, each weight and its scales once."""

from __future__ import annotations

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder.spec import Matrix
from tfgptopt.file.number_types import INT8, number_type

_ALIGNMENT = 16
_FILE_LIMIT = 2**31 - 1
_GRAPHS_ROOM = 2**26


class AlignedBuffer:
    """A buffer of the file whose bytes start at a multiple of 16, as kernels expect."""

    def __init__(self, data: bytes | np.ndarray) -> None:
        self.data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data

    def Pack(self, builder: flatbuffers.Builder) -> int:
        vector = None
        if self.data.size:
            raw = self.data.reshape(-1).view(np.uint8)
            builder.StartVector(1, raw.size, _ALIGNMENT)
            builder.head = builder.head - raw.size
            builder.Bytes[builder.Head() : builder.Head() + raw.size] = raw.data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


class SharedQuantization:
    """Scales of a weight, written once however many graphs use the weight."""

    def __init__(self, scale: np.ndarray, zeros: dict[tuple[int, int], int]) -> None:
        self._scale = np.asarray(scale, np.float32)
        self._shared_zeros = zeros
        self._written: tuple[flatbuffers.Builder, int] | None = None

    def _zeros(self, builder: flatbuffers.Builder, size: int) -> int:
        """Returns zero points of a size, which weights with as many rows share."""
        key = (id(builder), size)
        if key not in self._shared_zeros:
            self._shared_zeros[key] = builder.CreateNumpyVector(np.zeros(size, np.int64))
        return self._shared_zeros[key]

    def Pack(self, builder: flatbuffers.Builder) -> int:
        if self._written is None or self._written[0] is not builder:
            scale = builder.CreateNumpyVector(self._scale)
            zero_point = self._zeros(builder, self._scale.size)
            schema.QuantizationParametersStart(builder)
            schema.QuantizationParametersAddScale(builder, scale)
            schema.QuantizationParametersAddZeroPoint(builder, zero_point)
            self._written = (builder, schema.QuantizationParametersEnd(builder))
        return self._written[1]


def product_version(matrix: Matrix) -> int:
    """Returns the least version of FULLY_CONNECTED that computes with a matrix.

    Raises:
        ValueError: If there is none, of blocks.
    """
    number = number_type(matrix.bits or INT8.bits)
    if matrix.block_size is None or not matrix.rounds_inputs:
        return number.product_version
    if number.blocks_version is None:
        raise ValueError(
            f"{matrix.name}: LiteRT has no product of {number.name} in blocks with inputs that are "
            "rounded. Use one scale for each output, or `activations=None`."
        )
    return number.blocks_version


def pack(model: schema.ModelT) -> memoryview:
    """Returns the bytes of a file, without a copy, its buffers aligned as kernels expect.

    Raises:
        ValueError: If the file would be larger than a flatbuffer can be.
    """
    for i, buffer in enumerate(model.buffers):
        if isinstance(buffer, schema.BufferT):
            data = b"" if buffer.data is None else np.asarray(buffer.data, np.uint8)
            model.buffers[i] = AlignedBuffer(data)
    size = sum(buffer.data.nbytes for buffer in model.buffers)
    if size > _FILE_LIMIT - _GRAPHS_ROOM:
        raise ValueError(
            f"The weights need {size / 2**30:.2f} GiB, and a TFLite file ends at 2 GiB. "
            "Quantize the model first, to Int8() or Int4()."
        )
    # Room for the graphs too: a builder that is full doubles, and copies what it has.
    builder = flatbuffers.Builder(size + _GRAPHS_ROOM)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return memoryview(builder.Bytes)[builder.Head() :]
