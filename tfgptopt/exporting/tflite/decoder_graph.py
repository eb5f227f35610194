"""The graph of a decoder: reads tokens at a position, updates the KV cache, gives logits.

One function serves every signature: they differ in how many tokens they read, and in whether they
compute logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tfgptopt.decoder.spec import DecoderSpec, FeedForward, Norm
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.attention import Positions, Projection, attend, project
from tfgptopt.exporting.tflite.builder import Graph, Model, Tensor
from tfgptopt.exporting.tflite.kv_cache import Held, add_growth
from tfgptopt.file import names
from tfgptopt.file.metadata import CacheDtype


@dataclass(frozen=True)
class Step:
    """One signature.

    Attributes:
        name: Name of the signature.
        length: Tokens read in one call.
        logits: Whether logits are computed, for every token read.
        growing: Whether the file says that caches may have any number of positions and, unless
            one token is read, that any number may be read. LiteRT-LM makes caches grow then, of
            files that have a mask as input.
    """

    name: str
    length: int
    logits: bool
    growing: bool = False


def add_signatures(
    model: Model, spec: DecoderSpec, steps: Iterable[Step], cache_dtype: CacheDtype = "float32"
) -> None:
    """Adds signatures to a model, which share every weight.

    Inputs of each: `tokens` int32 `(length,)`; `input_pos` int32 `(length,)`, their positions;
    `kv_cache_k_i` and `kv_cache_v_i` `(key-value heads, context, head_dim)` for each layer `i`, of
    the dtype of the cache, and for int8 `kv_cache_k_scale_i` and `kv_cache_v_scale_i` float32
    `(key-value heads, context, 1)`. Outputs: the caches under the same names, and `logits` float32
    `(1, length, vocabulary)`. All caches together may be resized to fewer positions. One more
    signature, `grow`, appends positions to the cache of a layer.

    Args:
        model: The file.
        spec: A decoder with a context length.
        steps: The signatures.
        cache_dtype: `"float32"` or `"int8"`. Defaults to `"float32"`.
    """
    assert spec.context_length is not None
    tables: dict[bytes, np.ndarray] = {}
    projections = [
        Projection.of(block.attention, tables, spec.context_length) for block in spec.blocks
    ]
    for step in steps:
        _add_signature(model.graph(step.name), spec, projections, step, cache_dtype)
    add_growth(model.graph(names.GROW), spec.cache_shape, cache_dtype)


def _add_signature(
    graph: Graph,
    spec: DecoderSpec,
    projections: list[Projection],
    step: Step,
    cache_dtype: CacheDtype,
) -> None:
    any_length = step.growing and step.length > 1
    free = (0,) if any_length else ()
    tokens = graph.input(names.TOKENS, (step.length,), np.int32, free)
    caches = [
        [
            Held(graph, name, i, spec.cache_shape, cache_dtype, step.growing)
            for name in (names.KEYS, names.VALUES)
        ]
        for i in range(len(spec.blocks))
    ]
    positions = Positions(graph, step.length, caches[0][0].tensor, any_length)
    if step.growing:
        # Nothing reads it: positions say as much.
        shape = (1, 1, step.length, spec.cache_shape[1])
        graph.input(names.MASK, shape, np.float32, (2, 3) if any_length else (3,))
    x = _embed(graph, spec, tokens, positions)
    layers = zip(spec.blocks, projections, caches, strict=True)
    for i, (block, projection, cache) in enumerate(layers):
        attention = block.attention
        normed = op.normalize(graph, x, block.attention_norm)
        query, *new = project(graph, attention, projection, normed, positions)
        for held, rows in zip(cache, new, strict=True):
            held.write(rows, positions.start)
        if not step.logits and i == len(spec.blocks) - 1:
            return  # Nothing behind the last cache is needed.
        mixed = attend(graph, attention, query, cache, positions)
        attended = op.fully_connected(graph, mixed, attention.output)
        attended = _maybe_normalize(graph, attended, block.post_attention_norm)
        if not block.parallel:
            x = op.binary(graph, "ADD", x, attended)
        normed = op.normalize(graph, x, block.feedforward_norm)
        added = _feedforward(graph, block.feedforward, normed)
        added = _maybe_normalize(graph, added, block.post_feedforward_norm)
        if block.parallel:
            added = op.binary(graph, "ADD", added, attended)
        x = op.binary(graph, "ADD", x, added)
    x = op.normalize(graph, x, spec.final_norm)
    logits = op.fully_connected(graph, x, spec.head or spec.token_embedding)
    if spec.logit_soft_cap is not None:
        logits = op.soft_cap(graph, logits, spec.logit_soft_cap)
    graph.output(names.LOGITS, op.reshape(graph, logits, (1, *logits.shape)))


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


def _feedforward(graph: Graph, feedforward: FeedForward, x: Tensor) -> Tensor:
    relu = feedforward.activation == "relu" and feedforward.gate is None
    hidden = op.fully_connected(graph, x, feedforward.up, relu=relu)
    if feedforward.gate is not None:
        # As one product with `up` it was no faster: the halves must be copied out of it.
        gate = op.fully_connected(graph, x, feedforward.gate)
        hidden = op.binary(graph, "MUL", op.activate(graph, gate, feedforward.activation), hidden)
    elif not relu:
        hidden = op.activate(graph, hidden, feedforward.activation)
    return op.fully_connected(graph, hidden, feedforward.down)
