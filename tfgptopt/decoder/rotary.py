"""How positions turn queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation of queries and keys by an angle that grows with the position.

    Feature `i` of the first half of the rotated features turns together with feature `i` of the
    second half. Features behind those pass as they are.

    Attributes:
        frequencies: float32 angle per position, one for each pair: all scaling is in them.
        magnitude: Factor on the rotated features.
        long_frequencies: Frequencies for contexts of more than `original_length` positions, or
            `None` if they are the same.
        original_length: See `long_frequencies`.
    """

    frequencies: np.ndarray
    magnitude: float = 1.0
    long_frequencies: np.ndarray | None = None
    original_length: int | None = None

    @property
    def size(self) -> int:
        """Number of rotated features of a head."""
        return 2 * self.frequencies.size

    def table(self, context_length: int) -> np.ndarray:
        """Returns cosines and sines of each position, float32 `(context_length, size)`."""
        frequencies = self.frequencies
        if self.long_frequencies is not None and self.original_length is not None:
            longer = context_length > self.original_length
            frequencies = self.long_frequencies if longer else frequencies
        angles = np.outer(np.arange(context_length, dtype=np.float32), frequencies)
        both = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return (both * self.magnitude).astype(np.float32)

    def __str__(self) -> str:
        turning = self.frequencies[self.frequencies > 0]
        longest = 2 * np.pi / float(turning.min())
        text = f"rotary over {2 * turning.size} features, wavelengths up to {longest:.0f}"
        if self.magnitude != 1.0:
            text += f", times {self.magnitude:.3g}"
        if self.long_frequencies is not None:
            text += f", others above {self.original_length} positions"
        return text
