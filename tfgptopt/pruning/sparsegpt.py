"""SparseGPT: one-shot pruning that corrects the weights that stay for those that go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import keras
import numpy as np

from tfgptopt.calibration.correcting import grams_by_block
from tfgptopt.calibration.routing import warn_of_unread
from tfgptopt.calibration.statistics import inverse_factor
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Data
from tfgptopt.pruning.patterns import Pattern


@dataclass(frozen=True)
class SparseGPT:
    """Prunes at once, and moves the remaining weights so that outputs change least.

    It goes through the model block by block, so that each block is corrected for what the ones
    before it have become, and memory holds the statistics of one block. For `tfgptopt.prune`,
    with `Unstructured()` or `NM` along either axis.

    Args:
        data: Calibration data: a finite `tf.data.Dataset` or arrays, as `fit` takes them. The
            paper reads 128 windows of 2048 tokens. It is not part of a recipe.
        block_size: int, how many inputs are pruned between two updates of the rest. Defaults to
            `128`.
        damping: float, share of the mean that is added to the diagonal. Defaults to `0.01`.

    Raises:
        ValueError: If `block_size` is below 1 or `damping` is not positive.

    Reference: Frantar and Alistarh, 2023, "SparseGPT: Massive Language Models Can Be Accurately
    Pruned in One-Shot" (https://arxiv.org/abs/2301.00774).
    """

    data: Data = field(default=None, compare=False, repr=False)
    block_size: int = 128
    damping: float = 0.01

    name: ClassVar[str] = "sparsegpt"

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"`block_size` must be an int >= 1. Received: {self.block_size!r}")
        if not self.damping > 0:
            raise ValueError(f"`damping` must be > 0. Received: {self.damping!r}")

    def check(self) -> None:
        """Raises if there is no calibration data."""
        if self.data is None:
            raise ValueError("SparseGPT needs calibration data: SparseGPT(dataset.take(16)).")

    def prune(
        self,
        model: keras.Layer,
        chosen: list[Target],
        shares: dict[int, float],
        pattern: Pattern,
    ) -> Iterator[tuple[Target, np.ndarray]]:
        """Prunes a model block by block.

        Args:
            model: The model. Its weights are changed.
            chosen: Which of them.
            shares: Sparsity by the `id` of each variable.
            pattern: Which weights go together.

        Yields:
            Each target with its mask, a bool array of the shape of the variable, after its weights
            were changed.
        """
        unread = []
        for _, members in grams_by_block(model, chosen, self.data, "SparseGPT"):
            for target, parts in members:
                pruned, kept = [], []
                for part, gram in parts:
                    matrix = part.to_matrix(target.variable.value).numpy().astype(np.float64)
                    if gram is None:  # All inputs count alike then, and nothing is corrected.
                        unread.append(part)
                        gram = np.zeros((len(matrix), len(matrix)))
                    factor = inverse_factor(gram, self.damping)
                    share = shares[id(target.variable)]
                    kept.append(self._prune_matrix(matrix, factor, share, pattern))
                    pruned.append(matrix.astype(np.float32))
                target.variable.assign(target.from_matrix(np.concatenate(pruned, axis=1)))
                yield target, target.from_matrix(np.concatenate(kept, axis=1)).numpy()
        warn_of_unread(unread, "pruned by magnitude", stacklevel=3)

    def _prune_matrix(
        self, matrix: np.ndarray, factor: np.ndarray, sparsity: float, pattern: Pattern
    ) -> np.ndarray:
        """Prunes a matrix `(inputs, outputs)` in place; returns what it kept."""
        inputs = len(matrix)
        together = pattern.inputs_together or self.block_size
        size = max(self.block_size // together, 1) * together  # A group lies in one block.
        kept = np.ones(matrix.shape, bool)
        for begin in range(0, inputs, size):
            end = min(begin + size, inputs)
            part, inverse = matrix[begin:end], factor[begin:end, begin:end]
            errors = np.zeros_like(part)
            for i in range(end - begin):
                if i % together == 0:
                    group = slice(i, min(i + together, end - begin))
                    cost = (part[group] / np.diag(inverse)[group, np.newaxis]) ** 2
                    kept[begin:end][group] = pattern.keep(cost, sparsity)
                stays = kept[begin + i]
                errors[i] = np.where(stays, 0.0, part[i]) / inverse[i, i]
                part[i:] -= np.outer(inverse[i, i:], errors[i])
                part[i] *= stays  # Rounding leaves a trace of what the update took away.
            matrix[end:] -= factor[begin:end, end:].T @ errors
        return kept
