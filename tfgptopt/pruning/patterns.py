"""Which weights go together when a matrix is pruned.

A pattern turns scores into a mask. It sees a weight as a matrix `(inputs, outputs)`, whatever the
rank of the variable is, and knows nothing of how the scores came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

_SMALLEST, _LARGEST = -(2**31), 2**31 - 1


def _ordered_bits(scores: tf.Tensor) -> tf.Tensor:
    """Returns int32 numbers that are ordered as the floats are."""
    bits = tf.bitcast(scores + 0.0, tf.int32)  # Adding zero turns -0.0 into 0.0.
    return tf.where(bits < 0, bits ^ _LARGEST, bits)


def _total(values: list[tf.Tensor]) -> tf.Tensor:
    """Returns how many are true in each row, over all tensors, `(rows, 1)`."""
    counts = [tf.math.count_nonzero(v, axis=1, keepdims=True, dtype=tf.int32) for v in values]
    return tf.add_n(counts)


def _threshold_of_one_row(patterns: list[tf.Tensor], count: tf.Tensor) -> tf.Tensor:
    """Returns the `count`-th largest number, from two histograms of 16 bits each."""
    digits = 2**16

    def find(values: list[tf.Tensor], wanted: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the digit that holds the `wanted`-th largest, and how many are above it."""
        flat = [tf.reshape(v, (-1,)) for v in values]
        bins = tf.add_n([tf.math.bincount(v, minlength=digits, maxlength=digits) for v in flat])
        at_least = tf.cumsum(bins, reverse=True)
        digit = tf.math.count_nonzero(at_least >= wanted, dtype=tf.int32) - 1
        return digit, at_least[digit] - bins[digit]

    count = tf.reshape(count, ())
    # Shifting keeps the sign, so the high digits go from -32768 to 32767.
    high, above = find([tf.bitwise.right_shift(p, 16) + digits // 2 for p in patterns], count)
    high -= digits // 2
    same = [tf.boolean_mask(p, tf.equal(tf.bitwise.right_shift(p, 16), high)) for p in patterns]
    low, _ = find([p & (digits - 1) for p in same], count - above)
    return tf.reshape(tf.bitwise.left_shift(high, 16) | low, (1, 1))


def _threshold_of_each_row(patterns: list[tf.Tensor], count: tf.Tensor) -> tf.Tensor:
    """Returns the `count`-th largest number of each row, by bisecting: 32 passes over the data."""

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        middle = low + (high - low + 1) // 2
        enough = _total([p >= tf.cast(middle, tf.int32) for p in patterns]) >= count
        return tf.where(enough, middle, low), tf.where(enough, high, middle - 1)

    rows = (tf.shape(patterns[0])[0], 1)
    bounds = (tf.fill(rows, tf.constant(b, tf.int64)) for b in (_SMALLEST, _LARGEST))
    found, _ = tf.while_loop(
        lambda low, high: tf.reduce_any(low < high), halve, tuple(bounds), parallel_iterations=1
    )
    return tf.cast(found, tf.int32)


def keep_largest(scores: list[tf.Tensor], count: tf.Tensor) -> list[tf.Tensor]:
    """Marks the `count` largest scores of each row, ties broken by position.

    It looks for a threshold instead of sorting, and makes no copy of several tensors into one.

    Args:
        scores: float32 tensors of shape `(rows, columns)`; a row goes on from tensor to tensor.
        count: int32 scalar, how many to keep in each row.

    Returns:
        bool tensors with the shapes of `scores`.
    """
    patterns = [_ordered_bits(tensor) for tensor in scores]
    single = scores[0].shape[0] == 1
    find = _threshold_of_one_row if single else _threshold_of_each_row
    threshold = find(patterns, count)
    above = [pattern > threshold for pattern in patterns]
    places = count - _total(above)
    kept = []
    for pattern, larger in zip(patterns, above, strict=True):
        ties = tf.equal(pattern, threshold)
        order = tf.cumsum(tf.cast(ties, tf.int32), axis=1)
        kept.append(larger | (ties & (order <= places)))
        places -= order[:, -1:]
    return kept


def _count(size: tf.Tensor | int, sparsity: tf.Tensor) -> tf.Tensor:
    """Returns how many of `size` to keep: as many as tfmot does, and one at least."""
    kept = tf.round(tf.cast(size, tf.float32) * (1.0 - sparsity))
    return tf.maximum(tf.cast(kept, tf.int32), 1)


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
            kept = [_count(n, s) for n, s in zip(sizes, sparsity, strict=True)]
            flat = [tf.reshape(tensor, (1, -1)) for tensor in scores]
            found = keep_largest(flat, tf.add_n(kept))
            return [tf.reshape(m, tf.shape(s)) for m, s in zip(found, scores, strict=True)]
        single = self._of_output if self.scope == "output" else self._of_tensor
        return [single(tensor, s) for tensor, s in zip(scores, sparsity, strict=True)]

    @staticmethod
    def _of_tensor(scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        (mask,) = keep_largest([tf.reshape(scores, (1, -1))], _count(tf.size(scores), sparsity))
        return tf.reshape(mask, tf.shape(scores))

    @staticmethod
    def _of_output(scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        (mask,) = keep_largest([tf.transpose(scores)], _count(tf.shape(scores)[0], sparsity))
        return tf.transpose(mask)

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a weight cannot have the pattern; any can."""

    def holds(self, kept: Any) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has the pattern; any has."""
        return True


@dataclass(frozen=True)
class NM:
    """At most `n` of each `m` weights in a row along the inputs stay, such as 2:4.

    Along a schedule, only the `m - n` lowest of each group may go, the lowest of the matrix first;
    at sparsity `1 - n / m` the pattern is complete. Where `m` does not divide the inputs, the last
    group is shorter and keeps up to `n` as well.

    Args:
        n: int, how many weights of a group stay.
        m: int, size of a group.

    Raises:
        ValueError: If `n` is not between 1 and `m - 1`.

    Reference: Zhou et al., 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks"
    (https://arxiv.org/abs/2102.04010).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n < self.m):
            raise ValueError(
                f"NM(n, m) keeps n of m weights: 0 < n < m. Received: n={self.n!r}, m={self.m!r}"
            )

    @property
    def sparsity(self) -> float:
        """Sparsity at which the pattern is complete."""
        return 1.0 - self.n / self.m

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks of matrices; see `Unstructured.masks`."""
        return [self._mask(tensor, s) for tensor, s in zip(scores, sparsity, strict=True)]

    def _mask(self, scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        may_go = self._outranked(scores)
        whole = tf.size(scores)
        going = tf.math.count_nonzero(may_go, dtype=tf.int32)

        def partial() -> tf.Tensor:
            # What must stay is above everything else.
            rank = tf.where(may_go, scores, tf.float32.max)
            (kept,) = keep_largest([tf.reshape(rank, (1, -1))], _count(whole, sparsity))
            return tf.reshape(kept, tf.shape(scores))

        # Asked for 0.66, 1:3 is meant; a short last group keeps a little more than its share.
        complete = whole - _count(whole, sparsity) >= going - whole // 100
        return tf.cond(complete, lambda: tf.logical_not(may_go), partial)

    def _outranked(self, scores: tf.Tensor) -> tf.Tensor:
        """Marks the weights that at least `n` of their group surpass."""
        inputs, outputs = scores.shape
        groups = -(-inputs // self.m)
        # Padding ranks below everything and takes no place.
        padded = tf.pad(
            scores, [[0, groups * self.m - inputs], [0, 0]], constant_values=-float("inf")
        )
        padded = tf.reshape(padded, (groups, self.m, outputs))
        index = tf.reshape(tf.range(self.m), (1, self.m, 1))
        rank = tf.zeros_like(padded, tf.int32)
        for i in range(self.m):
            other = padded[:, i : i + 1]
            earlier = tf.equal(other, padded) & (index > i)
            rank += tf.cast((other > padded) | earlier, tf.int32)
        return tf.reshape(rank >= self.n, (-1, outputs))[:inputs]

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a weight has fewer inputs than a group."""
        if shape[0] < self.m:
            raise ValueError(
                f"{path} has {shape[0]} inputs, fewer than one group of NM({self.n}, {self.m}). "
                "Leave it out with `targets`."
            )

    def holds(self, kept: Any) -> bool:
        """Returns whether no group of a numpy mask `(inputs, outputs)` keeps more than `n`."""
        counts = (kept[i : i + self.m].sum(axis=0).max() for i in range(0, len(kept), self.m))
        return bool(max(counts) <= self.n)


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
    (kept,) = keep_largest([tf.reshape(pooled, (1, -1))], _count(tf.size(pooled), sparsity))
    blocks = tf.reshape(kept, tf.shape(pooled))
    spread = tf.repeat(tf.repeat(blocks, rows, axis=0), columns, axis=1)
    return spread[: scores.shape[0], : scores.shape[1]]


def _blocks_hold(kept: Any, rows: int, columns: int) -> bool:
    """Returns whether every block of a numpy mask is either kept or dropped as a whole."""
    for i in range(0, kept.shape[0], rows):
        band = kept[i : i + rows]
        if (band != band[:1]).any():
            return False
        for j in range(0, kept.shape[1], columns):
            if (band[0, j : j + columns] != band[0, j]).any():
                return False
    return True


@dataclass(frozen=True)
class Block:
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

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks of matrices; see `Unstructured.masks`."""
        return [
            _block_mask(x, s, self.rows, self.columns)
            for x, s in zip(scores, sparsity, strict=True)
        ]

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a block is larger than a weight."""
        if self.rows > shape[0] or self.columns > shape[1]:
            raise ValueError(
                f"A block of {self.rows} x {self.columns} does not fit into {path}, which has "
                f"{shape[0]} inputs and {shape[1]} outputs. Choose a smaller block, or leave it "
                "out with `targets`."
            )

    def holds(self, kept: Any) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has only whole blocks."""
        return _blocks_hold(kept, self.rows, self.columns)


@dataclass(frozen=True)
class Rows:
    """Whole inputs of a matrix go: all weights that read one input."""

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks of matrices; see `Unstructured.masks`."""
        pairs = zip(scores, sparsity, strict=True)
        return [_block_mask(x, s, 1, x.shape[1]) for x, s in pairs]

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a weight cannot have the pattern; any can."""

    def holds(self, kept: Any) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has only whole rows."""
        return bool((kept == kept[:, :1]).all())


@dataclass(frozen=True)
class Columns:
    """Whole outputs of a matrix go: all weights of a neuron. Its bias stays."""

    def masks(self, scores: list[tf.Tensor], sparsity: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the masks of matrices; see `Unstructured.masks`."""
        pairs = zip(scores, sparsity, strict=True)
        return [_block_mask(x, s, x.shape[0], 1) for x, s in pairs]

    def check(self, shape: tuple[int, int], path: str) -> None:
        """Raises if a weight cannot have the pattern; any can."""

    def holds(self, kept: Any) -> bool:
        """Returns whether a numpy mask `(inputs, outputs)` has only whole columns."""
        return bool((kept == kept[:1]).all())


Pattern = Unstructured | NM | Block | Rows | Columns


def check_reaches(pattern: Pattern, sparsity: float | None) -> None:
    """Raises if a pattern with a sparsity of its own is to end at another.

    Raises:
        ValueError: If it is.
    """
    if sparsity is None or not isinstance(pattern, NM):
        return
    if abs(sparsity - pattern.sparsity) > 0.01:
        raise ValueError(
            f"{pattern} is complete at sparsity {pattern.sparsity:.3g}, but is asked for "
            f"{sparsity:.3g}. End the schedule at {pattern.sparsity:.3g}, or choose another n:m."
        )


def check_pattern(pattern: Any) -> None:
    """Raises unless `pattern` is one.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(pattern, Pattern):
        raise ValueError(
            "`pattern` must be Unstructured(), NM(2, 4), Block(rows, columns), Rows() or "
            f"Columns(). Received: {pattern!r}"
        )
