"""The graph of a decoder: reads tokens at a position, updates the KV cache, gives logits.

One function serves every signature: they differ in how many tokens they read, and in whether they
compute logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfgptopt.decoder.spec import Block, DecoderSpec, Norm
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.attention import Positions, Projection, attend, project
from tfgptopt.exporting.tflite.builder import Graph, Model, Tensor
from tfgptopt.exporting.tflite.feedforward import feedforward
from tfgptopt.exporting.tflite.kv_cache import Held, add_growth, add_placing, add_reordering
from tfgptopt.exporting.tflite.streams import (
    add_laurel,
    correct,
    inputs_of_layers,
    join,
    own_input,
    predict,
    split,
    stream,
)
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
        apart: Whether each token belongs to a text of its own, at a position of its own.
        masked: Whether an input says which tokens see which, as LiteRT-LM wants it on GPUs, and
            all constants are within half precision.
    """

    name: str
    length: int
    logits: bool
    growing: bool = False
    apart: bool = False
    masked: bool = False

    @property
    def texts(self) -> int:
        """How many texts are read in one call."""
        return self.length if self.apart else 1


def add_signatures(
    model: Model,
    spec: DecoderSpec,
    steps: Sequence[Step],
    cache_dtype: CacheDtype = "float32",
    growth: bool = True,
    windowed: Sequence[int] = (),
) -> None:
    """Adds signatures to a model, which share every weight.

    Inputs of each: `tokens` int32 `(length,)`; `input_pos` int32 `(length,)`, their positions;
    `kv_cache_k_i` and `kv_cache_v_i` `(key-value heads, context, head_dim)`, where `i` counts the
    layers that have keys of their own, of the dtype of the cache, and for int8 `kv_cache_k_scale_i`
    and `kv_cache_v_scale_i` float32 `(key-value heads, context, 1)`. Outputs: the caches under the
    same names, and `logits` float32 `(1, length, vocabulary)`. All caches together may be resized
    to fewer positions. One more signature, `grow`, appends positions to the cache of a layer of any
    shape.

    A step that reads texts apart has their caches one behind the other along the first axis, and
    `logits` float32 `(length, 1, vocabulary)`. What it writes for one text after the other are
    outputs too, `kv_cache_k_i_text_t`: where a runtime gives one buffer for all of them and the
    input, nothing is copied. With such steps go `place`, which puts the cache of one text into that
    of a batch, and for each size `reorder_B`, which gives texts the rows of others.

    Args:
        model: The file.
        spec: A decoder with a context length.
        steps: The signatures.
        cache_dtype: `"float32"` or `"int8"`. Defaults to `"float32"`.
        growth: Whether `grow` is added, which a file has once. Defaults to `True`.
        windowed: Layers of the cache that may have less positions than the others, the first of
            which is the input `window_start` int32 `(1,)`; not of steps that read texts apart.
            Defaults to none.
    """
    assert spec.context_length is not None
    tables: dict[bytes, np.ndarray] = {}
    projections = [
        Projection.of(block.attention, tables, spec.context_length) for block in spec.blocks
    ]
    for step in steps:
        own = () if step.apart else windowed
        _add_signature(model.graph(step.name), spec, projections, step, cache_dtype, own)
    caches = list(spec.caches.values())
    if growth:
        add_growth(model.graph(names.GROW), caches[0], cache_dtype)
    batches = [step.texts for step in steps if step.apart]
    if batches:
        add_placing(model.graph(names.PLACE), caches[0], batches[0], cache_dtype)
    for texts in batches:
        add_reordering(model.graph(names.reorder_of(texts)), caches, texts, cache_dtype)


