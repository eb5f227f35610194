"""GPTQ: rounds input by input, and moves the weights still to come so that outputs change least."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgptopt.calibration.statistics import inverse_factor
from tfgptopt.quantization import rounding
from tfgptopt.quantization.rounding import Grid

# How many inputs are rounded between two updates of the rest.
_STRIDE = 128


def gptq(
    matrix: np.ndarray,
    gram: np.ndarray,
    bits: int,
    block_size: int | None = None,
    kept: np.ndarray | None = None,
    damping: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix for inputs with a known Gram matrix.

    Scales are found first, with the smallest squared error weighted by how large each input is.
    Then inputs are rounded in the order of their size, largest first.

    Args:
        matrix: float32 array `(inputs, outputs)`.
        gram: float64 array `(inputs, inputs)`, `X^T X` of the inputs. It is changed.
        bits: 4 or 8.
        block_size: How many inputs share a scale. Defaults to `None`: all.
        kept: bool array of the shape of `matrix`: pruned weights are false, and stay zero.
        damping: float, share of the mean that is added to the diagonal. Defaults to `0.01`.

    Returns:
        `(rounded, scale)`: float32 array of the shape of `matrix` on the grid, and the scale as
        `rounding` has it.

    Reference: Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers" (https://arxiv.org/abs/2210.17323).
    """
    grid = Grid(bits, (0,), block_size)
    sizes = np.einsum("ii->i", gram).copy()
    importance = tf.constant(sizes / max(sizes.mean(), 1e-30), tf.float32)[:, tf.newaxis]
    scale = rounding.mse_scale(tf.constant(matrix), grid, importance)
    by_input = np.repeat(scale.numpy().reshape(-1, matrix.shape[1]), block_size or len(matrix), 0)
    order = np.argsort(-sizes, kind="stable")
    factor = inverse_factor(gram[np.ix_(order, order)], damping)
    mask = None if kept is None else kept[order]
    rounded = np.empty_like(matrix)
    rounded[order] = _round_in_order(
        matrix[order].astype(np.float64), factor, by_input[order], grid.limit, mask
    )
    return rounded, scale.numpy()


def _round_in_order(
    matrix: np.ndarray,
    factor: np.ndarray,
    scale: np.ndarray,
    limit: int,
    kept: np.ndarray | None,
) -> np.ndarray:
    """Rounds the rows of a float64 matrix one after the other; the matrix is changed."""
    rounded = np.empty(matrix.shape, np.float32)
    for begin in range(0, len(matrix), _STRIDE):
        end = min(begin + _STRIDE, len(matrix))
        part, inverse = matrix[begin:end], factor[begin:end, begin:end]
        errors = np.empty_like(part)
        for i in range(end - begin):
            steps = np.clip(np.rint(part[i] / scale[begin + i]), -limit, limit)
            if kept is not None:
                steps *= kept[begin + i]
            rounded[begin + i] = steps * scale[begin + i]
            errors[i] = (part[i] - rounded[begin + i]) / inverse[i, i]
            part[i + 1 :] -= np.outer(inverse[i, i + 1 :], errors[i])
        matrix[end:] -= factor[begin:end, end:].T @ errors
    return rounded
