"""What one-shot methods gather of the inputs of layers: observers for calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.model.targets import Target


class Grams:
    """Sums the products of inputs with each other, `X^T X`, for each target.

    An observer. Layers that read the same rows share one matrix.
    """

    def __init__(self) -> None:
        self._grams: dict[int, tf.Tensor] = {}
        self._keys: dict[int, int] = {}
        self._last: Any = None

    def __call__(self, target: Target, rows: tf.Tensor) -> None:
        shared = self._last is not None and rows is self._last[0]
        key = self._keys.get(id(target.variable))
        if key is None:
            key = self._last[1] if shared else len(self._keys)
            self._keys[id(target.variable)] = key
        if not (shared and key == self._last[1]):
            product = tf.matmul(rows, rows, transpose_a=True)
            self._grams[key] = self._grams[key] + product if key in self._grams else product
        self._last = rows, key

    def of(self, target: Target) -> np.ndarray:
        """Returns the float64 matrix `(inputs, inputs)` of a target.

        Raises:
            ValueError: If it is not finite.
        """
        gram: np.ndarray = self._grams[self._keys[id(target.variable)]].numpy()
        check_finite(target, gram)
        return gram.astype(np.float64)


def inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """Returns the upper factor `U` with `U^T U` the inverse of a damped Gram matrix.

    Args:
        gram: float64 array `(inputs, inputs)`. It is changed.
        damping: float, share of the mean that is added to the diagonal.

    Returns:
        float64 array `(inputs, inputs)`.
    """
    diagonal = np.einsum("ii->i", gram)  # A view.
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0  # Inputs that are always zero.
    return np.linalg.cholesky(np.linalg.inv(gram)).T


class SquaredSums:
    """Sums the squares of each input of each target. An observer.

    Args:
        targets: The targets that will be shown.
    """

    def __init__(self, chosen: list[Target]) -> None:
        self._sums = {id(t.variable): tf.zeros(t.matrix_shape[0]) for t in chosen}
        self._seen: set[int] = set()

    def __call__(self, target: Target, rows: tf.Tensor) -> None:
        self._seen.add(id(target.variable))
        self._sums[id(target.variable)] += tf.reduce_sum(tf.square(rows), axis=0)

    def norms(self, target: Target) -> tf.Tensor:
        """Returns the norm of each input, float32 `(inputs,)`.

        Raises:
            ValueError: If the target was never shown, or a norm is not finite.
        """
        if id(target.variable) not in self._seen:
            raise ValueError(f"The model does not call the layer of {target.path} on the data.")
        norms = tf.sqrt(self._sums[id(target.variable)])
        check_finite(target, norms.numpy())
        return norms


def check_finite(target: Target, statistics: np.ndarray) -> None:
    """Raises unless the statistics of a target are finite.

    Raises:
        ValueError: If they are not.
    """
    if not np.isfinite(statistics).all():
        raise ValueError(
            f"What goes into {target.path} is NaN or infinite on the calibration data."
        )
