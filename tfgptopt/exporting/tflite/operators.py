"""The operators that a decoder needs, as functions from tensors to tensors.

Each adds one or a few builtin operators to the graph of its inputs, with shapes inferred.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder.spec import Activation, Matrix, Norm
from tfgptopt.exporting.tflite.builder import Graph, Tensor
from tfgptopt.exporting.tflite.packing import product_version

_BINARY_OPTIONS = {
    "ADD": schema.AddOptionsT,
    "SUB": schema.SubOptionsT,
    "MUL": schema.MulOptionsT,
    "SQUARED_DIFFERENCE": schema.SquaredDifferenceOptionsT,
    "MAXIMUM": schema.MaximumMinimumOptionsT,
    "MINIMUM": schema.MaximumMinimumOptionsT,
    "DIV": schema.DivOptionsT,
}


def binary(graph: Graph, operator: str, left: Tensor, right: Tensor) -> Tensor:
    """Adds an elementwise operator that broadcasts."""
    shape = np.broadcast_shapes(left.shape, right.shape)
    return graph.add_operator(
        operator, [left, right], shape, left.dtype, _BINARY_OPTIONS[operator]()
    )


def scalar(graph: Graph, value: float) -> Tensor:
    """Adds a float32 constant without axes."""
    return graph.constant(np.asarray(value, np.float32))


def reduce(graph: Graph, operator: str, x: Tensor, axis: int, keep: bool) -> Tensor:
    """Adds `MEAN`, `SUM` or `REDUCE_MAX` over one axis."""
    axis %= len(x.shape)
    shape = tuple(1 if i == axis else n for i, n in enumerate(x.shape) if keep or i != axis)
    axes = graph.constant(np.asarray([axis], np.int32))
    options = schema.ReducerOptionsT(keepDims=keep)
    return graph.add_operator(operator, [x, axes], shape, options=options)


def reshape(graph: Graph, x: Tensor, shape: tuple[int, ...], free: int | None = None) -> Tensor:
    """Adds a reshape, or nothing if the shape is right already.

    The size of the axis `free`, if given, is found when the graph runs.
    """
    if x.shape == shape:
        return x
    written = [-1 if axis == free else size for axis, size in enumerate(shape)]
    wanted = graph.constant(np.asarray(written, np.int32))
    options = schema.ReshapeOptionsT(newShape=written)
    return graph.add_operator("RESHAPE", [x, wanted], shape, x.dtype, options)


def transpose(graph: Graph, x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Adds a transpose."""
    shape = tuple(x.shape[axis] for axis in order)
    permutation = graph.constant(np.asarray(order, np.int32))
    return graph.add_operator(
        "TRANSPOSE", [x, permutation], shape, x.dtype, schema.TransposeOptionsT()
    )


def slice_(
    graph: Graph,
    x: Tensor,
    begin: tuple[int, ...],
    size: tuple[int, ...],
    free: int | None = None,
) -> Tensor:
    """Adds a slice, or nothing if it is the whole tensor.

    Of the axis `free`, if given, it takes all, whatever its size is when the graph runs.
    """
    if x.shape == size:
        return x
    starts = graph.constant(np.asarray(begin, np.int32))
    if free is None:
        sizes = graph.constant(np.asarray(size, np.int32))
        options = schema.SliceOptionsT()
        return graph.add_operator("SLICE", [x, starts, sizes], size, x.dtype, options)
    # SLICE wants the same sizes at every run.
    ends = graph.constant(np.add(begin, size).astype(np.int32))
    steps = graph.constant(np.ones(len(size), np.int32))
    options = schema.StridedSliceOptionsT(endMask=1 << free)
    return graph.add_operator("STRIDED_SLICE", [x, starts, ends, steps], size, x.dtype, options)


def embedding_lookup(graph: Graph, ids: Tensor, table: Tensor) -> Tensor:
    """Adds a look-up of table rows; a quantized table gives float32 rows."""
    shape = (*ids.shape, table.shape[1])
    return graph.add_operator("EMBEDDING_LOOKUP", [ids, table], shape, version=3)


def matrix_weight(graph: Graph, matrix: Matrix) -> Tensor:
    """Adds the rows of a matrix as floats or as the integers it was trained to."""
    return graph.weight(matrix.name, matrix.values, matrix.bits, matrix.scale, matrix.block_size)


def _as_floats(graph: Graph, matrix: Matrix) -> Tensor:
    """Adds integer rows that are made floats at each call, for products with float inputs."""
    if matrix.block_size is None:
        integers = matrix_weight(graph, matrix)
        return graph.add_operator("DEQUANTIZE", [integers], integers.shape, version=6)
    rows = graph.block_rows(matrix)
    floats = graph.add_operator("DEQUANTIZE", [rows], rows.shape, version=6)
    return reshape(graph, floats, matrix.values.shape)


