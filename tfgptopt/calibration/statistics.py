"""What one-shot methods gather of the inputs of layers: observers for calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.model.targets import Target


class Grams:
    """Sums the products of inputs with each other, `X^T X`, for each target.

    An observer. Layers that read the same rows share one matrix, and so does each expert of them.
    """

    def __init__(self) -> None:
        self._grams: dict[int, tf.Tensor] = {}
        self._keys: dict[Any, int] = {}
        self._last: dict[int | None, tuple[tf.Tensor, int]] = {}

    def __call__(self, target: Target, rows: tf.Tensor) -> None:
        last, number = self._last.get(target.expert, (None, -1))
        shared = rows is last
        key = self._keys.setdefault(target.key, number if shared else len(self._keys))
        if not (shared and key == number):
            product = tf.matmul(rows, rows, transpose_a=True)
            self._grams[key] = self._grams[key] + product if key in self._grams else product
        self._last[target.expert] = rows, key

    def of(self, target: Target) -> np.ndarray | None:
        """Returns the float64 matrix `(inputs, inputs)` of a target, or `None` if it read nothing.

        Raises:
            ValueError: If it is not finite.
        """
        if target.key not in self._keys:
            return None
        gram: np.ndarray = self._grams[self._keys[target.key]].numpy()
        check_finite(target, gram)
        return gram.astype(np.float64)


def damp(gram: np.ndarray, damping: float) -> None:
    """Adds a share of the mean to the diagonal of a Gram matrix, in place.

    Args:
        gram: float64 array `(inputs, inputs)`.
        damping: float, the share.
    """
    diagonal = np.einsum("ii->i", gram)  # A view.
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0  # Inputs that are always zero.


def inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """Returns the upper factor `U` with `U^T U` the inverse of a damped Gram matrix.

    Args:
        gram: float64 array `(inputs, inputs)`. It is changed.
        damping: float, share of the mean that is added to the diagonal.

    Returns:
        float64 array `(inputs, inputs)`.
    """
    damp(gram, damping)
    return np.linalg.cholesky(np.linalg.inv(gram)).T


class SquaredSums:
    """Sums the squares of each input of each target. An observer.

    Args:
        targets: The targets that will be shown.
    """

    def __init__(self, chosen: list[Target]) -> None:
        self._sums = {
            part.key: tf.zeros(part.matrix_shape[0]) for target in chosen for part in target.parts
        }
        self._seen: set[Any] = set()

    def __call__(self, target: Target, rows: tf.Tensor) -> None:
        self._seen.add(target.key)
        self._sums[target.key] += tf.reduce_sum(tf.square(rows), axis=0)

    def unread(self, target: Target) -> list[Target]:
        """Returns the parts of a target that read no row: experts that got no token."""
        return [part for part in target.parts if part.key not in self._seen]

    def norms(self, target: Target) -> tf.Tensor:
        """Returns the norm of each input, float32 `(inputs, parts)`.

        An expert that got no token has the mean of all others, the same for all inputs.

        Raises:
            ValueError: If the target was never shown, or a norm is not finite.
        """
        unread = {part.key for part in self.unread(target)}
        if len(unread) == len(target.parts):
            raise ValueError(f"The model does not call the layer of {target.path} on the data.")
        found = [tf.sqrt(self._sums[part.key]) for part in target.parts]
        read = [norm for part, norm in zip(target.parts, found, strict=True)
                if part.key not in unread]  # fmt: skip
        check_finite(target, np.stack([norm.numpy() for norm in read]))
        other = tf.fill((target.matrix_shape[0],), tf.reduce_mean(tf.stack(read)))
        norms = [other if part.key in unread else norm
                 for part, norm in zip(target.parts, found, strict=True)]  # fmt: skip
        return tf.stack(norms, axis=1)


def by_weight(norms: tf.Tensor, target: Target) -> tf.Tensor:
    """Returns norms `(inputs, parts)` so that they broadcast with the matrix of a target."""
    parts, outputs = norms.shape[1], target.matrix_shape[1]
    return norms if parts == 1 else tf.repeat(norms, outputs // parts, axis=1)


def check_finite(target: Target, statistics: np.ndarray) -> None:
    """Raises unless the statistics of a target are finite.

    Raises:
        ValueError: If they are not.
    """
    if not np.isfinite(statistics).all():
        raise ValueError(
            f"What goes into {target.path} is NaN or infinite on the calibration data."
        )
