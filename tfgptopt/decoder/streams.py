"""What the decoders of Gemma 3n and 4 have besides attention and a feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfgptopt.decoder.spec import Activation, Matrix, Norm


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """An input of its own for each layer, made of the token and of its embedding.

    Of a token with embedding `x`, layer `i` reads `(norm(scale * projection_i(x)) + table_scale *
    table_i) / sqrt(2)`.

    Attributes:
        table: Token table of shape `(vocabulary_size, layers * size)`.
        table_scale: Factor on the looked-up rows.
        projection: Projection of the embedding, of `layers * size` outputs.
        projection_scale: Factor on what it gives.
        norm: Norm over the numbers of one layer.
    """

    table: Matrix
    table_scale: float
    projection: Matrix
    projection_scale: float
    norm: Norm

    def size(self, layers: int) -> int:
        """Returns how many numbers each of so many layers reads."""
        return self.table.inputs // layers

    def matrices(self) -> list[Matrix]:
        """Returns the table and the weights of products."""
        return [self.table, self.projection]

    def norms(self) -> list[Norm]:
        """Returns the norms."""
        return [self.norm]

    def __str__(self) -> str:
        return "inputs of each layer"


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What a layer computes with its own input `e`: `norm(up(activation(gate(x)) * e))`."""

    gate: Matrix
    up: Matrix
    norm: Norm
    activation: Activation

    def matrices(self) -> list[Matrix]:
        """Returns the weights of products."""
        return [self.gate, self.up]

    def norms(self) -> list[Norm]:
        """Returns the norms."""
        return [self.norm]

    def __str__(self) -> str:
        return f"own input of {len(self.gate.values)}"


@dataclass(frozen=True, eq=False)
class Laurel:
    """A branch of low rank beside attention: `x + norm(right(left(x)))`.

    It reads what attention reads. Both are added, divided by `sqrt(2)`.

    Reference: Menghani et al., 2024, "LAuReL: Learned Augmented Residual Layer"
    (https://arxiv.org/abs/2411.07501).
    """

    left: Matrix
    right: Matrix
    norm: Norm

    def matrices(self) -> list[Matrix]:
        """Returns the weights of products."""
        return [self.left, self.right]

    def norms(self) -> list[Norm]:
        """Returns the norms."""
        return [self.norm]

    def __str__(self) -> str:
        return f"LAuReL of rank {len(self.left.values)}"


@dataclass(frozen=True, eq=False)
class AltUp:
    """Several streams, of which a block computes with one, and predicts and corrects the others.

    `m = tanh(router(norm(x)))` of the active stream `x` mixes the streams before the block, `y_i =
    x_i + sum_j prediction(m)_ij x_j`, and that of the block's result `z` after it, `y_i +
    (correction(m)_i + 1) (z - y)` with the active `y`. The layer's own input is computed from the
    active stream times `output_scale`, and added to all streams but the first.

    Reference: Baykal et al., 2023, "Alternating Updates for Efficient Transformers"
    (https://arxiv.org/abs/2301.13310).

    Attributes:
        router, router_norm: What the mixture is made of.
        prediction: Projection to the streams squared.
        correction: Projection to the streams.
        active: Index of the stream that the block computes with.
        output_scale: float32 factor for each feature, or `None`.
    """

    router: Matrix
    router_norm: Norm
    prediction: Matrix
    correction: Matrix
    active: int
    output_scale: np.ndarray | None

    @property
    def streams(self) -> int:
        """Number of streams."""
        return len(self.correction.values)

    def matrices(self) -> list[Matrix]:
        """Returns the weights of products."""
        return [self.router, self.prediction, self.correction]

    def norms(self) -> list[Norm]:
        """Returns the norms."""
        return [self.router_norm]

    def __str__(self) -> str:
        return f"stream {self.active} of {self.streams}"


@dataclass(frozen=True, eq=False)
class Streams:
    """How an embedding becomes several streams, and these one again.

    The first stream is the embedding, the others are projections of it, as large as it is. In the
    end projections of all but the first, as large as that, are averaged with it.

    Attributes:
        projections: To the streams from the second on.
        unembeddings: Back.
        epsilon: The least mean square that a projection is divided by.
    """

    projections: tuple[Matrix, ...]
    unembeddings: tuple[Matrix, ...]
    epsilon: float

    def matrices(self) -> list[Matrix]:
        """Returns the weights of products."""
        return [*self.projections, *self.unembeddings]

    def norms(self) -> list[Norm]:
        """Returns the norms: none."""
        return []

    def __str__(self) -> str:
        return f"{1 + len(self.projections)} streams"
