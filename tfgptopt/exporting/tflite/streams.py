"""The operators of what `tfgptopt.decoder.streams` describes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgptopt.decoder.spec import Block, DecoderSpec, Matrix
from tfgptopt.decoder.streams import AltUp, Laurel, LayerInput, Streams
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Graph, Tensor

_ROOT_OF_HALF = 2.0**-0.5


def inputs_of_layers(
    graph: Graph, spec: DecoderSpec, tokens: Tensor, x: Tensor
) -> Sequence[Tensor | None]:
    """Returns what each layer reads of each token, `(length, size)`; `None` if it reads nothing."""
    made, layers = spec.layer_inputs, len(spec.blocks)
    if made is None:
        return [None] * layers
    size = made.size(layers)
    shape = (x.shape[0], layers, size)
    rows = op.embedding_lookup(graph, tokens, op.matrix_weight(graph, made.table))
    rows = op.binary(graph, "MUL", rows, op.scalar(graph, made.table_scale))
    projected = op.fully_connected(graph, x, made.projection)
    projected = op.binary(graph, "MUL", projected, op.scalar(graph, made.projection_scale))
    normed = op.normalize(graph, op.reshape(graph, projected, shape), made.norm)
    both = op.binary(graph, "ADD", normed, op.reshape(graph, rows, shape))
    both = op.binary(graph, "MUL", both, op.scalar(graph, _ROOT_OF_HALF))
    parts = [op.slice_(graph, both, (0, i, 0), (x.shape[0], 1, size)) for i in range(layers)]
    return [op.reshape(graph, part, (x.shape[0], size)) for part in parts]


def own_input(graph: Graph, layer: LayerInput, x: Tensor, given: Tensor) -> Tensor:
    """Returns what a layer adds because of its own input."""
    gate = op.activate(graph, op.fully_connected(graph, x, layer.gate), layer.activation)
    made = op.fully_connected(graph, op.binary(graph, "MUL", gate, given), layer.up)
    return op.normalize(graph, made, layer.norm)


def add_laurel(graph: Graph, laurel: Laurel, x: Tensor, normed: Tensor) -> Tensor:
    """Adds the branch of low rank to the stream, and divides by the root of two."""
    low = op.fully_connected(graph, normed, laurel.left)
    made = op.normalize(graph, op.fully_connected(graph, low, laurel.right), laurel.norm)
    x = op.binary(graph, "ADD", x, op.binary(graph, "ADD", normed, made))
    return op.binary(graph, "MUL", x, op.scalar(graph, _ROOT_OF_HALF))


def stream(graph: Graph, streams: Tensor, index: int) -> Tensor:
    """Returns one of several streams, `(length, width)`."""
    length, _, width = streams.shape
    one = op.slice_(graph, streams, (0, index, 0), (length, 1, width))
    return op.reshape(graph, one, (length, width))


def _stacked(graph: Graph, streams: list[Tensor]) -> Tensor:
    """Returns streams as one tensor, `(length, streams, width)`."""
    length, width = streams[0].shape
    return op.concatenate(graph, [op.reshape(graph, x, (length, 1, width)) for x in streams], 1)


def _mean_square(graph: Graph, x: Tensor) -> Tensor:
    return op.reduce(graph, "MEAN", op.binary(graph, "MUL", x, x), -1, keep=True)


def _as_large(graph: Graph, x: Tensor, matrix: Matrix, root: Tensor, epsilon: float) -> Tensor:
    """Returns a projection of `x`, scaled to a root of the mean square."""
    projected = op.fully_connected(graph, x, matrix)
    square = op.binary(graph, "MAXIMUM", _mean_square(graph, projected), op.scalar(graph, epsilon))
    factor = op.binary(graph, "MUL", root, op.unary(graph, "RSQRT", square))
    return op.binary(graph, "MUL", projected, factor)


def split(graph: Graph, streams: Streams, x: Tensor) -> Tensor:
    """Returns the streams that an embedding becomes, `(length, streams, width)`."""
    root = op.unary(graph, "SQRT", _mean_square(graph, x))
    others = [_as_large(graph, x, m, root, streams.epsilon) for m in streams.projections]
    return _stacked(graph, [x, *others])


def join(graph: Graph, streams: Streams, x: Tensor) -> Tensor:
    """Returns the one stream that several become, `(length, width)`."""
    first = stream(graph, x, 0)
    root = op.unary(graph, "SQRT", _mean_square(graph, first))
    others = [
        _as_large(graph, stream(graph, x, i), matrix, root, streams.epsilon)
        for i, matrix in enumerate(streams.unembeddings, 1)
    ]
    return op.reduce(graph, "MEAN", _stacked(graph, [first, *others]), 1, keep=False)


def _mixture(graph: Graph, altup: AltUp, x: Tensor) -> Tensor:
    """Returns what the mixture of streams is made of, `(length, streams)`."""
    normed = op.normalize(graph, x, altup.router_norm)
    return op.unary(graph, "TANH", op.fully_connected(graph, normed, altup.router))


def predict(graph: Graph, altup: AltUp, streams: Tensor) -> Tensor:
    """Returns the streams that a block begins with."""
    length, count, _ = streams.shape
    mixture = _mixture(graph, altup, stream(graph, streams, altup.active))
    factors = op.fully_connected(graph, mixture, altup.prediction)
    factors = op.reshape(graph, factors, (length, count, count))
    return op.binary(graph, "ADD", op.batch_matmul(graph, factors, streams), streams)


def correct(
    graph: Graph, block: Block, streams: Tensor, x: Tensor, layer_input: Tensor | None
) -> Tensor:
    """Returns the streams behind a block whose active stream became `x`."""
    altup, (length, count, width) = block.altup, streams.shape
    assert altup is not None and block.layer_input is not None and layer_input is not None
    factors = op.fully_connected(graph, _mixture(graph, altup, x), altup.correction)
    factors = op.binary(graph, "ADD", factors, op.scalar(graph, 1.0))
    change = op.binary(graph, "SUB", x, stream(graph, streams, altup.active))
    change = op.reshape(graph, change, (length, 1, width))
    change = op.binary(graph, "MUL", change, op.reshape(graph, factors, (length, count, 1)))
    streams = op.binary(graph, "ADD", streams, change)
    active = stream(graph, streams, altup.active)
    if altup.output_scale is not None:
        scale = graph.weight("altup/output_scale", altup.output_scale)
        active = op.binary(graph, "MUL", active, scale)
    added = own_input(graph, block.layer_input, active, layer_input)
    # All streams but the first.
    others = graph.constant(np.arange(count).reshape(1, -1, 1).clip(max=1).astype(np.float32))
    added = op.binary(graph, "MUL", op.reshape(graph, added, (length, 1, width)), others)
    return op.binary(graph, "ADD", streams, added)
