"""GPTQ: rounds input by input, and moves the weights still to come so that outputs change least.

What comes out is improved by coordinate descent: scales for the integers, integers for the scales.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgptopt.calibration.statistics import damp, inverse_factor
from tfgptopt.quantization import rounding
from tfgptopt.quantization.rounding import Grid

# How many inputs are rounded between two updates of the rest.
_STRIDE = 128
# How often integers are chosen again for the same scales.
_PASSES = 2


def gptq(
    matrix: np.ndarray,
    gram: np.ndarray,
    bits: int,
    block_size: int | None = None,
    kept: np.ndarray | None = None,
    damping: float = 0.01,
    rounds: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix for inputs with a known Gram matrix.

    Scales are found first, with the smallest squared error weighted by how large each input is.
    Then inputs are rounded in the order of their size, largest first. Then in turns each scale is
    fitted to its integers by least squares, and each integer is chosen again, given all others.

    Args:
        matrix: float32 array `(inputs, outputs)`.
        gram: float64 array `(inputs, inputs)`, `X^T X` of the inputs. It is changed.
        bits: 4 or 8.
        block_size: How many inputs share a scale. Defaults to `None`: all.
        kept: bool array of the shape of `matrix`: pruned weights are false, and stay zero.
        damping: float, share of the mean that is added to the diagonal. Defaults to `0.01`.
        rounds: int. How often scales are fitted and integers chosen again. Defaults to `3`.

    Returns:
        `(rounded, scale)`: float32 array of the shape of `matrix` on the grid, and the scale as
        `rounding` has it.

    Reference: Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers" (https://arxiv.org/abs/2210.17323); Behdin et al., 2023, "QuantEase:
    Optimization-based Quantization for Language Models" (https://arxiv.org/abs/2309.01885), for
    the coordinate descent.
    """
    grid = Grid(bits, (0,), block_size)
    sizes = np.einsum("ii->i", gram).copy()
    importance = tf.constant(sizes / max(sizes.mean(), 1e-30), tf.float32)[:, tf.newaxis]
    scale = rounding.mse_scale(tf.constant(matrix), grid, importance)
    scales = scale.numpy().reshape(-1, matrix.shape[1])
    by_input = np.repeat(scales, len(matrix) // len(scales), 0)
    order = np.argsort(-sizes, kind="stable")
    factor = inverse_factor(gram[np.ix_(order, order)], damping)
    mask = None if kept is None else kept[order]
    integers = np.empty(matrix.shape)
    integers[order] = _round_in_order(
        matrix[order].astype(np.float64), factor, by_input[order], grid.limit, mask
    )
    damp(gram, damping)
    scales = scales.astype(np.float64)
    # How the squared error changes with each rounded weight, by half.
    slope = gram @ (integers * np.repeat(scales, len(matrix) // len(scales), 0) - matrix)
    for _ in range(rounds):
        _fit_scales(integers, scales, slope, gram, grid)
        _choose_again(integers, scales, slope, gram, grid.limit, kept)
    found = scales.astype(np.float32).reshape(scale.shape)
    return grid.decode(tf.constant(integers, tf.float32), tf.constant(found)).numpy(), found


def _round_in_order(
    matrix: np.ndarray,
    factor: np.ndarray,
    scale: np.ndarray,
    limit: int,
    kept: np.ndarray | None,
) -> np.ndarray:
    """Returns integers for the rows of a float64 matrix, one after the other; it is changed."""
    integers = np.empty(matrix.shape)
    for begin in range(0, len(matrix), _STRIDE):
        end = min(begin + _STRIDE, len(matrix))
        part, inverse = matrix[begin:end], factor[begin:end, begin:end]
        errors = np.empty_like(part)
        for i in range(end - begin):
            steps = np.clip(np.rint(part[i] / scale[begin + i]), -limit, limit)
            if kept is not None:
                steps *= kept[begin + i]
            integers[begin + i] = steps
            errors[i] = (part[i] - steps * scale[begin + i]) / inverse[i, i]
            part[i + 1 :] -= np.outer(inverse[i, i + 1 :], errors[i])
        matrix[end:] -= factor[begin:end, end:].T @ errors
    return integers


def _fit_scales(
    integers: np.ndarray, scales: np.ndarray, slope: np.ndarray, gram: np.ndarray, grid: Grid
) -> None:
    """Changes scales `(blocks, outputs)` to those of the least error, and the slope with them.

    One block after the other, each given those before it.
    """
    size = len(integers) // len(scales)
    for i, scale in enumerate(scales):
        block = slice(i * size, (i + 1) * size)
        columns, whole = gram[:, block], integers[block]
        curvature = np.einsum("io,io->o", columns[block] @ whole, whole)
        down = np.einsum("io,io->o", whole, slope[block])
        fitted = scale - np.divide(down, curvature, where=curvature > 0, out=np.zeros_like(down))
        # Next to nothing holds a scale that would go far.
        fitted = np.clip(fitted, scale / 2, scale * 2)
        fitted = grid.representable(tf.constant(fitted, tf.float32)).numpy()
        slope += columns @ (whole * (fitted - scale))
        scales[i] = fitted


def _choose_again(
    integers: np.ndarray,
    scales: np.ndarray,
    slope: np.ndarray,
    gram: np.ndarray,
    limit: int,
    kept: np.ndarray | None,
) -> None:
    """Changes integers to the best ones given all others, and the slope with them."""
    by_input = np.repeat(scales, len(integers) // len(scales), 0)
    for begin in [*range(0, len(integers), _STRIDE)] * _PASSES:
        part = slice(begin, begin + _STRIDE)
        near, block = slope[part].copy(), gram[part, part]
        moved = np.empty_like(near)
        for i, scale in enumerate(by_input[part]):
            steps = integers[begin + i] - near[i] / (block[i, i] * scale)
            steps = np.clip(np.rint(steps), -limit, limit)
            if kept is not None:
                steps *= kept[begin + i]
            moved[i] = (steps - integers[begin + i]) * scale
            integers[begin + i] = steps
            near[i + 1 :] += np.outer(block[i + 1 :, i], moved[i])
        slope += gram[:, part] @ moved
