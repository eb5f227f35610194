"""Cuts products of a converted file along their inputs into products that are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder.spec import Matrix
from tfgptopt.exporting.tflite.packing import product_version

# Makes a tensor hold a matrix.
Fill = Callable[[schema.TensorT, Matrix], None]


def cut_products(
    model: schema.ModelT, graph: schema.SubGraphT, index: int, matrix: Matrix, fill: Fill
) -> None:
    """Replaces the products that read a constant as weights, in place.

    Args:
        model: The file.
        graph: Its graph.
        index: The constant, which becomes the first part.
        matrix: What it holds.
        fill: Makes a tensor hold a part.
    """
    weights = [index] + [_like(graph, index, matrix.parts[0].values.shape)
                         for _ in matrix.parts[1:]]  # fmt: skip
    for number, part in zip(weights, matrix.parts, strict=True):
        tensor = graph.tensors[number]
        tensor.shape, tensor.name = list(part.values.shape), part.name
        fill(tensor, part)
    replaced: list[schema.OperatorT] = []
    for operator in graph.operators:
        if index in list(operator.inputs):
            replaced += _products(model, graph, operator, weights, matrix)
        else:
            replaced.append(operator)
    graph.operators = replaced


def _products(
    model: schema.ModelT,
    graph: schema.SubGraphT,
    operator: schema.OperatorT,
    weights: list[int],
    matrix: Matrix,
) -> list[schema.OperatorT]:
    """Returns what computes as one product did, part by part."""
    rows, _, *bias = operator.inputs
    (result,) = operator.outputs
    options = operator.builtinOptions
    last = options.fusedActivationFunction
    shape = list(graph.tensors[rows].shape)
    width = matrix.parts[0].inputs
    pieces = [_like(graph, rows, [*shape[:-1], width]) for _ in weights]
    axis = _constant(model, graph, np.asarray(len(shape) - 1, np.int32))
    split = schema.SplitOptionsT(numSplits=len(weights))
    made = [_operator(model, "SPLIT", 1, [axis, rows], pieces, split)]
    products = [_like(graph, result) for _ in weights]
    for i, (piece, weight, product) in enumerate(zip(pieces, weights, products, strict=True)):
        own = schema.FullyConnectedOptionsT(
            keepNumDims=options.keepNumDims, asymmetricQuantizeInputs=True
        )
        inputs = [piece, weight, *(bias if i == 0 else [-1] * len(bias))]
        version = product_version(matrix)
        made.append(_operator(model, "FULLY_CONNECTED", version, inputs, [product], own))
    total = products[0]
    for product in products[1:]:
        end = product == products[-1]
        sum_ = result if end else _like(graph, result)
        own = schema.AddOptionsT(fusedActivationFunction=last if end else 0)
        made.append(_operator(model, "ADD", 1, [total, product], [sum_], own))
        total = sum_
    return made


def _like(graph: schema.SubGraphT, index: int, shape: Sequence[int] | None = None) -> int:
    """Adds a tensor of the type of another; its last axis may have another size."""
    one = graph.tensors[index]
    signature = one.shapeSignature
    if signature is not None and len(signature) and shape is not None:
        signature = [*signature[:-1], shape[-1]]
    graph.tensors.append(
        schema.TensorT(
            shape=list(one.shape if shape is None else shape),
            shapeSignature=signature,
            type=schema.TensorType.FLOAT32,
            buffer=0,
            hasRank=True,
        )
    )
    return len(graph.tensors) - 1


def _constant(model: schema.ModelT, graph: schema.SubGraphT, values: np.ndarray) -> int:
    model.buffers.append(schema.BufferT(data=values.reshape(-1).view(np.uint8)))
    graph.tensors.append(
        schema.TensorT(
            shape=list(values.shape),
            type=schema.TensorType.INT32,
            buffer=len(model.buffers) - 1,
            hasRank=True,
        )
    )
    return len(graph.tensors) - 1


def _operator(
    model: schema.ModelT,
    name: str,
    version: int,
    inputs: list[int],
    outputs: list[int],
    options: object,
) -> schema.OperatorT:
    return schema.OperatorT(
        opcodeIndex=operator_code(model, getattr(schema.BuiltinOperator, name), version),
        inputs=inputs,
        outputs=outputs,
        builtinOptionsType=getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T")),
        builtinOptions=options,
    )


def operator_code(model: schema.ModelT, code: int, version: int) -> int:
    """Returns the index of an operator in the table of a file, which it is added to."""
    for index, entry in enumerate(model.operatorCodes):
        if entry.builtinCode == code:
            entry.version = max(entry.version, version)
            return index
    model.operatorCodes.append(
        schema.OperatorCodeT(
            builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=version
        )
    )
    return len(model.operatorCodes) - 1
