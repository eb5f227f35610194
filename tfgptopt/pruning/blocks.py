"""Blocks, rows and columns: weights that go together."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tensorflow as tf

from tfgptopt.pruning.keeping import count_kept, keep_largest


def _pool(scores: tf.Tensor, rows: int, columns: int) -> tf.Tensor:
    """Returns the mean score of each block; ragged blocks at the edges count what they have."""
    inputs, outputs = scores.shape
    down, across = -(-inputs // rows), -(-outputs // columns)
    paddings = [[0, down * rows - inputs], [0, across * columns - outputs]]

    def total(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(
            tf.reshape(tf.pad(x, paddings), (down, rows, across, columns)), axis=(1, 3)
        )

    return total(scores) / total(tf.ones_like(scores))


def _block_mask(scores: tf.Tensor, sparsity: tf.Tensor, rows: int, columns: int) -> tf.Tensor:
    pooled = _pool(scores, rows, columns)
    (kept,) = keep_largest([tf.reshape(pooled, (1, -1))], count_kept(tf.size(pooled), sparsity))
    blocks = tf.reshape(kept, tf.shape(pooled))
    spread = tf.repeat(tf.repeat(blocks, rows, axis=0), columns, axis=1)
    return spread[: scores.shape[0], : scores.shape[1]]


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

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks of matrices; see `Unstructured.masks`."""
        pairs = zip(scores, sparsity, strict=True)
        return [_block_mask(x, s, *self._size(x.shape)) for x, s in pairs]

    @abc.abstractmethod
    def _size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns rows and columns of a block of a matrix."""

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a block is larger than a weight."""
        rows, columns = self._size(shape)
        if rows > shape[0] or columns > shape[1]:
            raise ValueError(
                f"A block of {rows} x {columns} does not fit into {path}, which has "
                f"{shape[0]} inputs and {shape[1]} outputs. Choose a smaller block, or leave it "
                "out with `targets`."
            )

    def holds(self, kept: np.ndarray) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has only whole blocks."""
        return _blocks_hold(kept, *self._size(kept.shape))

    def supports(self, score: str) -> bool:
        """Returns whether a score can be used: all but SparseGPT, which goes input by input."""
        return score != "sparsegpt"

    def keep(self, scores: np.ndarray, sparsity: float) -> np.ndarray:
        """Returns the mask of a whole matrix."""
        (mask,) = self.masks([tf.constant(scores, tf.float32)], [tf.constant(sparsity)])
        return np.asarray(mask)


@dataclass(frozen=True)
class Block(_Together):
    """Blocks of weights go together; the mean score of a block decides.

    Args:
        rows: int, inputs of a block.
        columns: int, outputs of a block. Blocks at the edges may be smaller. LiteRT's 1x4 blocks
            of float32 kernels, which it stores by outputs, are `Block(4, 1)` here.

    Raises:
        ValueError: If a size is below 1 or both are 1; when it is applied, if a block is larger
            than a weight.

    Reference: Narang et al., 2017, "Block-Sparse Recurrent Neural Networks"
    (https://arxiv.org/abs/1711.02782).
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        sizes = (self.rows, self.columns)
        if not all(isinstance(n, int) and n >= 1 for n in sizes) or sizes == (1, 1):
            raise ValueError(
                "Block(rows, columns) takes two ints >= 1, of which one is larger; for single "
                f"weights use Unstructured(). Received: {sizes}"
            )

    def _size(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.rows, self.columns


@dataclass(frozen=True)
class Rows(_Together):
    """Whole inputs of a matrix go: all weights that read one input."""

    def _size(self, shape: Sequence[int]) -> tuple[int, int]:
        return 1, int(shape[1])


@dataclass(frozen=True)
class Columns(_Together):
    """Whole outputs of a matrix go: all weights of a neuron. Its bias stays."""

    def _size(self, shape: Sequence[int]) -> tuple[int, int]:
        return int(shape[0]), 1
