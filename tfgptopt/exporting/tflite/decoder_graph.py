"""The graph of a decoder: reads tokens at a position, updates the KV cache, gives logits.

One function serves every signature: they differ in how many tokens they read, in how much of the
cache they attend to, and in whether they compute logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tfgptopt.decoder.spec import Block, DecoderSpec, Matrix
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Graph, Model, Tensor

# Large enough to vanish in a softmax, small enough to stay finite after a multiplication.
_MASKED = 1e9


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


def add_step(model: Model, spec: DecoderSpec, step: Step) -> None:
    """Adds a signature to a model.

    Inputs: `tokens` int32 `(length,)`; `position` int32 `(1,)`, the position of the first token;
    `key_i` and `value_i` float32 `(heads, context, head_dim)` for each layer `i`. Outputs: the
    caches under the same names, and `logits` float32 `(length, vocabulary)`.
    """
    graph = model.graph(step.name)
    tokens = graph.input("tokens", (step.length,), np.int32)
    position = graph.input("position", (1,), np.int32)
    cache_shape = (spec.num_heads, spec.context_length, spec.head_dim)
    caches = [
        [graph.input(f"{kind}_{i}", cache_shape, np.float32) for kind in ("key", "value")]
        for i in range(len(spec.blocks))
    ]
    offsets = graph.constant(np.arange(step.length, dtype=np.int32))
    positions = op.binary(graph, "ADD", position, offsets)
    mask = _causal_mask(graph, positions, step.window)
    start = op.pad_vector(graph, position, 1, 1)

    table = op.matrix_weight(graph, spec.token_embedding)
    position_table = graph.weight("position_embedding", spec.position_embedding)
    x = op.binary(
        graph,
        "ADD",
        op.embedding_lookup(graph, tokens, table),
        op.embedding_lookup(graph, positions, position_table),
    )
    for i, (block, cache) in enumerate(zip(spec.blocks, caches, strict=True)):
        attended, cache = _attention(graph, spec, step, block, x, cache, mask, start)
        for kind, tensor in zip(("key", "value"), cache, strict=True):
            graph.output(f"{kind}_{i}", tensor)
        if not step.logits and i == len(spec.blocks) - 1:
            return  # Nothing behind the last cache is needed.
        x = op.binary(graph, "ADD", x, attended())
        x = op.binary(graph, "ADD", x, _feedforward(graph, block, x))
    x = op.layer_norm(graph, x, spec.final_norm)
    graph.output("logits", op.fully_connected(graph, x, spec.token_embedding))


def _causal_mask(graph: Graph, positions: Tensor, window: int) -> Tensor:
    """Returns `(length, window)`: 0 where a token may look, very negative where it may not."""
    rows = op.reshape(graph, op.cast_to_float(graph, positions), (positions.shape[0], 1))
    columns = graph.constant(np.arange(window, dtype=np.float32).reshape(1, window))
    ahead = op.binary(graph, "MINIMUM", op.binary(graph, "SUB", rows, columns), op.scalar(graph, 0))
    return op.binary(graph, "MUL", ahead, op.scalar(graph, _MASKED))


def _joined(block: Block) -> Matrix | None:
    """Returns query, key and value as one matrix, if they are stored alike."""
    parts = (block.query, block.key, block.value)
    if len({part.bits for part in parts}) > 1 or len({part.bias is None for part in parts}) > 1:
        return None

    def join(field: str) -> np.ndarray | None:
        arrays = [getattr(part, field) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    values = join("values")
    assert values is not None
    return Matrix(
        name=f"{block.query.name}+key+value",
        values=values,
        bits=block.query.bits,
        integers=join("integers"),
        scale=join("scale"),
        bias=join("bias"),
    )


def _project(graph: Graph, block: Block, x: Tensor) -> list[Tensor]:
    """Returns query, key and value of shape `(length, hidden)`, from one product if possible."""
    joined = _joined(block)
    if joined is None:
        return [op.fully_connected(graph, x, m) for m in (block.query, block.key, block.value)]
    both = op.fully_connected(graph, x, joined)
    length, width = both.shape[0], both.shape[1] // 3
    return [op.slice_(graph, both, (0, i * width), (length, width)) for i in range(3)]


def _attention(
    graph: Graph,
    spec: DecoderSpec,
    step: Step,
    block: Block,
    x: Tensor,
    cache: list[Tensor],
    mask: Tensor,
    start: Tensor,
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Updates the cache of a block; returns a function that adds the attention, and the cache."""
    heads, size, length = spec.num_heads, spec.head_dim, step.length
    normed = op.layer_norm(graph, x, block.attention_norm)

    def by_head(projected: Tensor) -> Tensor:
        if length == 1:
            return op.reshape(graph, projected, (heads, 1, size))
        return op.transpose(graph, op.reshape(graph, projected, (length, heads, size)), (1, 0, 2))

    query, key, value = (by_head(part) for part in _project(graph, block, normed))
    cache = [
        op.dynamic_update_slice(graph, held, new, start)
        for held, new in zip(cache, (key, value), strict=True)
    ]

    def attend() -> Tensor:
        scaled = op.binary(graph, "MUL", query, op.scalar(graph, size**-0.5))
        window = (heads, step.window, size)
        keys, values = (op.slice_(graph, held, (0, 0, 0), window) for held in cache)
        mix = _mix_one if length == 1 else _mix_many
        mixed = mix(graph, scaled, keys, values, mask)
        return op.fully_connected(graph, mixed, block.output)

    return attend, cache


def _mix_one(graph: Graph, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token: products with broadcasting, which need no repacking of the cache."""
    heads, window, size = keys.shape
    scores = op.reduce(graph, "SUM", op.binary(graph, "MUL", keys, query), 2, keep=False)
    weights = op.softmax(graph, op.binary(graph, "ADD", scores, mask))
    weights = op.reshape(graph, weights, (heads, window, 1))
    mixed = op.reduce(graph, "SUM", op.binary(graph, "MUL", values, weights), 1, keep=False)
    return op.reshape(graph, mixed, (1, heads * size))


def _mix_many(graph: Graph, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of several tokens: batched products over heads."""
    heads, length, size = query.shape
    scores = op.batch_matmul(graph, query, keys, transpose_y=True)
    weights = op.softmax(graph, op.binary(graph, "ADD", scores, mask))
    mixed = op.batch_matmul(graph, weights, values)
    mixed = op.transpose(graph, mixed, (1, 0, 2))
    return op.reshape(graph, mixed, (length, heads * size))


def _feedforward(graph: Graph, block: Block, x: Tensor) -> Tensor:
    normed = op.layer_norm(graph, x, block.feedforward_norm)
    hidden = op.gelu_tanh(graph, op.fully_connected(graph, normed, block.up))
    return op.fully_connected(graph, hidden, block.down)
