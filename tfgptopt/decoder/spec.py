"""One plain description of a GPT-style decoder, which every exporter reads.

Readers (one for each model family) write it, exporters read it. Neither knows the other. It holds
what a family computes as values, not as names of families: a new family needs a reader, not a new
branch in the exporters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from tfgptopt.decoder.rotary import Rotary
from tfgptopt.model.types import Config

if TYPE_CHECKING:
    from tfgptopt.decoder.mixtures import Mixture
    from tfgptopt.decoder.streams import AltUp, Laurel, LayerInput, LayerInputs, Streams

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a product, as the rows that each output is computed from.

    Attributes:
        name: Path of the weight in the model it was read from; no other weight has it.
        values: Array of shape `(outputs, inputs)`: float32, or int8 integers on a grid.
        bits: 4 or 8 if the values are integers, `None` for plain floats.
        scale: float32 array that maps the integers to floats, of shape `(outputs,)`, or `(outputs,
            blocks)` with a block size; `None` for plain floats.
        bias: float32 array of shape `(outputs,)`, or `None`.
        block_size: How many inputs, one after the other, share a scale; `None` for all.
        rounds_inputs: Whether the product rounds its inputs to integers too, if it has some.
        activation_blocks: Of how many products it is the sum, each with a part of the inputs, one
            after the other, that is rounded with a scale of its own.
    """

    name: str
    values: np.ndarray
    bits: int | None = None
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    block_size: int | None = None
    rounds_inputs: bool = True
    activation_blocks: int = 1

    def floats(self) -> np.ndarray:
        """Returns what the product computes with, as float32 of shape `(outputs, inputs)`."""
        if self.scale is None:
            return self.values
        blocks = self.values.reshape(*self.values.shape[:1], -1, self.block_size or self.inputs)
        scale = self.scale.reshape(*blocks.shape[:2], 1)
        return (blocks.astype(np.float32) * scale).reshape(self.values.shape)

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.values.shape[1]

    @property
    def form(self) -> tuple[int | None, int | None, bool, int]:
        """How it is stored and computed with: two of one form can be put together."""
        return self.bits, self.block_size, self.rounds_inputs, self.activation_blocks

    def rows(self, name: str, chosen: np.ndarray) -> Matrix:
        """Returns a matrix of some of the outputs, under a name of its own."""
        scale = None if self.scale is None else self.scale[chosen]
        bias = None if self.bias is None else self.bias[chosen]
        return replace(self, name=name, values=self.values[chosen], scale=scale, bias=bias)

    @cached_property
    def parts(self) -> tuple[Matrix, ...]:
        """The matrices of the products that it is the sum of, the bias in the first."""
        count = self.activation_blocks
        scales: list[np.ndarray | None] = [self.scale] * count
        if self.scale is not None and self.block_size is not None:
            scales = [np.ascontiguousarray(one) for one in np.split(self.scale, count, axis=1)]
        return tuple(
            replace(
                self,
                name=f"{self.name}/{i}",
                values=np.ascontiguousarray(values),
                scale=scales[i],
                bias=self.bias if i == 0 else None,
                activation_blocks=1,
            )
            for i, values in enumerate(np.split(self.values, count, axis=1))
        )


