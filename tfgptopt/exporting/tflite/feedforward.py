"""Feed-forward networks: dense ones, and mixtures of experts."""

from __future__ import annotations

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
    """Computes all experts: LiteRT has no product with integers that are chosen while it runs."""
    weights = _weights(graph, mixture, x)
    gate = op.fully_connected(graph, x, mixture.gate)
    hidden = op.fully_connected(graph, x, mixture.up)
    if mixture.limit is not None:
        limit = op.scalar(graph, mixture.limit)
        gate = op.binary(graph, "MINIMUM", gate, limit)
        hidden = op.binary(graph, "MINIMUM", hidden, limit)
        hidden = op.binary(graph, "MAXIMUM", hidden, op.scalar(graph, -mixture.limit))
        hidden = op.binary(graph, "ADD", hidden, op.scalar(graph, 1.0))
    hidden = op.binary(graph, "MUL", _activated(graph, gate, mixture.activation), hidden)
    length, size = x.shape[0], mixture.down[0].inputs
    parts = []
    for i, down in enumerate(mixture.down):
        neurons = op.slice_(graph, hidden, (0, i * size), (length, size))
        weight = op.slice_(graph, weights, (0, i), (length, 1))
        parts.append(op.binary(graph, "MUL", op.fully_connected(graph, neurons, down), weight))
    if mixture.shared is not None and mixture.shared_gate is not None:
        opened = op.unary(graph, "LOGISTIC", op.fully_connected(graph, x, mixture.shared_gate))
        parts.append(op.binary(graph, "MUL", _network(graph, mixture.shared, x), opened))
    total = parts[0]
    for part in parts[1:]:
        total = op.binary(graph, "ADD", total, part)
    return total


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