def _add_signature(
    graph: Graph,
    spec: DecoderSpec,
    projections: list[Projection],
    step: Step,
    cache_dtype: CacheDtype,
    windowed: Sequence[int],
) -> None:
    any_length = step.growing and step.length > 1
    free = (0,) if any_length else ()
    tokens = graph.input(names.TOKENS, (step.length,), np.int32, free)
    caches = {
        block: [
            Held(graph, name, i, shape, cache_dtype, step.growing, step.texts)
            for name in (names.KEYS, names.VALUES)
        ]
        for i, (block, shape) in enumerate(spec.caches.items())
    }
    mask = None
    if step.growing or step.masked:
        # Where caches grow nothing reads it: positions say as much.
        axes = ((2, 3) if any_length else (3,)) if step.growing else ()
        pairs = (1, 1, step.length, spec.caches[0][1])
        mask = graph.input(names.MASK, pairs, np.float32, axes)
    held, given = [both[0].tensor for both in caches.values()], mask if step.masked else None
    positions = Positions(graph, step.length, held[0], any_length, step.apart, given)
    of_layer = dict.fromkeys(caches, positions)
    if windowed:
        behind = positions.behind_start(held[windowed[0]])
        whole = [keys for i, keys in enumerate(held) if i not in windowed]
        positions.keys = whole[0] if whole else held[0]
        of_layer |= {block: behind for i, block in enumerate(caches) if i in windowed}
    x = _embed(graph, spec, tokens, positions)
    inputs = inputs_of_layers(graph, spec, tokens, x)
    streams = None if spec.streams is None else split(graph, spec.streams, x)
    layers = zip(spec.blocks, projections, inputs, strict=True)
    for i, (block, projection, layer_input) in enumerate(layers):
        attention = block.attention
        if block.altup is not None and streams is not None:
            streams = predict(graph, block.altup, streams)
            x = stream(graph, streams, block.altup.active)
        normed = op.normalize(graph, x, block.attention_norm)
        query, *new = project(graph, attention, projection, normed, positions)
        owner = i if attention.shared_with is None else attention.shared_with
        cache, places = caches[owner], of_layer[owner]
        for part, rows in zip(cache, new, strict=bool(new)):
            part.write(rows, places.starts(block.attention.num_key_value_heads))
        if not step.logits and i == max(caches):
            return  # Nothing behind the last cache is needed.
        mixed = attend(graph, attention, query, cache, places)
        x = _branches(graph, block, x, normed, op.fully_connected(graph, mixed, attention.output))
        if block.altup is not None and streams is not None:
            streams = correct(graph, block, streams, x, layer_input)
        elif block.layer_input is not None and layer_input is not None:
            x = op.binary(graph, "ADD", x, own_input(graph, block.layer_input, x, layer_input))
        if block.scale != 1.0:
            x = op.binary(graph, "MUL", x, op.scalar(graph, block.scale))
    if spec.streams is not None and streams is not None:
        x = join(graph, spec.streams, streams)
    x = op.normalize(graph, x, spec.final_norm)
    if spec.head_turn is not None:
        x = op.fully_connected(graph, x, spec.head_turn)
    logits = op.fully_connected(graph, x, spec.head or spec.token_embedding)
    if spec.logit_soft_cap is not None:
        logits = op.soft_cap(graph, logits, spec.logit_soft_cap)
    shape = (step.length, 1) if step.apart else (1, step.length)
    graph.output(names.LOGITS, op.reshape(graph, logits, (*shape, logits.shape[1])))


def _branches(graph: Graph, block: Block, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
    """Returns the stream with what attention found, and with what the neurons make of it."""
    attended = _maybe_normalize(graph, attended, block.post_attention_norm)
    if not block.parallel:
        x = op.binary(graph, "ADD", x, attended)
    if block.laurel is not None:
        x = add_laurel(graph, block.laurel, x, normed)
    normed = op.normalize(graph, x, block.feedforward_norm)
    added = feedforward(graph, block.feedforward, normed)
    added = _maybe_normalize(graph, added, block.post_feedforward_norm)
    if block.parallel:
        added = op.binary(graph, "ADD", added, attended)
    return op.binary(graph, "ADD", x, added)


def _embed(graph: Graph, spec: DecoderSpec, tokens: Tensor, positions: Positions) -> Tensor:
    table = op.matrix_weight(graph, spec.token_embedding)
    x = op.embedding_lookup(graph, tokens, table)
    if spec.embedding_scale != 1.0:
        x = op.binary(graph, "MUL", x, op.scalar(graph, spec.embedding_scale))
    if spec.position_embedding is not None:
        learned = graph.weight("position_embedding", spec.position_embedding)
        x = op.binary(graph, "ADD", x, op.embedding_lookup(graph, positions.indices, learned))
    x = _maybe_normalize(graph, x, spec.embedding_norm)
    if spec.embedding_turn is not None:
        x = op.fully_connected(graph, x, spec.embedding_turn)
    return x


def _maybe_normalize(graph: Graph, x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else op.normalize(graph, x, norm)
