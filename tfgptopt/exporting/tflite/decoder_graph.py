"""The graph of a decoder: reads tokens at a position, updates the KV cache, gives logits.

One function serves every signature: they differ in how many tokens they read, in how much of the
cache they attend to, and in whether they compute logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tfgptopt.decoder.spec import Block, DecoderSpec, FeedForward, Matrix, Norm
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.attention import Positions, Projection, attend, joined, project
from tfgptopt.exporting.tflite.builder import Graph, Model, Tensor


@dataclass(frozen=True)
class Step:
    """One signature.

    Attributes:
        name: Name of the signature.
        length: Tokens read in one call.
        window: Positions of the cache that are attended to, from the first on.
        logits: Whether logits are computed, for every token read.
    """

    name: str
    length: int
    window: int
    logits: bool


@dataclass(frozen=True, eq=False)
class _Layer:
    """A block with the products of one input put together, once for all signatures."""

    block: Block
    projection: Projection
    gate_and_up: Matrix | None


def add_signatures(model: Model, spec: DecoderSpec, steps: Iterable[Step]) -> None:
    """Adds signatures to a model, which share every weight.

    Inputs of each: `tokens` int32 `(length,)`; `position` int32 `(1,)`, the position of the first
    token; `key_i` and `value_i` float32 `(key-value heads, context, head_dim)` for each layer `i`.
    Outputs: the caches under the same names, and `logits` float32 `(length, vocabulary)`.

    Args:
        model: The file.
        spec: A decoder with a context length.
        steps: The signatures.
    """
    assert spec.context_length is not None
    tables: dict[bytes, np.ndarray] = {}
    layers = []
    for block in spec.blocks:
        projection = Projection.of(block.attention, tables, spec.context_length)
        gate, up = block.feedforward.gate, block.feedforward.up
        both = None if gate is None else joined(f"{gate.name}+up", (gate, up))
        layers.append(_Layer(block, projection, both))
    for step in steps:
        _add_signature(model.graph(step.name), spec, layers, step)


def _add_signature(graph: Graph, spec: DecoderSpec, layers: list[_Layer], step: Step) -> None:
    tokens = graph.input("tokens", (step.length,), np.int32)
    positions = Positions(graph, step.length, step.window)
    caches = [
        [graph.input(f"{kind}_{i}", spec.cache_shape, np.float32) for kind in ("key", "value")]
        for i in range(len(layers))
    ]
    x = _embed(graph, spec, tokens, positions)
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        block, attention = layer.block, layer.block.attention
        normed = op.normalize(graph, x, block.attention_norm)
        query, *new = project(graph, attention, layer.projection, normed, positions)
        cache = [
            op.dynamic_update_slice(graph, held, part, positions.start)
            for held, part in zip(cache, new, strict=True)
        ]
        graph.output(f"key_{i}", cache[0])
        graph.output(f"value_{i}", cache[1])
        if not step.logits and i == len(layers) - 1:
            return  # Nothing behind the last cache is needed.
        mixed = attend(graph, attention, query, cache, positions)
        attended = op.fully_connected(graph, mixed, attention.output)
        attended = _maybe_normalize(graph, attended, block.post_attention_norm)
        if not block.parallel:
            x = op.binary(graph, "ADD", x, attended)
        normed = op.normalize(graph, x, block.feedforward_norm)
        added = _feedforward(graph, block.feedforward, layer.gate_and_up, normed)
        added = _maybe_normalize(graph, added, block.post_feedforward_norm)
        if block.parallel:
            added = op.binary(graph, "ADD", added, attended)
        x = op.binary(graph, "ADD", x, added)
    x = op.normalize(graph, x, spec.final_norm)
    logits = op.fully_connected(graph, x, spec.head or spec.token_embedding)
    if spec.logit_soft_cap is not None:
        logits = op.soft_cap(graph, logits, spec.logit_soft_cap)
    graph.output("logits", logits)


def _embed(graph: Graph, spec: DecoderSpec, tokens: Tensor, positions: Positions) -> Tensor:
    table = op.matrix_weight(graph, spec.token_embedding)
    x = op.embedding_lookup(graph, tokens, table)
    if spec.embedding_scale != 1.0:
        x = op.binary(graph, "MUL", x, op.scalar(graph, spec.embedding_scale))
    if spec.position_embedding is not None:
        learned = graph.weight("position_embedding", spec.position_embedding)
        x = op.binary(graph, "ADD", x, op.embedding_lookup(graph, positions.indices, learned))
    return _maybe_normalize(graph, x, spec.embedding_norm)


def _maybe_normalize(graph: Graph, x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else op.normalize(graph, x, norm)


def _feedforward(
    graph: Graph, feedforward: FeedForward, gate_and_up: Matrix | None, x: Tensor
) -> Tensor:
    activation = feedforward.activation
    if feedforward.gate is None:
        hidden = op.fully_connected(graph, x, feedforward.up, relu=activation == "relu")
        if activation != "relu":
            hidden = op.activate(graph, hidden, activation)
        return op.fully_connected(graph, hidden, feedforward.down)
    if gate_and_up is None:
        gate = op.fully_connected(graph, x, feedforward.gate)
        up = op.fully_connected(graph, x, feedforward.up)
    else:
        both = op.fully_connected(graph, x, gate_and_up)
        half = (x.shape[0], both.shape[1] // 2)
        gate, up = (op.slice_(graph, both, (0, at), half) for at in (0, half[1]))
    hidden = op.binary(graph, "MUL", op.activate(graph, gate, activation), up)
    return op.fully_connected(graph, hidden, feedforward.down)
