"""One plain description of a GPT-style decoder, which every exporter reads.

Readers (one for each model family) write it, exporters read it. Neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a product, as the rows that each output is computed from.

    Attributes:
        name: Path of the weight in the model it was read from.
        values: float32 array of shape `(outputs, inputs)`: what the product computes with.
        bits: 4 or 8 if the values lie on a grid, `None` for plain floats.
        integers: int8 array of shape `(outputs, inputs)`, or `None`.
        scale: float32 array of shape `(outputs,)`, or `None`.
        bias: float32 array of shape `(outputs,)`, or `None`.
    """

    name: str
    values: np.ndarray
    bits: int | None = None
    integers: np.ndarray | None = None
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """Layer normalization over the last axis."""

    name: str
    gamma: np.ndarray
    beta: np.ndarray
    epsilon: float


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer: `x += attention(norm(x))`, then `x += feedforward(norm(x))`.

    Attributes:
        attention_norm: Norm before attention.
        query, key, value: Projections, heads one after the other along the outputs.
        output: Projection of the attended values.
        feedforward_norm: Norm before the feed-forward network.
        up, down: The two products of the feed-forward network.
    """

    attention_norm: Norm
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    feedforward_norm: Norm
    up: Matrix
    down: Matrix


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """A decoder: its shape, its arithmetic and its weights.

    Attributes:
        family: Name of the model class it was read from.
        config: The configuration of that class, as plain data.
        num_heads, head_dim: Shape of attention.
        context_length: Number of positions, in tokens.
        activation: Activation of the feed-forward network.
        token_embedding: Token table of shape `(vocabulary_size, hidden_dim)`; also the head.
        position_embedding: float32 array of shape `(context_length, hidden_dim)`.
        blocks: The decoder layers.
        final_norm: Norm before the head.
    """

    family: str
    config: dict[str, Any]
    num_heads: int
    head_dim: int
    context_length: int
    activation: Literal["gelu_tanh"]
    token_embedding: Matrix
    position_embedding: np.ndarray
    blocks: tuple[Block, ...]
    final_norm: Norm

    @property
    def hidden_dim(self) -> int:
        """Width of the residual stream."""
        return self.token_embedding.values.shape[1]

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return self.token_embedding.values.shape[0]

    def __str__(self) -> str:
        bits = {matrix.bits or 32 for block in self.blocks for matrix in (block.query, block.up)}
        return (
            f"{self.family}: {len(self.blocks)} layers, {self.num_heads} heads of {self.head_dim}, "
            f"width {self.hidden_dim}, vocabulary {self.vocabulary_size}, context "
            f"{self.context_length}, weights of {'/'.join(map(str, sorted(bits)))} bits"
        )
