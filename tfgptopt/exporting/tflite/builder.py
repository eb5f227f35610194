"""Builds a TFLite file: a model of subgraphs that share buffers, then bytes.

A `Model` holds what the graphs share: weights, operator codes, signatures, metadata. A `Graph`
adds tensors and operators one after the other. Both speak the flatbuffer's own object API.

Reference: the TFLite schema (tensorflow/compiler/mlir/lite/schema/schema.fbs).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder.spec import Matrix
from tfgptopt.exporting.tflite.packing import (
    AlignedBuffer,
    SharedQuantization,
    pack,
)
from tfgptopt.exporting.tflite.sparsity import SharedSparsity, kept_blocks
from tfgptopt.file.number_types import number_type

_TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.bool_): schema.TensorType.BOOL,
}
# What an int8 tensor that is no weight counts in.
_UNIT = np.asarray([1 / 127], np.float32)


class Model:
    """The file: shared buffers, operator codes, graphs with signatures, metadata.

    Args:
        description: Of the file.
        sparse: Whether empty blocks of weights are left out. Defaults to `False`.
        share_equal: Whether weights of equal content share their bytes, as those of two models
            may. Defaults to `False`: it takes time to compare them.
    """

    def __init__(self, description: str, sparse: bool = False, share_equal: bool = False) -> None:
        self._share_equal = share_equal
        self._description = description
        self.sparse = sparse
        self._sparsities: dict[int, tuple[np.ndarray, tuple[int, SharedSparsity] | None]] = {}
        self._buffers = [AlignedBuffer(b"")]  # Buffer 0 is empty by convention.
        self._by_key: dict[Hashable, int] = {}
        self._weights: dict[int, tuple[np.ndarray, int]] = {}
        self._quantizations: dict[int, SharedQuantization] = {}
        self._zeros: dict[tuple[int, int], int] = {}
        self._as_blocks: dict[int, Matrix] = {}
        self._codes: dict[tuple[int, int], int] = {}
        self._graphs: list[tuple[str | None, Graph]] = []
        self._branches: dict[Hashable, int] = {}
        self._metadata: list[schema.MetadataT] = []

    def buffer(self, data: bytes | np.ndarray, key: Hashable = None) -> int:
        """Adds bytes, or finds those added under the same key, and returns their index."""
        if key is not None and key in self._by_key:
            return self._by_key[key]
        self._buffers.append(AlignedBuffer(data))
        if key is not None:
            self._by_key[key] = len(self._buffers) - 1
        return len(self._buffers) - 1

    def weight(self, values: np.ndarray, bits: int | None) -> int:
        """Adds a weight once, however many graphs ask, and returns the index of its buffer."""
        if id(values) not in self._weights:
            data = np.ascontiguousarray(values) if bits is None else number_type(bits).pack(values)
            key = hashlib.sha256(data.data).digest() if self._share_equal else None
            # The array is kept, so that no other one can get its id.
            self._weights[id(values)] = (values, self.buffer(data, key))
        return self._weights[id(values)][1]

    def sparse_weight(self, values: np.ndarray) -> tuple[int, SharedSparsity] | None:
        """Adds the blocks of a weight that are not zero, once.

        Returns:
            The index of the buffer and where the blocks are, or `None` if the file is to hold
            dense weights only, or there are too few empty blocks.
        """
        if not self.sparse:
            return None
        if id(values) not in self._sparsities:
            kept = kept_blocks(values)
            found = None
            if kept is not None:
                blocks = values.reshape(*kept.shape, -1)[kept]
                found = self.buffer(np.ascontiguousarray(blocks)), SharedSparsity(kept)
            self._sparsities[id(values)] = (values, found)
        return self._sparsities[id(values)][1]

    def quantization(self, scale: np.ndarray) -> SharedQuantization:
        """Returns the scales of a weight, one for each row; the same array means the same ones."""
        if id(scale) not in self._quantizations:
            self._quantizations[id(scale)] = SharedQuantization(scale, self._zeros)
        return self._quantizations[id(scale)]

    def block_scales(self, scale: np.ndarray) -> int:
        """Adds the scales of blocks as float16, once, and returns the index of their buffer."""
        if id(scale) not in self._weights:
            self._weights[id(scale)] = (scale, self.buffer(scale.astype(np.float16)))
        return self._weights[id(scale)][1]

    def block_rows(self, matrix: Matrix) -> Matrix:
        """Returns a matrix with each block as a row of its own, the same arrays for all graphs."""
        key = id(matrix.values)
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

    def branch(self, key: Hashable, make: Callable[[Graph], None]) -> int:
        """Adds a graph that others call, once for each key, and returns its index."""
        if key not in self._branches:
            self._branches[key] = len(self._graphs)
            graph = Graph(self)
            self._graphs.append((None, graph))
            make(graph)
        return self._branches[key]

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
            subgraphs=[graph.pack(name or "branch") for name, graph in self._graphs],
            signatureDefs=[
                graph.signature(name, index)
                for index, (name, graph) in enumerate(self._graphs)
                if name is not None
            ],
            metadata=self._metadata,
        )
        return pack(model)


class Tensor:
    """A tensor of a graph: its index, shape and dtype."""

    def __init__(self, index: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
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
        self._constants: dict[Hashable, Tensor] = {}

    @property
    def sparse(self) -> bool:
        """Whether empty blocks of weights are left out."""
        return self._model.sparse

    def branch(
        self,
        key: Hashable,
        like: Sequence[Tensor],
        make: Callable[[Graph, list[Tensor]], Tensor],
    ) -> int:
        """Adds a graph of its own for a branch, once in the file for each key.

        Args:
            key: What tells it from other branches.
            like: Its inputs have the shapes of these.
            make: Adds operators to the new graph; returns what it gives.

        Returns:
            The index by which a conditional operator calls it.
        """

        def fill(graph: Graph) -> None:
            inputs = [graph.input(str(i), x.shape, x.dtype) for i, x in enumerate(like)]
            graph.output("result", make(graph, inputs))

        return self._model.branch(key, fill)

    def _add(
        self,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        name: str | None,
        buffer: int = 0,
        tensor_type: int | None = None,
        quantization: SharedQuantization | schema.QuantizationParametersT | None = None,
        sparsity: SharedSparsity | None = None,
        free: Sequence[int] = (),
    ) -> Tensor:
        if quantization is None and np.dtype(dtype) == np.int8:
            quantization = self._model.quantization(_UNIT)
        signature = [-1 if axis in free else size for axis, size in enumerate(shape)]
        self._tensors.append(
            schema.TensorT(
                shape=list(shape),
                shapeSignature=signature if free else None,
                type=_TYPES[np.dtype(dtype)] if tensor_type is None else tensor_type,
                buffer=buffer,
                name=name,
                quantization=quantization,
                sparsity=sparsity,
                hasRank=True,
            )
        )
        return Tensor(len(self._tensors) - 1, tuple(shape), dtype)

    def input(
        self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, free: Sequence[int] = ()
    ) -> Tensor:
        """Adds an input of the signature.

        Args:
            name: Its name.
            shape: Its shape.
            dtype: Its dtype.
            free: Axes that the file says to have any size. Defaults to none.
        """
        self._inputs[name] = self._add(shape, dtype, name, free=free)
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
            bits: Of integers; `number_types` has those that there are.
            scale: float32 array, one for each row of `values`, or for each block of each row.
            block_size: How many entries of a row share a scale; `None` for all.
        """
        key = ("weight", id(values))
        if key in self._constants:
            return self._constants[key]
        quantization, tensor_type = None, None
        if bits is not None and scale is not None:
            tensor_type = number_type(bits).as_tensor_type()
            quantization = self._quantization(scale, block_size)
        buffer = self._model.weight(values, bits)
        tensor = self._add(values.shape, values.dtype, name, buffer, tensor_type, quantization)
        self._constants[key] = tensor
        return tensor

    def _quantization(
        self, scale: np.ndarray, block_size: int | None
    ) -> SharedQuantization | schema.QuantizationParametersT:
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
        dtype: npt.DTypeLike = np.float32,
        options: object = None,
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
