"""Builds a TFLite file: a model of subgraphs that share buffers, then bytes.

A `Model` holds what the graphs share: weights, operator codes, signatures, metadata. A `Graph`
adds tensors and operators one after the other. Both speak the flatbuffer's own object API.

Reference: the TFLite schema (tensorflow/compiler/mlir/lite/schema/schema.fbs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder.spec import Matrix
from tfgptopt.exporting.tflite.sparsity import SharedSparsity, kept_blocks

_TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
}
# What an int8 tensor that is no weight counts in.
_UNIT = np.asarray([1 / 127], np.float32)
_ALIGNMENT = 16
_FILE_LIMIT = 2**31 - 1
_GRAPHS_ROOM = 2**26


class _AlignedBuffer:
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


class _SharedQuantization:
    """Scales of a weight, written once however many graphs use the weight."""

    def __init__(self, scale: np.ndarray, zeros: dict[Any, int]) -> None:
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


def pack_int4(integers: np.ndarray) -> np.ndarray:
    """Packs int4 values two to a byte, the first in the low half.

    Args:
        integers: int8 array with values in `[-8, 7]`.

    Returns:
        uint8 array of half the size, rounded up.
    """
    flat = integers.reshape(-1).astype(np.uint8) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << 4)


def pack(model: schema.ModelT) -> memoryview:
    """Returns the bytes of a file, without a copy, its buffers aligned as kernels expect.

    Raises:
        ValueError: If the file would be larger than a flatbuffer can be.
    """
    for i, buffer in enumerate(model.buffers):
        if isinstance(buffer, schema.BufferT):
            data = b"" if buffer.data is None else np.asarray(buffer.data, np.uint8)
            model.buffers[i] = _AlignedBuffer(data)
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


class Model:
    """The file: shared buffers, operator codes, graphs with signatures, metadata."""

    def __init__(self, description: str, sparse: bool = False) -> None:
        self._description = description
        self._sparse = sparse
        self._sparsities: dict[int, tuple[np.ndarray, tuple[int, SharedSparsity] | None]] = {}
        self._buffers = [_AlignedBuffer(b"")]  # Buffer 0 is empty by convention.
        self._by_key: dict[Any, int] = {}
        self._weights: dict[int, tuple[np.ndarray, int]] = {}
        self._quantizations: dict[int, _SharedQuantization] = {}
        self._zeros: dict[Any, int] = {}
        self._as_blocks: dict[Any, Matrix] = {}
        self._codes: dict[tuple[int, int], int] = {}
        self._graphs: list[tuple[str, Graph]] = []
        self._metadata: list[schema.MetadataT] = []

    def buffer(self, data: bytes | np.ndarray, key: Any = None) -> int:
        """Adds bytes, or finds those added under the same key, and returns their index."""
        if key is not None and key in self._by_key:
            return self._by_key[key]
        self._buffers.append(_AlignedBuffer(data))
        if key is not None:
            self._by_key[key] = len(self._buffers) - 1
        return len(self._buffers) - 1

    def weight(self, values: np.ndarray, bits: int | None) -> int:
        """Adds a weight once, however many graphs ask, and returns the index of its buffer."""
        if id(values) not in self._weights:
            data = pack_int4(values) if bits == 4 else np.ascontiguousarray(values)
            # The array is kept, so that no other one can get its id.
            self._weights[id(values)] = (values, self.buffer(data))
        return self._weights[id(values)][1]

    def sparse_weight(self, values: np.ndarray) -> tuple[int, SharedSparsity] | None:
        """Adds the blocks of a weight that are not zero, once.

        Returns:
            The index of the buffer and where the blocks are, or `None` if the file is to hold
            dense weights only, or there are too few empty blocks.
        """
        if not self._sparse:
            return None
        if id(values) not in self._sparsities:
            kept = kept_blocks(values)
            found = None
            if kept is not None:
                blocks = values.reshape(*kept.shape, -1)[kept]
                found = self.buffer(np.ascontiguousarray(blocks)), SharedSparsity(kept)
            self._sparsities[id(values)] = (values, found)
        return self._sparsities[id(values)][1]

    def quantization(self, scale: np.ndarray) -> _SharedQuantization:
        """Returns the scales of a weight, one for each row; the same array means the same ones."""
        if id(scale) not in self._quantizations:
            self._quantizations[id(scale)] = _SharedQuantization(scale, self._zeros)
        return self._quantizations[id(scale)]

    def block_scales(self, scale: np.ndarray) -> int:
        """Adds the scales of blocks as float16, once, and returns the index of their buffer."""
        if id(scale) not in self._weights:
            self._weights[id(scale)] = (scale, self.buffer(scale.astype(np.float16)))
        return self._weights[id(scale)][1]

    def block_rows(self, matrix: Matrix) -> Matrix:
        """Returns a matrix with each block as a row of its own, the same arrays for all graphs."""
        key = ("blocks", id(matrix.values))
        if key not in self._as_blocks:
            assert matrix.scale is not None
            rows = matrix.values.reshape(-1, matrix.block_size or matrix.inputs)
            self._as_blocks[key] = replace(
                matrix, values=rows, scale=matrix.scale.reshape(-1), block_size=None
            )
        return self._as_blocks[key]

    def operator_code(self, operator: int, version: int) -> int:
        """Returns the index of an operator in the file's table."""
        return self._codes.setdefault((operator, version), len(self._codes))

    def graph(self, signature: str) -> Graph:
        """Adds a graph that is called by a signature."""
        graph = Graph(self)
        self._graphs.append((signature, graph))
        return graph

    def metadata(self, name: str, data: bytes) -> None:
        """Adds a named blob that runtimes can read."""
        self._metadata.append(schema.MetadataT(name=name, buffer=self.buffer(data)))

    def pack(self) -> memoryview:
        """Returns the bytes of the file.

        Raises:
            ValueError: If the file would be larger than a flatbuffer can be.
        """
        model = schema.ModelT(
            version=3,
            description=self._description,
            buffers=self._buffers,
            operatorCodes=[
                schema.OperatorCodeT(
                    builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=version
                )
                for code, version in self._codes
            ],
            subgraphs=[graph.pack(name) for name, graph in self._graphs],
            signatureDefs=[
                graph.signature(name, index) for index, (name, graph) in enumerate(self._graphs)
            ],
            metadata=self._metadata,
        )
        return pack(model)


