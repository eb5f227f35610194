"""Stores float constants of a converted file as the integers that training rounded them to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder.spec import Matrix
from tfgptopt.exporting.tflite.cutting import cut_products, operator_code
from tfgptopt.exporting.tflite.packing import product_version
from tfgptopt.file.number_types import INT8, number_type


def _digest(array: np.ndarray) -> bytes:
    # Adding zero makes negative zeros positive: they are equal, and their bytes are not.
    return hashlib.sha256(np.ascontiguousarray(array + np.float32(0)).data).digest()


def store_integers(model: schema.ModelT, matrices: Iterable[Matrix]) -> set[str]:
    """Replaces float constants that equal a quantized matrix, in place.

    Weights of FULLY_CONNECTED become integers with a scale for each output, which runtimes compute
    with. Whatever another operator reads becomes int8 behind a DEQUANTIZE, which runtimes do once,
    when they load: the file is small, the computation is that of floats.

    Args:
        model: A file with float weights.
        matrices: Matrices with integers.

    Returns:
        Names of the matrices that were found.
    """
    known: dict[tuple[tuple[int, ...], bytes], tuple[Matrix, bool]] = {}
    for matrix in matrices:
        values = matrix.floats()
        known[values.shape, _digest(values)] = matrix, False
        known.setdefault((values.shape[::-1], _digest(values.T)), (matrix, True))
    found = set()
    buffers: dict[tuple[str, bool, int], int] = {}
    for graph in model.subgraphs:
        for index, tensor in enumerate(list(graph.tensors)):
            data = model.buffers[tensor.buffer].data
            if tensor.type != schema.TensorType.FLOAT32 or data is None or len(data) < 4:
                continue
            shape = tuple(int(size) for size in tensor.shape)
            if len(shape) != 2:
                continue
            values = np.asarray(data, np.uint8).view(np.float32).reshape(shape)
            match = known.get((shape, _digest(values)))
            if match is not None and _can_replace(model, graph, index, *match):
                _replace(model, graph, index, *match, buffers)
                found.add(match[0].name)
    _drop_unused_buffers(model)
    return found


def _read_as_weights(
    model: schema.ModelT, graph: schema.SubGraphT, index: int, matrix: Matrix, turned: bool
) -> bool:
    """Returns whether only products read a constant, as weights that round their inputs."""
    product = schema.BuiltinOperator.FULLY_CONNECTED
    readers = [x for x in graph.operators if index in list(x.inputs)]
    return (
        matrix.rounds_inputs
        and not turned
        and all(
            model.operatorCodes[x.opcodeIndex].builtinCode == product
            and list(x.inputs).index(index) == 1
            for x in readers
        )
    )


def _can_replace(
    model: schema.ModelT, graph: schema.SubGraphT, index: int, matrix: Matrix, turned: bool
) -> bool:
    """Returns whether a constant can be stored as integers: blocks only as weights of products."""
    return matrix.block_size is None or _read_as_weights(model, graph, index, matrix, turned)


def _replace(
    model: schema.ModelT,
    graph: schema.SubGraphT,
    index: int,
    matrix: Matrix,
    turned: bool,
    buffers: dict[tuple[str, bool, int], int],
) -> None:
    """Stores one constant of a graph as integers."""
    readers = [x for x in graph.operators if index in list(x.inputs)]
    as_weights = _read_as_weights(model, graph, index, matrix, turned)
    number = INT8 if matrix.bits is None or not as_weights else number_type(matrix.bits)
    kind = number.as_tensor_type()

    def stored(one: Matrix) -> tuple[int, schema.QuantizationParametersT]:
        """Returns the buffer of a matrix, and its scales for this graph."""
        key = (one.name, turned, number.bits)
        if key not in buffers:
            values = np.ascontiguousarray(one.values.T if turned else one.values)
            data = number.pack(values).view(np.uint8).reshape(-1)
            model.buffers.append(schema.BufferT(data=data))
            buffers[key] = len(model.buffers) - 1
        return buffers[key], _quantization(model, graph, one, turned)

    def fill(tensor: schema.TensorT, part: Matrix) -> None:
        tensor.type, (tensor.buffer, tensor.quantization) = kind, stored(part)

    tensor = graph.tensors[index]
    if as_weights and matrix.activation_blocks > 1:
        cut_products(model, graph, index, matrix, fill)
        return
    if as_weights:
        fill(tensor, matrix)
        for reader in readers:
            reader.builtinOptions.asymmetricQuantizeInputs = True
            code = model.operatorCodes[reader.opcodeIndex]
            code.version = max(code.version, product_version(matrix))
        return
    buffer, quantization = stored(matrix)
    graph.tensors.append(
        schema.TensorT(
            shape=tensor.shape,
            type=kind,
            buffer=buffer,
            quantization=quantization,
            name=matrix.name,
            hasRank=True,
        )
    )
    tensor.buffer = 0
    graph.operators.insert(
        0,
        schema.OperatorT(
            opcodeIndex=operator_code(model, schema.BuiltinOperator.DEQUANTIZE, 5),
            inputs=[len(graph.tensors) - 1],
            outputs=[index],
        ),
    )


def _quantization(
    model: schema.ModelT, graph: schema.SubGraphT, matrix: Matrix, turned: bool
) -> schema.QuantizationParametersT:
    """Returns the scales of a weight, those of blocks as a tensor that is added to the graph."""
    assert matrix.scale is not None
    if matrix.block_size is None:
        return schema.QuantizationParametersT(
            scale=matrix.scale,
            zeroPoint=np.zeros(matrix.scale.size, np.int64),
            quantizedDimension=1 if turned else 0,
        )
    data = matrix.scale.astype(np.float16).reshape(-1).view(np.uint8)
    model.buffers.append(schema.BufferT(data=data))
    graph.tensors.append(
        schema.TensorT(
            shape=list(matrix.scale.shape),
            type=schema.TensorType.FLOAT16,
            buffer=len(model.buffers) - 1,
            name=f"{matrix.name}/scale",
            hasRank=True,
        )
    )
    return schema.QuantizationParametersT(
        detailsType=schema.QuantizationDetails.BlockwiseQuantization,
        details=schema.BlockwiseQuantizationT(
            scales=len(graph.tensors) - 1, zeroPoints=-1, blockSize=matrix.block_size
        ),
    )


def _drop_unused_buffers(model: schema.ModelT) -> None:
    """Empties the buffers that no tensor and no metadata points at any more."""
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or []}
    for index, buffer in enumerate(model.buffers):
        if index not in used:
            buffer.data = None


def operators_of_tensorflow(model: schema.ModelT) -> list[str]:
    """Returns the operators of a file that are no builtin ones."""
    return [c.customCode.decode() for c in model.operatorCodes if c.customCode is not None]