def _computed_bias(graph: Graph, bias: Tensor | None, size: int) -> Tensor:
    """Returns a bias that is no constant.

    The XNNPACK delegate takes products whose weights and bias are constants, and crashes on sparse
    weights; LiteRT's own kernel computes them.
    """

    def zero(inputs: dict[str, Tensor]) -> Tensor:
        position = next(tensor for tensor in inputs.values() if tensor.dtype == np.int32)
        first = slice_(graph, position, (0,), (1,))
        return binary(graph, "MUL", cast_to_float(graph, first), scalar(graph, 0))

    if bias is None:
        bias = graph.constant(np.zeros(size, np.float32))
    return binary(graph, "ADD", bias, graph.computed_once("zero", zero))


def fully_connected(graph: Graph, x: Tensor, matrix: Matrix, relu: bool = False) -> Tensor:
    """Adds a product with a matrix, its bias fused, inputs rounded row by row if it is integer."""
    if matrix.activation_blocks > 1:
        total = _sum_of_parts(graph, x, matrix)
        return unary(graph, "RELU", total) if relu else total
    bias = None if matrix.bias is None else graph.weight(f"{matrix.name}/bias", matrix.bias)
    weights = graph.sparse_weight(matrix.name, matrix.values)
    if weights is None:
        floats = matrix.bits is not None and not matrix.rounds_inputs
        weights = _as_floats(graph, matrix) if floats else matrix_weight(graph, matrix)
    else:
        bias = _computed_bias(graph, bias, weights.shape[0])
    functions = schema.ActivationFunctionType
    options = schema.FullyConnectedOptionsT(
        fusedActivationFunction=functions.RELU if relu else functions.NONE,
        keepNumDims=True,
        asymmetricQuantizeInputs=matrix.bits is not None and matrix.rounds_inputs,
    )
    shape = (*x.shape[:-1], weights.shape[0])
    version = product_version(matrix)
    return graph.add_operator(
        "FULLY_CONNECTED", [x, weights, bias], shape, options=options, version=version
    )


def _sum_of_parts(graph: Graph, x: Tensor, matrix: Matrix) -> Tensor:
    """Adds a product as several that are added, whose inputs are rounded part by part."""
    total = None
    for i, part in enumerate(matrix.parts):
        begin = (0,) * (len(x.shape) - 1) + (i * part.inputs,)
        inputs = slice_(graph, x, begin, (*x.shape[:-1], part.inputs), free=0)
        made = fully_connected(graph, inputs, part)
        total = made if total is None else binary(graph, "ADD", total, made)
    assert total is not None
    return total


def normalize(graph: Graph, x: Tensor, norm: Norm) -> Tensor:
    """Adds layer or root-mean-square normalization over the last axis."""
    if norm.kind == "layer":
        mean = reduce(graph, "MEAN", x, -1, keep=True)
        squares = binary(graph, "SQUARED_DIFFERENCE", x, mean)
        x = binary(graph, "SUB", x, mean)
    else:
        squares = binary(graph, "MUL", x, x)
    variance = reduce(graph, "MEAN", squares, -1, keep=True)
    inverse = unary(graph, "RSQRT", binary(graph, "ADD", variance, scalar(graph, norm.epsilon)))
    x = binary(graph, "MUL", x, inverse)
    if norm.gamma is not None and (norm.gamma != 1).any():  # Rotation folds them into products.
        x = binary(graph, "MUL", x, graph.weight(f"{norm.name}/gamma", norm.gamma))
    if norm.beta is None or not norm.beta.any():
        return x
    return binary(graph, "ADD", x, graph.weight(f"{norm.name}/beta", norm.beta))


def unary(graph: Graph, operator: str, x: Tensor) -> Tensor:
    """Adds an elementwise operator of one tensor, such as `RSQRT` or `TANH`."""
    return graph.add_operator(operator, [x], x.shape)


def activate(graph: Graph, x: Tensor, activation: Activation) -> Tensor:
    """Adds the activation of a feed-forward network."""
    if activation == "relu":
        return unary(graph, "RELU", x)
    if activation == "silu":
        return binary(graph, "MUL", x, unary(graph, "LOGISTIC", x))
    options = schema.GeluOptionsT(approximate=activation == "gelu_tanh")
    return graph.add_operator("GELU", [x], x.shape, options=options)


def soft_cap(graph: Graph, x: Tensor, cap: float) -> Tensor:
    """Adds `cap * tanh(x / cap)`."""
    shrunk = binary(graph, "MUL", x, scalar(graph, 1.0 / cap))
    return binary(graph, "MUL", unary(graph, "TANH", shrunk), scalar(graph, cap))


