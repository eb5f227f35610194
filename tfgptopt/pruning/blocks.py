"""Blocks, rows and columns: weights that go together."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import tensorflow as tf

from tfgptopt.pruning.keeping import count_kept, keep_largest

Norm = Literal["l1", "l2"]


def pool(scores: tf.Tensor, rows: int, columns: int, norm: Norm = "l1") -> tf.Tensor:
    """Returns the mean score of each block, or the root mean square of its scores for `"l2"`.

    Ragged blocks at the edges count what they have.
    """
    inputs, outputs = scores.shape
    down, across = -(-inputs // rows), -(-outputs // columns)
    paddings = [[0, down * rows - inputs], [0, across * columns - outputs]]

    def total(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(
            tf.reshape(tf.pad(x, paddings), (down, rows, across, columns)), axis=(1, 3)
        )

    if norm == "l2":
        # What is added keeps the gradient of a block of zeros at zero.
        return tf.sqrt(total(tf.square(scores)) / total(tf.ones_like(scores)) + 1e-20)
    return total(scores) / total(tf.ones_like(scores))


def _blocks_hold(kept: np.ndarray, rows: int, columns: int) -> bool:
    """Returns whether every block of a numpy mask is either kept or dropped as a whole."""
    for i in range(0, kept.shape[0], rows):
        band = kept[i : i + rows]
        if (band != band[:1]).any():
            return False
        for j in range(0, kept.shape[1], columns):
            if (band[0, j : j + columns] != band[0, j]).any():
                return False
    return True


class _Together(abc.ABC):
    """What blocks, rows and columns have in common: they go or stay as a whole."""

    sparsity: ClassVar[None] = None
    takes_allocation: ClassVar[bool] = False
    inputs_together: ClassVar[None] = None
    norm: Norm

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"`norm` must be 'l1' or 'l2'. Received: {self.norm!r}")

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks of matrices; see `Unstructured.masks`."""
        return [self._mask(tensor, s) for tensor, s in zip(scores, sparsity, strict=True)]

    def _mask(self, scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        pooled = self.units(scores)
        (kept,) = keep_largest([tf.reshape(pooled, (1, -1))], count_kept(tf.size(pooled), sparsity))
        return self.mask_of(tf.reshape(kept, tf.shape(pooled)), scores)

    def units(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns the scores of what goes together: norms for each weight in it."""
        return pool(scores, *self.size_in(scores.shape), self.norm)

    def mask_of(self, kept: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        """Returns the mask of a matrix that keeps some of its `units`."""
        rows, columns = self.size_in(scores.shape)
        spread = tf.repeat(tf.repeat(kept, rows, axis=0), columns, axis=1)
        return spread[: scores.shape[0], : scores.shape[1]]

    @abc.abstractmethod
    def size_in(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns rows and columns of a block of a matrix."""

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a block is larger than a weight."""
        rows, columns = self.size_in(shape)
        if rows > shape[0] or columns > shape[1]:
            raise ValueError(
                f"A block of {rows} x {columns} does not fit into {path}, which has "
                f"{shape[0]} inputs and {shape[1]} outputs. Choose a smaller block, or leave it "
                "out with `targets`."
            )

    def holds(self, kept: np.ndarray) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has only whole blocks."""
        return _blocks_hold(kept, *self.size_in(kept.shape))

    def supports(self, score: str) -> bool:
        """Returns whether a score can be used.

        All but SparseGPT, which goes input by input; signed scores have no squares to add up.
        """
        return score != "sparsegpt" and not (self.norm == "l2" and score == "movement")

    def keep(self, scores: np.ndarray, sparsity: float) -> np.ndarray:
        """Returns the mask of a whole matrix."""
        (mask,) = self.masks([tf.constant(scores, tf.float32)], [tf.constant(sparsity)])
        return np.asarray(mask)


@dataclass(frozen=True)
class Block(_Together):
    """Blocks of weights go together; the norm of a block's scores decides.

    Args:
        rows: int, inputs of a block.
        columns: int, outputs of a block. Blocks at the edges may be smaller. LiteRT's 1x4 blocks
            of float32 kernels, which it stores by outputs, are `Block(4, 1)` here.
        norm: `"l1"`, the mean score, or `"l2"`, the root mean square. Defaults to `"l1"`.

    Raises:
        ValueError: If a size is below 1 or both are 1; when it is applied, if a block is larger
            than a weight.

    Reference: Narang et al., 2017, "Block-Sparse Recurrent Neural Networks"
    (https://arxiv.org/abs/1711.02782).
    """

    rows: int
    columns: int
    norm: Norm = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.rows, self.columns)
        if not all(isinstance(n, int) and n >= 1 for n in sizes) or sizes == (1, 1):
            raise ValueError(
                "Block(rows, columns) takes two ints >= 1, of which one is larger; for single "
                f"weights use Unstructured(). Received: {sizes}"
            )

    def size_in(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.rows, self.columns


@dataclass(frozen=True)
class Rows(_Together):
    """Whole inputs of a matrix go: all weights that read one input.

    Args:
        norm: `"l1"`, the mean score of a row, or `"l2"`, the root mean square. Defaults to `"l1"`.

    Raises:
        ValueError: If `norm` is none of these.
    """

    norm: Norm = "l1"

    def size_in(self, shape: Sequence[int]) -> tuple[int, int]:
        return 1, int(shape[1])


@dataclass(frozen=True)
class Columns(_Together):
    """Whole outputs of a matrix go: all weights of a neuron. Its bias stays.

    Args:
        norm: `"l1"`, the mean score of a column, or `"l2"`, the root mean square. Defaults to
            `"l1"`.

    Raises:
        ValueError: If `norm` is none of these.
    """

    norm: Norm = "l1"

    def size_in(self, shape: Sequence[int]) -> tuple[int, int]:
        return int(shape[0]), 1