class Tensor:
    """A tensor of a graph: its index, shape and dtype."""

    def __init__(self, index: int, shape: tuple[int, ...], dtype: Any) -> None:
        self.index = index
        self.shape = shape
        self.dtype = np.dtype(dtype)


class Graph:
    """One subgraph. Each method adds what it is named after."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tensors: list[schema.TensorT] = []
        self._operators: list[schema.OperatorT] = []
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._constants: dict[Any, Tensor] = {}

    def _add(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        name: str | None,
        buffer: int = 0,
        tensor_type: int | None = None,
        quantization: _SharedQuantization | schema.QuantizationParametersT | None = None,
        sparsity: SharedSparsity | None = None,
    ) -> Tensor:
        if quantization is None and np.dtype(dtype) == np.int8:
            quantization = self._model.quantization(_UNIT)
        self._tensors.append(
            schema.TensorT(
                shape=list(shape),
                type=_TYPES[np.dtype(dtype)] if tensor_type is None else tensor_type,
                buffer=buffer,
                name=name,
                quantization=quantization,
                sparsity=sparsity,
                hasRank=True,
            )
        )
        return Tensor(len(self._tensors) - 1, tuple(shape), dtype)

    def input(self, name: str, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """Adds an input of the signature."""
        self._inputs[name] = self._add(shape, dtype, name)
        return self._inputs[name]

    def output(self, name: str, tensor: Tensor) -> None:
        """Names a tensor as an output of the signature."""
        self._outputs[name] = tensor

    def constant(self, values: np.ndarray, name: str = "constant") -> Tensor:
        """Adds a constant; equal ones share their bytes, in this graph and across graphs."""
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            buffer = self._model.buffer(np.ascontiguousarray(values), key=key)
            self._constants[key] = self._add(values.shape, values.dtype, name, buffer)
        return self._constants[key]

    def weight(
        self,
        name: str,
        values: np.ndarray,
        bits: int | None = None,
        scale: np.ndarray | None = None,
        block_size: int | None = None,
    ) -> Tensor:
        """Adds a weight, once in the file however many graphs use it.

        Args:
            name: Name of the tensor.
            values: float32 values, or int8 integers with `bits` and `scale`. The same array object
                means the same bytes.
            bits: 4 or 8 for integers.
            scale: float32 array, one for each row of `values`, or for each block of each row.
            block_size: How many entries of a row share a scale; `None` for all.
        """
        key = ("weight", id(values))
        if key in self._constants:
            return self._constants[key]
        quantization, tensor_type = None, None
        if bits is not None and scale is not None:
            tensor_type = schema.TensorType.INT4 if bits == 4 else schema.TensorType.INT8
            quantization = self._quantization(scale, block_size)
        buffer = self._model.weight(values, bits)
        tensor = self._add(values.shape, values.dtype, name, buffer, tensor_type, quantization)
        self._constants[key] = tensor
        return tensor

    def _quantization(
        self, scale: np.ndarray, block_size: int | None
    ) -> _SharedQuantization | schema.QuantizationParametersT:
        """Returns scales of rows, or those of blocks, which are a tensor of the graph."""
        if block_size is None:
            return self._model.quantization(scale)
        buffer = self._model.block_scales(scale)
        scales = self._add(scale.shape, np.float16, None, buffer)
        return schema.QuantizationParametersT(
            detailsType=schema.QuantizationDetails.BlockwiseQuantization,
            details=schema.BlockwiseQuantizationT(
                scales=scales.index, zeroPoints=-1, blockSize=block_size
            ),
        )

    def block_rows(self, matrix: Matrix) -> Tensor:
        """Adds a matrix with each block of its inputs as a row, which has one scale then."""
        rows = self._model.block_rows(matrix)
        return self.weight(rows.name, rows.values, rows.bits, rows.scale)

    def sparse_weight(self, name: str, values: np.ndarray) -> Tensor | None:
        """Adds a float32 weight without its empty blocks; `None` if it has to be dense."""
        found = self._model.sparse_weight(values)
        if found is None:
            return None
        key = ("weight", id(values))
        if key not in self._constants:
            self._constants[key] = self._add(
                values.shape, values.dtype, name, found[0], sparsity=found[1]
            )
        return self._constants[key]

    def computed_once(self, key: str, compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Returns a tensor that is computed from the inputs of the signature the first time."""
        if key not in self._constants:
            self._constants[key] = compute(self._inputs)
        return self._constants[key]

    def add_operator(
        self,
        operator: str,
        inputs: list[Tensor | None],
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        options: Any = None,
        version: int = 1,
    ) -> Tensor:
        """Adds an operator with one output and returns that."""
        # Without a name: with them, a small model would be larger by a hundredth.
        result = self._add(shape, dtype, None)
        kind = 0
        if options is not None:
            kind = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        code = getattr(schema.BuiltinOperator, operator)
        self._operators.append(
            schema.OperatorT(
                opcodeIndex=self._model.operator_code(code, version),
                inputs=[-1 if tensor is None else tensor.index for tensor in inputs],
                outputs=[result.index],
                builtinOptionsType=kind,
                builtinOptions=options,
            )
        )
        return result

    def pack(self, name: str) -> schema.SubGraphT:
        """Returns the subgraph as the schema has it."""
        return schema.SubGraphT(
            tensors=self._tensors,
            inputs=[tensor.index for tensor in self._inputs.values()],
            outputs=[tensor.index for tensor in self._outputs.values()],
            operators=self._operators,
            name=name,
        )

    def signature(self, name: str, index: int) -> schema.SignatureDefT:
        """Returns the signature that calls this subgraph."""

        def names(tensors: dict[str, Tensor]) -> list[schema.TensorMapT]:
            return [
                schema.TensorMapT(name=key, tensorIndex=tensor.index)
                for key, tensor in tensors.items()
            ]

        return schema.SignatureDefT(
            inputs=names(self._inputs),
            outputs=names(self._outputs),
            signatureKey=name,
            subgraphIndex=index,
        )
