"""Orthogonal matrices that spread what stands out over all features."""

from __future__ import annotations

import functools
import math

import numpy as np

# Features that are turned together: a matrix has the square of that many numbers.
_LARGEST = 16_384


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))


def _jacobsthal(prime: int) -> np.ndarray:
    """Returns whether differences are squares modulo a prime: 1, or else -1, and 0 for zero."""
    squares = {i * i % prime for i in range(1, prime)}
    kinds = np.asarray([0, *(1 if i in squares else -1 for i in range(1, prime))])
    places = np.arange(prime)
    return kinds[(places[:, np.newaxis] - places) % prime]


def _paley(size: int) -> np.ndarray | None:
    """Returns a Hadamard matrix of Paley's first or second construction, or `None`."""
    prime = size - 1
    if prime % 4 == 3 and _is_prime(prime):
        bordered = np.ones((size, size))
        bordered[0, 0], bordered[1:, 0] = 0, -1
        bordered[1:, 1:] = _jacobsthal(prime)
        return bordered + np.eye(size)
    prime = size // 2 - 1
    if size % 2 == 0 and prime % 4 == 1 and _is_prime(prime):
        bordered = np.ones((prime + 1, prime + 1))
        bordered[0, 0] = 0
        bordered[1:, 1:] = _jacobsthal(prime)
        kept, diagonal = np.asarray([[1, 1], [1, -1]]), np.asarray([[1, -1], [-1, -1]])
        return np.kron(bordered, kept) + np.kron(np.eye(prime + 1), diagonal)
    return None


def hadamard(size: int) -> np.ndarray | None:
    """Returns a Hadamard matrix: of ones and minus ones, with orthogonal rows.

    Args:
        size: int >= 1.

    Returns:
        float64 array `(size, size)` by the constructions of Sylvester and Paley, or `None` where
        they give none.

    Reference: Paley, 1933, "On Orthogonal Matrices".

    Example:

    ```python
    hadamard(12) @ hadamard(12).T  # 12 on the diagonal, else 0
    ```
    """
    doubled = 0
    while size % 2 == 0 and _paley(size) is None and size > 1:
        size, doubled = size // 2, doubled + 1
    core = np.ones((1, 1)) if size == 1 else _paley(size)
    if core is None:
        return None
    for _ in range(doubled):
        core = np.kron(np.asarray([[1, 1], [1, -1]]), core)
    return core


def _random_orthogonal(size: int, generator: np.random.Generator) -> np.ndarray:
    """Returns a matrix of which all are equally likely."""
    found, upper = np.linalg.qr(generator.normal(size=(size, size)))
    return found * np.sign(np.diag(upper))


@functools.lru_cache(maxsize=8)
def orthogonal(size: int, seed: int, keeps_mean: bool = False) -> np.ndarray:
    """Returns an orthogonal matrix by which rows of features can be turned.

    Args:
        size: int >= 1. Number of features.
        seed: int. The same seed gives the same matrix.
        keeps_mean: bool. Whether the mean over all features stays as it is, so that turning and
            layer normalization can change places. Defaults to `False`.

    Returns:
        float32 array `(size, size)`, which is not to be changed: a Hadamard matrix with random
        signs if there is one, else a random one.

    Raises:
        ValueError: If there are too many features.

    Reference: Ashkboos et al., 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
    (https://arxiv.org/abs/2404.00456); Ashkboos et al., 2024, "SliceGPT: Compress Large Language
    Models by Deleting Rows and Columns" (https://arxiv.org/abs/2401.15024).

    Example:

    ```python
    matrix = orthogonal(64, seed=0)
    np.allclose(matrix @ matrix.T, np.eye(64), atol=1e-6)
    ```
    """
    if size > _LARGEST:
        raise ValueError(f"At most {_LARGEST} features are turned together. Received: {size}")
    generator = np.random.default_rng(seed)
    if keeps_mean:
        found = _around_ones(size, generator)
    else:
        core = hadamard(size)
        signs = generator.choice([-1.0, 1.0], (size, 1))
        found = _random_orthogonal(size, generator) if core is None else signs * core / size**0.5
    found = found.astype(np.float32)
    found.flags.writeable = False
    return found


def _around_ones(size: int, generator: np.random.Generator) -> np.ndarray:
    """Returns a random orthogonal matrix that leaves a row of ones as it is."""
    turned = np.eye(size)
    if size > 1:
        turned[1:, 1:] = _random_orthogonal(size - 1, generator)
    # The reflection that swaps the first axis and the row of ones.
    axis = np.full(size, size**-0.5)
    axis[0] -= 1.0
    norm = axis @ axis
    reflection = np.eye(size) - (2.0 / norm if norm else 0.0) * np.outer(axis, axis)
    return reflection @ turned @ reflection
