"""Block by block through a model whose weights are corrected for what their inputs are."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import batches_of, rows_of
from tfgptopt.calibration.blocks import block_by_block, targets_by_block
from tfgptopt.calibration.statistics import Grams
from tfgptopt.calibration.watching import Observer, advancing
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import Stage, stage

# How much dearer double precision is, and what each input costs beside: of GPTQ on matrices from
# 640x1024 to 3072x768, on two cores with AVX512. They are good for a time left, no more.
_OF_FACTOR, _OF_INPUT = 7.0, 15_000.0


def _reading(target: Target) -> float:
    """Returns what it costs to read a row: through the block, and into the Gram matrix.

    All experts read all rows, and each has a matrix of those that it got.
    """
    return float(target.size + target.matrix_shape[0] ** 2)


def _correcting(target: Target) -> float:
    """Returns what it costs to go through a matrix input by input, correcting the rest.

    It is counted as reading is: in multiplications as a product of floats does them.
    """
    inputs, outputs = target.matrix_shape
    return _OF_FACTOR * inputs**3 + _OF_INPUT * inputs * outputs + inputs**2 * outputs


def grams_by_block(
    model: keras.Layer, chosen: list[Target], data: Data, name: str, known: int = 0
) -> Iterator[tuple[int, Iterator[tuple[Target, Iterator[tuple[Target, np.ndarray | None]]]]]]:
    """Yields each block with the Gram matrices of its inputs, and shows how far it is.

    The weights of a block may be changed before the next is asked for, which then sees what the
    changed block gives: see `block_by_block`.

    Args:
        model: A built Keras 3 model.
        chosen: Kernels of it.
        data: See `batches_of`.
        name: What is done with them, such as `"GPTQ"`.
        known: int. How many of the first blocks need no matrices: who asks knows what they become.
            Defaults to `0`.

    Yields:
        `(number, members)`, the number of a block from 1 on and its targets, each as `(target,
        parts)`. Parts are what `Target.parts` has, each with a float64 array `(inputs, inputs)`
        that may be changed, or `None` for an expert that read no row; those of a block that is
        known are none.

    Raises:
        ValueError: If there is no data, the model cannot read it, or it does not call a target.
    """
    batches, groups = batches_of(data), targets_by_block(model, chosen)
    rows = sum(rows_of(batch) for batch in batches)
    left = [part for group in groups[known:] for target in group for part in target.parts]
    # Blocks that are known are called once, so that the others see what they give.
    passing = sum(float(rows * target.size) for group in groups[:known] for target in group)
    passing = passing if left else 0.0
    with stage(name, passing + sum(rows * _reading(t) + _correcting(t) for t in left)) as shown:
        for i, (members, run) in enumerate(block_by_block(model, chosen, batches), 1):
            shown.say(f"{name}, block {i} of {len(groups)}")
            if i <= known:
                yield i, ((target, iter(())) for target in members)
                continue
            grams = Grams()
            observe = advancing(grams, shown, _reading)
            run(_advancing_first(observe, shown, passing) if i == known + 1 else observe)
            yield i, _with_grams(members, grams, shown)


def _with_grams(
    members: list[Target], grams: Grams, shown: Stage
) -> Iterator[tuple[Target, Iterator[tuple[Target, np.ndarray | None]]]]:
    for target in members:
        yield target, ((part, grams.of(part)) for part in target.parts)
        shown.advance(sum(_correcting(part) for part in target.parts))


def _advancing_first(observe: Observer, shown: Stage, work: float) -> Observer:
    """Returns an observer that says at its first row that so much work lies behind it."""
    waiting = [work]

    def observed(target: Target, rows: tf.Tensor) -> None:
        while waiting:
            shown.advance(waiting.pop())
        observe(target, rows)

    return observed
