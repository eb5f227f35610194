"""Weights that go one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import tensorflow as tf

from tfgptopt.pruning.keeping import count_kept, keep_largest


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go: best quality for a sparsity, a smaller download, no speed.

    Args:
        scope: Which weights compete with each other. `"tensor"`: those of one kernel; `"output"`:
            those of one output neuron, as Wanda proposes; `"model"`: all that are pruned, so that
            unimportant layers lose more. Defaults to `"tensor"`.

    Raises:
        ValueError: If `scope` is none of these.

    Reference: Zhu and Gupta, 2017, "To prune, or not to prune" (https://arxiv.org/abs/1710.01878).
    """

    scope: Literal["tensor", "output", "model"] = "tensor"

    sparsity: ClassVar[None] = None
    inputs_together: ClassVar[None] = None

    @property
    def takes_allocation(self) -> bool:
        """Whether each weight may have a sparsity of its own."""
        return self.scope != "model"

    def __post_init__(self) -> None:
        if self.scope not in ("tensor", "output", "model"):
            raise ValueError(
                f"`scope` must be 'tensor', 'output' or 'model'. Received: {self.scope!r}"
            )

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks that keep the highest scores.

        Args:
            scores: float32 tensors of shape `(inputs, outputs)`, one for each weight.
            sparsity: float32 scalars in `[0, 1)`, one for each weight. With `scope="model"` they
                are weighted into one.

        Returns:
            bool tensors with the shapes of `scores`.
        """
        if self.scope == "model":
            sizes = [tf.size(tensor, tf.int64) for tensor in scores]
            kept = [count_kept(n, s) for n, s in zip(sizes, sparsity, strict=True)]
            flat = [tf.reshape(tensor, (1, -1)) for tensor in scores]
            found = keep_largest(flat, tf.add_n(kept))
            return [tf.reshape(m, tf.shape(s)) for m, s in zip(found, scores, strict=True)]
        single = self._of_output if self.scope == "output" else self._of_tensor
        return [single(tensor, s) for tensor, s in zip(scores, sparsity, strict=True)]

    @staticmethod
    def _of_tensor(scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        (mask,) = keep_largest([tf.reshape(scores, (1, -1))], count_kept(tf.size(scores), sparsity))
        return tf.reshape(mask, tf.shape(scores))

    @staticmethod
    def _of_output(scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        (mask,) = keep_largest([tf.transpose(scores)], count_kept(tf.shape(scores)[0], sparsity))
        return tf.transpose(mask)

    def units(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns the scores of what goes together: each weight is alone."""
        return scores

    def mask_of(self, kept: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        """Returns the mask of a matrix that keeps some of its `units`."""
        return kept

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a weight cannot have the pattern; any can."""

    def holds(self, kept: np.ndarray) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has the pattern; any has."""
        return True

    def supports(self, score: str) -> bool:
        """Returns whether a score can be used: all, and SparseGPT with weights of one tensor."""
        return score != "sparsegpt" or self.scope == "tensor"

    def keep(self, scores: np.ndarray, sparsity: float) -> np.ndarray:
        """Returns the mask that keeps the highest scores of some inputs."""
        kept = np.ones(scores.size, bool)
        kept[np.argsort(scores, axis=None, kind="stable")[: round(scores.size * sparsity)]] = False
        return kept.reshape(scores.shape)
