"""Feed-forward networks: dense ones, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgptopt.decoder.mixtures import Mixture
from tfgptopt.decoder.spec import Activation, FeedForward, Matrix
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Graph, Tensor

# More than one over the least difference of two probabilities.
_HUGE = 1e30


def feedforward(graph: Graph, network: FeedForward | Mixture, x: Tensor) -> Tensor:
    """Returns what a network makes of the stream, `(length, width)`."""
    if isinstance(network, Mixture):
        return _mixture(graph, network, x)
    return _network(graph, network, x)


def _network(graph: Graph, network: FeedForward, x: Tensor) -> Tensor:
    relu = network.activation == "relu" and network.gate is None
    hidden = op.fully_connected(graph, x, network.up, relu=relu)
    if network.gate is not None:
        # As one product with `up` it was no faster: the halves must be copied out of it.
        gate = op.fully_connected(graph, x, network.gate)
        if network.cutoff is not None:
            gate = _above_cutoff(graph, gate, network.cutoff)
        hidden = op.binary(graph, "MUL", op.activate(graph, gate, network.activation), hidden)
    elif not relu:
        hidden = op.activate(graph, hidden, network.activation)
    if network.turn is not None:
        hidden = _turned(graph, network.turn, hidden)
    return op.fully_connected(graph, hidden, network.down)


def _turned(graph: Graph, turn: Matrix, x: Tensor) -> Tensor:
    """Returns features of which each few, one after the other, are multiplied with a matrix."""
    if x.shape[1] == turn.inputs:
        return op.fully_connected(graph, x, turn)
    blocks = (x.shape[0], x.shape[1] // turn.inputs, turn.inputs)
    found = op.fully_connected(graph, op.reshape(graph, x, blocks, free=0), turn)
    return op.reshape(graph, found, x.shape, free=0)


def _above_cutoff(graph: Graph, gate: Tensor, deviations: float) -> Tensor:
    """Returns how far gates exceed their mean by so many standard deviations, at least zero.

    Without a sort it keeps about as many as a normal distribution has there.
    """
    mean = op.reduce(graph, "MEAN", gate, -1, keep=True)
    squares = op.binary(graph, "SQUARED_DIFFERENCE", gate, mean)
    deviation = op.unary(graph, "SQRT", op.reduce(graph, "MEAN", squares, -1, keep=True))
    least = op.binary(graph, "MUL", deviation, op.scalar(graph, deviations))
    least = op.binary(graph, "ADD", mean, least)
    return op.unary(graph, "RELU", op.binary(graph, "SUB", gate, least))


def _mixture(graph: Graph, mixture: Mixture, x: Tensor) -> Tensor:
    """Adds up what experts make of tokens.

    For one token only those are computed that it is sent to. Several are seldom sent to few: all
    are computed, and weigh nothing where they were not chosen.
    """
    weights, total = _weights(graph, mixture, x), None
    if mixture.shared is not None and mixture.shared_gate is not None:
        opened = op.unary(graph, "LOGISTIC", op.fully_connected(graph, x, mixture.shared_gate))
        total = op.binary(graph, "MUL", _network(graph, mixture.shared, x), opened)
    # What runs on sparse weights needs an input that a branch has not.
    choosing = x.shape[0] == 1 and not graph.sparse
    if choosing and total is None:
        total = graph.constant(np.zeros(x.shape, np.float32))
    for i in range(len(mixture.down)):
        weight = op.slice_(graph, weights, (0, i), (x.shape[0], 1))
        if choosing and total is not None:
            total = _where_chosen(graph, mixture, i, [x, total, weight])
        else:
            total = _with_expert(graph, mixture, i, [x, total, weight])
    assert total is not None
    return total


def _where_chosen(graph: Graph, mixture: Mixture, index: int, inputs: list[Tensor]) -> Tensor:
    """Adds what an expert makes of a token, if its weight is not zero."""

    def add(branch: Graph, inside: list[Tensor]) -> Tensor:
        return _with_expert(branch, mixture, index, inside)

    def keep(branch: Graph, inside: list[Tensor]) -> Tensor:
        return op.binary(branch, "ADD", inside[1], op.scalar(branch, 0))

    shape = inputs[0].shape
    return op.conditional(
        graph,
        op.is_positive(graph, inputs[2]),
        inputs,
        graph.branch(("expert", mixture.down[index]), inputs, add),
        graph.branch(("keep", shape), inputs, keep),
        shape,
    )


def _with_expert(
    graph: Graph, mixture: Mixture, index: int, inputs: Sequence[Tensor | None]
) -> Tensor:
    """Returns a sum with what an expert makes of the stream, times a weight for each token."""
    x, total, weight = inputs
    assert x is not None and weight is not None
    gate = op.fully_connected(graph, x, mixture.gate[index])
    hidden = op.fully_connected(graph, x, mixture.up[index])
    if mixture.limit is not None:
        limit = op.scalar(graph, mixture.limit)
        gate = op.binary(graph, "MINIMUM", gate, limit)
        hidden = op.binary(graph, "MINIMUM", hidden, limit)
        hidden = op.binary(graph, "MAXIMUM", hidden, op.scalar(graph, -mixture.limit))
        hidden = op.binary(graph, "ADD", hidden, op.scalar(graph, 1.0))
    hidden = op.binary(graph, "MUL", _activated(graph, gate, mixture.activation), hidden)
    made = op.fully_connected(graph, hidden, mixture.down[index])
    made = op.binary(graph, "MUL", made, weight)
    return made if total is None else op.binary(graph, "ADD", total, made)


def _activated(graph: Graph, x: Tensor, activation: Activation | float) -> Tensor:
    if isinstance(activation, str):
        return op.activate(graph, x, activation)
    steeper = op.binary(graph, "MUL", x, op.scalar(graph, activation))
    return op.binary(graph, "MUL", x, op.unary(graph, "LOGISTIC", steeper))


def _weights(graph: Graph, mixture: Mixture, x: Tensor) -> Tensor:
    """Returns how much each expert counts, `(length, experts)`: zero for those not chosen."""
    likely = op.softmax(graph, op.fully_connected(graph, x, mixture.router))
    length, experts = likely.shape
    own = op.reshape(graph, likely, (length, experts, 1))
    others = op.reshape(graph, likely, (length, 1, experts))
    ahead = op.unary(graph, "RELU", op.binary(graph, "SUB", others, own))
    ahead = op.binary(graph, "MUL", ahead, op.scalar(graph, _HUGE))
    ahead = op.binary(graph, "MINIMUM", ahead, op.scalar(graph, 1.0))
    # Chosen are those that fewer than `top_k` others are ahead of.
    left = op.reduce(graph, "SUM", ahead, 2, keep=False)
    left = op.unary(graph, "RELU", op.binary(graph, "SUB", op.scalar(graph, mixture.top_k), left))
    chosen = op.binary(graph, "MINIMUM", left, op.scalar(graph, 1.0))
    weights = op.binary(graph, "MUL", likely, chosen)
    if not mixture.normalized:
        return weights
    return op.binary(graph, "DIV", weights, op.reduce(graph, "SUM", weights, 1, keep=True))
