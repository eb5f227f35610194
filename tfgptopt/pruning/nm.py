"""At most n of each m weights: 2:4 and the like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import tensorflow as tf

from tfgptopt.pruning.keeping import count_kept, keep_largest, traced_once


@dataclass(frozen=True, repr=False)
class NM:
    """At most `n` of each `m` weights in a row stay, such as 2:4.

    Along a schedule, only the `m - n` lowest of each group may go, the lowest of the matrix first;
    at sparsity `1 - n / m` the pattern is complete. Where `m` does not divide the axis, the last
    group is shorter and keeps up to `n` as well.

    Args:
        n: int, how many weights of a group stay.
        m: int, size of a group.
        axis: `"input"` or `"output"`: the axis along which the weights of a group lie. Hardware
            for 2:4 wants groups of inputs. Defaults to `"input"`.

    Raises:
        ValueError: If `n` is not between 1 and `m - 1`, or `axis` is neither.

    Reference: Zhou et al., 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks"
    (https://arxiv.org/abs/2102.04010).
    """

    n: int
    m: int
    axis: Literal["input", "output"] = "input"

    takes_allocation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n < self.m):
            raise ValueError(
                f"NM(n, m) keeps n of m weights: 0 < n < m. Received: n={self.n!r}, m={self.m!r}"
            )
        if self.axis not in ("input", "output"):
            raise ValueError(f"`axis` must be 'input' or 'output'. Received: {self.axis!r}")

    def __repr__(self) -> str:
        along = "" if self.axis == "input" else f", axis={self.axis!r}"
        return f"NM(n={self.n}, m={self.m}{along})"

    @property
    def sparsity(self) -> float:
        """Sparsity at which the pattern is complete."""
        return 1.0 - self.n / self.m

    @property
    def inputs_together(self) -> int:
        """How many inputs a choice has to see at once: a group, or one with all its outputs."""
        return self.m if self.axis == "input" else 1

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks of matrices; see `Unstructured.masks`."""
        return [self._mask(tensor, s) for tensor, s in zip(scores, sparsity, strict=True)]

    def _mask(self, scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        may_go = self.outranked(scores)
        whole = tf.size(scores)
        going = tf.math.count_nonzero(may_go, dtype=tf.int32)

        def partial() -> tf.Tensor:
            # What must stay is above everything else.
            rank = tf.where(may_go, scores, tf.float32.max)
            (kept,) = keep_largest([tf.reshape(rank, (1, -1))], count_kept(whole, sparsity))
            return tf.reshape(kept, tf.shape(scores))

        # Asked for 0.66, 1:3 is meant; a short last group keeps a little more than its share.
        complete = whole - count_kept(whole, sparsity) >= going - whole // 100
        return tf.cond(complete, lambda: tf.logical_not(may_go), partial)

    def outranked(self, scores: tf.Tensor) -> tf.Tensor:
        """Marks the weights that at least `n` of their group surpass."""
        if self.axis == "output":
            return tf.transpose(_outranked(tf.transpose(scores), self.n, self.m))
        return _outranked(scores, self.n, self.m)

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a weight has fewer inputs (or outputs) than a group."""
        length = shape[0 if self.axis == "input" else 1]
        if length < self.m:
            raise ValueError(
                f"{path} has {length} {self.axis}s, fewer than one group of {self}. "
                "Leave it out with `targets`."
            )

    def _groups(self, matrix: np.ndarray) -> list[np.ndarray]:
        """Returns views of the groups, each `(members, others)`."""
        rows = matrix if self.axis == "input" else matrix.T
        return [rows[i : i + self.m] for i in range(0, len(rows), self.m)]

    def holds(self, kept: np.ndarray) -> bool:
        """Returns whether no group of a numpy mask `(inputs, outputs)` keeps more than `n`."""
        return all(bool(group.sum(axis=0).max() <= self.n) for group in self._groups(kept))

    def supports(self, score: str) -> bool:
        """Returns whether a score can be used: all can."""
        return True

    def keep(self, scores: np.ndarray, sparsity: float) -> np.ndarray:
        """Returns the complete mask of some inputs, whole groups of them."""
        kept = np.empty(scores.shape, bool)
        for group, chosen in zip(self._groups(scores), self._groups(kept), strict=True):
            order = np.argsort(np.argsort(-group, axis=0, kind="stable"), axis=0)
            chosen[:] = order < self.n
        return kept


@traced_once
def _outranked(scores: tf.Tensor, n: int, m: int) -> tf.Tensor:
    """Marks the weights that at least `n` of their group, `m` inputs, surpass."""
    length, others = scores.shape
    groups = -(-length // m)
    # Padding ranks below everything and takes no place.
    padded = tf.pad(scores, [[0, groups * m - length], [0, 0]], constant_values=-float("inf"))
    padded = tf.reshape(padded, (groups, m, others))
    index = tf.reshape(tf.range(m), (1, m, 1))
    rank = tf.zeros_like(padded, tf.int32)
    for i in range(m):
        other = padded[:, i : i + 1]
        earlier = tf.equal(other, padded) & (index > i)
        rank += tf.cast((other > padded) | earlier, tf.int32)
    return tf.reshape(rank >= n, (-1, others))[:length]