def concatenate(graph: Graph, tensors: list[Tensor], axis: int) -> Tensor:
    """Adds a concatenation along an axis."""
    axis %= len(tensors[0].shape)
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    options = schema.ConcatenationOptionsT(axis=axis)
    dtype = tensors[0].dtype
    return graph.add_operator("CONCATENATION", list(tensors), tuple(shape), dtype, options)


def softmax(graph: Graph, x: Tensor) -> Tensor:
    """Adds softmax over the last axis."""
    return graph.add_operator("SOFTMAX", [x], x.shape, options=schema.SoftmaxOptionsT(beta=1.0))


def is_positive(graph: Graph, x: Tensor) -> Tensor:
    """Adds a comparison of numbers with zero."""
    zero = scalar(graph, 0)
    return graph.add_operator("GREATER", [x, zero], x.shape, np.bool_, schema.GreaterOptionsT())


def conditional(
    graph: Graph,
    condition: Tensor,
    inputs: list[Tensor],
    then: int,
    otherwise: int,
    shape: tuple[int, ...],
) -> Tensor:
    """Adds a call of one of two branches, see `Graph.branch`, both of which give one tensor."""
    options = schema.IfOptionsT(thenSubgraphIndex=then, elseSubgraphIndex=otherwise)
    return graph.add_operator("IF", [condition, *inputs], shape, options=options)


def batch_matmul(graph: Graph, x: Tensor, y: Tensor, transpose_y: bool = False) -> Tensor:
    """Adds a product of two computed tensors over their last axes."""
    columns = y.shape[-2] if transpose_y else y.shape[-1]
    options = schema.BatchMatMulOptionsT(adjY=transpose_y)
    shape = (*x.shape[:-1], columns)
    return graph.add_operator("BATCH_MATMUL", [x, y], shape, options=options)


def cast_to_float(graph: Graph, x: Tensor) -> Tensor:
    """Adds a cast from int32 to float32."""
    options = schema.CastOptionsT(
        inDataType=schema.TensorType.INT32, outDataType=schema.TensorType.FLOAT32
    )
    return graph.add_operator("CAST", [x], x.shape, options=options)


def quantize(graph: Graph, x: Tensor) -> Tensor:
    """Adds a rounding of numbers in `[-1, 1]` to int8, in units of 1/127."""
    return graph.add_operator("QUANTIZE", [x], x.shape, np.int8, schema.QuantizeOptionsT())


def dequantize(graph: Graph, x: Tensor) -> Tensor:
    """Adds the way back from what `quantize` gives."""
    return graph.add_operator("DEQUANTIZE", [x], x.shape, options=schema.DequantizeOptionsT())


def dynamic_update_slice(graph: Graph, x: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """Adds a write of `update` into a copy of `x`, which runtimes do in place."""
    return graph.add_operator(
        "DYNAMIC_UPDATE_SLICE",
        [x, update, start],
        x.shape,
        x.dtype,
        schema.DynamicUpdateSliceOptionsT(),
    )


def indices(graph: Graph, x: Tensor, axis: int) -> Tensor:
    """Adds the indices of an axis as float32 `(size,)`, whatever its size is when the graph runs.

    All of it depends on shapes alone, so that runtimes compute it when they learn these.
    """
    shape = graph.add_operator(
        "SHAPE", [x], (len(x.shape),), np.int32, schema.ShapeOptionsT(schema.TensorType.INT32)
    )
    bounds = [graph.constant(np.asarray([n], np.int32)) for n in (axis, axis + 1, 1)]
    options = schema.StridedSliceOptionsT(shrinkAxisMask=1)
    size = graph.add_operator("STRIDED_SLICE", [shape, *bounds], (), np.int32, options)
    first, step = (graph.constant(np.asarray(n, np.int32)) for n in (0, 1))
    found = graph.add_operator(
        "RANGE", [first, size, step], (x.shape[axis],), np.int32, schema.RangeOptionsT()
    )
    return cast_to_float(graph, found)


def row_start(graph: Graph, positions: Tensor, index: int, head: int) -> Tensor:
    """Adds where rows begin in a cache: a head, one of the positions, the first number."""
    position = slice_(graph, positions, (index,), (1,))
    if head == 0:
        return pad_vector(graph, position, 1, 1)
    before, after = (graph.constant(np.asarray([n], np.int32)) for n in (head, 0))
    return concatenate(graph, [before, position, after], 0)


def gather(graph: Graph, x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Adds a choice of parts along an axis, in the order of their indices."""
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    options = schema.GatherOptionsT(axis=axis)
    return graph.add_operator("GATHER", [x, indices], shape, x.dtype, options)


def pad_vector(graph: Graph, x: Tensor, before: int, after: int) -> Tensor:
    """Adds zeros around a vector."""
    paddings = graph.constant(np.asarray([[before, after]], np.int32))
    shape = (before + x.shape[0] + after,)
    return graph.add_operator("PAD", [x, paddings], shape, x.dtype, schema.PadOptionsT())