@dataclass(frozen=True, eq=False)
class Norm:
    """Normalization over the last axis.

    Attributes:
        name: Path of the layer; no other norm has it.
        kind: `"layer"` subtracts the mean and divides by the standard deviation, `"rms"` divides
            by the root of the mean square.
        gamma: float32 factor for each feature, or `None`.
        epsilon: What is added under the root.
        beta: float32 summand for each feature, or `None`.
    """

    name: str
    kind: Literal["layer", "rms"]
    gamma: np.ndarray | None
    epsilon: float
    beta: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal attention: `softmax(scale * query . key + bias) . value`.

    Attributes:
        query, key, value: Projections, heads one after the other along the outputs. Without
            `value` the product with `key` is the value too, without `key` there are neither.
        output: Projection of the attended values.
        num_heads: Heads of the queries.
        num_key_value_heads: Heads of keys and values; each serves as many query heads.
        head_dim: Features of a head.
        scale: Factor on the products of queries and keys.
        rotary: How positions turn queries and keys, or `None`.
        alibi: float32 slope for each head, times minus the distance to a key, or `None`.
        window: How many positions a token sees, itself included; `None` for all before it.
        logit_soft_cap: `cap * tanh(score / cap)`, or `None`.
        query_norm, key_norm: Norms over a head before the rotation, or `None`.
        value_norm: Norm over a head of the values, or `None`.
        shared_with: Index of the block whose keys and values it attends to, if it has no `key`.
        sinks: float32 score for each head of a key that has no value, and takes its share of the
            softmax; or `None`.
    """

    query: Matrix
    key: Matrix | None
    value: Matrix | None
    output: Matrix
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    rotary: Rotary | None = None
    alibi: np.ndarray | None = None
    window: int | None = None
    logit_soft_cap: float | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    value_norm: Norm | None = None
    shared_with: int | None = None
    sinks: np.ndarray | None = None

    def __str__(self) -> str:
        text = f"{self.num_heads} heads of {self.head_dim}"
        if self.num_key_value_heads != self.num_heads:
            text += f" over {self.num_key_value_heads} of keys and values"
        text += f", scale {self.scale:.4g}"
        text += f", {self.rotary}" if self.rotary else ""
        text += ", ALiBi" if self.alibi is not None else ""
        text += f", window {self.window}" if self.window else ""
        text += f", soft cap {self.logit_soft_cap:g}" if self.logit_soft_cap else ""
        text += f", keys and values of layer {self.shared_with}" if self.key is None else ""
        text += ", sinks" if self.sinks is not None else ""
        text += ", keys are values too" if self.key and not self.value else ""
        normed = {"queries": self.query_norm, "keys": self.key_norm, "values": self.value_norm}
        names = [name for name, norm in normed.items() if norm is not None]
        text += f", norm of {' and '.join(names)}" if names else ""
        return text + (", biases" if self.query.bias is not None else "")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """`down(activation(up(x)))`, or gated: `down(activation(gate(x)) * up(x))`.

    Attributes:
        up, down, gate: The projections; no `gate` if it is not gated.
        activation: Of the neurons, or of the gate.
        turn: What neurons are multiplied with in front of `down`, as many as it has inputs at a
            time, or `None`.
        cutoff: What a gate must exceed to be more than zero before its activation, in standard
            deviations above the mean of all gates of a token; it loses as much. `None`: no limit.
    """

    up: Matrix
    down: Matrix
    activation: Activation
    gate: Matrix | None = None
    cutoff: float | None = None
    turn: Matrix | None = None

    def matrices(self) -> list[Matrix]:
        """Returns the weights of products."""
        return [*([] if self.gate is None else [self.gate]), self.up, self.down]

    def __str__(self) -> str:
        gated = "gated " if self.gate else ""
        biases = ", biases" if self.up.bias is not None else ""
        cut = "" if self.cutoff is None else f" above {self.cutoff:.3g} deviations"
        turned = "" if self.turn is None else f", turned by {self.turn.inputs}"
        return f"{gated}{self.activation}{cut} of {self.up.values.shape[0]}{biases}{turned}"


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer.

    One after the other: `x += attention(norm(x))`, then `x += feedforward(norm(x))`. Parallel: both
    read the same `x`. A post-norm is applied to a branch before it is added. What the layer's own
    input of each token gives is added behind the branches, then all is multiplied by `scale`.

    Attributes:
        attention_norm, feedforward_norm: Norms before the branches.
        attention, feedforward: The branches.
        post_attention_norm, post_feedforward_norm: Norms behind the branches, or `None`.
        parallel: Whether both branches read the same input.
        layer_input: What becomes of the layer's own input of each token, or `None`.
        scale: Factor on what the block gives.
        altup, laurel: What Gemma 3n computes besides, or `None`.
    """

    attention_norm: Norm
    attention: Attention
    feedforward_norm: Norm
    feedforward: FeedForward | Mixture
    post_attention_norm: Norm | None = None
    post_feedforward_norm: Norm | None = None
    parallel: bool = False
    layer_input: LayerInput | None = None
    scale: float = 1.0
    altup: AltUp | None = None
    laurel: Laurel | None = None

    @property
    def extras(self) -> list[LayerInput | AltUp | Laurel]:
        """What there is besides the two branches."""
        found = (self.altup, self.laurel, self.layer_input)
        return [extra for extra in found if extra is not None]

    def matrices(self) -> list[Matrix]:
        """Returns the weights of products."""
        a = self.attention
        found = [a.query, a.key, a.value, a.output, *self.feedforward.matrices()]
        found += [matrix for extra in self.extras for matrix in extra.matrices()]
        return [matrix for matrix in found if matrix is not None]

    def norms(self) -> list[Norm]:
        """Returns the norms that there are."""
        a = self.attention
        found = [self.attention_norm, a.query_norm, a.key_norm, a.value_norm]
        found += [self.post_attention_norm, self.feedforward_norm, self.post_feedforward_norm]
        found += [norm for extra in self.extras for norm in extra.norms()]
        return [norm for norm in found if norm is not None]

    def __str__(self) -> str:
        posts = " and after" if self.post_attention_norm or self.post_feedforward_norm else ""
        form = "parallel, " if self.parallel else ""
        return (
            f"{form}{self.attention_norm.kind} norms before{posts} the branches; "
            f"attention: {self.attention}; feed-forward: {self.feedforward}"
            + "".join(f"; {extra}" for extra in self.extras)
            + (f"; times {self.scale:.3g}" if self.scale != 1.0 else "")
        )


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """A decoder: its shape, its arithmetic and its weights.

    Attributes:
        family: Name of the model class it was read from.
        config: The configuration of that class, as plain data.
        token_embedding: Token table of shape `(vocabulary_size, hidden_dim)`.
        blocks: The decoder layers.
        final_norm: Norm before the head.
        head: The head, or `None` if it is the token table.
        position_embedding: float32 array of shape `(context_length, hidden_dim)`, or `None`.
        embedding_scale: Factor on the looked-up tokens.
        embedding_norm: Norm of the embeddings, or `None`.
        logit_soft_cap: `cap * tanh(logit / cap)`, or `None`.
        context_length: Positions that the model has, in tokens; `None` for any number.
        layer_inputs: What each layer reads of each token besides the stream, or `None`.
        streams: How one stream becomes several and one again, or `None`.
        embedding_turn: Product behind the embeddings and their norm, or `None`.
        head_turn: Product between the final norm and the head, or `None`.
    """

    family: str
    config: Config
    token_embedding: Matrix
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Matrix | None = None
    position_embedding: np.ndarray | None = None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    logit_soft_cap: float | None = None
    context_length: int | None = None
    layer_inputs: LayerInputs | None = None
    streams: Streams | None = None
    embedding_turn: Matrix | None = None
    head_turn: Matrix | None = None

    @property
    def hidden_dim(self) -> int:
        """Width of the residual stream."""
        return self.token_embedding.values.shape[1]

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return self.token_embedding.values.shape[0]

    @property
    def caches(self) -> dict[int, tuple[int, int, int]]:
        """Shapes of the keys, and of the values, of the blocks that have some, by their indices."""
        attentions = [block.attention for block in self.blocks]
        return {
            i: (one.num_key_value_heads, self.context_length or 0, one.head_dim)
            for i, one in enumerate(attentions)
            if one.key is not None
        }

    def with_context(self, length: int) -> DecoderSpec:
        """Returns the same decoder with a number of positions."""
        positions = self.position_embedding
        if positions is not None:
            positions = np.ascontiguousarray(positions[:length])
        return replace(self, context_length=length, position_embedding=positions)

    def matrices(self) -> Iterator[Matrix]:
        """Yields every weight of a product, and the token table."""
        yield self.token_embedding
        for block in self.blocks:
            yield from block.matrices()
        if self.head is not None:
            yield self.head
        for extra in self._extras:
            yield from extra.matrices()
        yield from (turn for turn in (self.embedding_turn, self.head_turn) if turn is not None)

    @property
    def _extras(self) -> list[LayerInputs | Streams]:
        return [extra for extra in (self.layer_inputs, self.streams) if extra is not None]

    def norms(self) -> Iterator[Norm]:
        """Yields every norm."""
        if self.embedding_norm is not None:
            yield self.embedding_norm
        for block in self.blocks:
            yield from block.norms()
        for extra in self._extras:
            yield from extra.norms()
        yield self.final_norm

    def __str__(self) -> str:
        bits = "/".join(sorted({str(m.bits or 32) for b in self.blocks for m in b.matrices()}))
        extras = ["learned positions"] if self.position_embedding is not None else []
        extras += [f"embeddings times {self.embedding_scale:.4g}"] * (self.embedding_scale != 1.0)
        extras += ["norm of the embeddings"] * (self.embedding_norm is not None)
        extras += ["own head" if self.head is not None else "tied head"]
        extras += [f"logit soft cap {self.logit_soft_cap:g}"] if self.logit_soft_cap else []
        extras += ["turned head inputs"] * (self.head_turn is not None)
        extras += [str(extra) for extra in self._extras]
        lines = [
            f"{self.family}: {len(self.blocks)} layers, width {self.hidden_dim}, vocabulary "
            f"{self.vocabulary_size}, context {self.context_length or 'free'}, weights of {bits} "
            f"bits, {', '.join(extras)}"
        ]
        texts = [str(block) for block in self.blocks]
        for text in dict.fromkeys(texts):
            layers = [i for i, other in enumerate(texts) if other == text]
            which = "all layers" if len(layers) == len(texts) else f"layers {_ranges(layers)}"
            lines.append(f"  {which}: {text}")
        return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """Returns `0-4, 6` for 0, 1, 2, 3, 4, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
