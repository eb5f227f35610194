"""Integrals along a way whose two ends are known, to a known error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Gauss and Legendre's points of a piece.
_POINTS = 8
# How far the slopes of a piece may miss the difference of its ends, of all that there is.
_CLOSE = 5e-5
# What changes in a shorter piece is a jump, which has no slopes.
_HALVINGS = 12

Ask = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def integrate(ask: Ask, pieces: int = 8) -> tuple[np.ndarray, float, float]:
    """Integrates slopes from 0 to 1 by Gauss and Legendre's rule.

    Pieces whose slopes do not sum to the difference of their ends are halved until they do.

    Args:
        ask: Places on the way to the heights there, `(places,)`, and to the parts of the slope,
            `(places, parts)`, which sum to the slope.
        pieces: How many equal pieces to begin with. Defaults to `8`.

    Returns:
        `(integrals, end, begin)`: float64 `(parts,)`, and the heights at 1 and at 0.
    """
    places, weights = np.polynomial.legendre.leggauss(_POINTS)
    bounds = np.linspace(0.0, 1.0, pieces + 1)
    heights, _ = ask(bounds)
    begin, end = float(heights[0]), float(heights[-1])
    close = _CLOSE * max(1.0, abs(end - begin))
    left, right = bounds[:-1], bounds[1:]
    low, high = heights[:-1], heights[1:]
    total: np.ndarray | float = 0.0
    for halving in range(_HALVINGS + 1):
        half = (right - left) / 2
        asked = (left + half)[:, None] + half[:, None] * places
        _, slopes = ask(asked.reshape(-1))
        sums = np.einsum("npv,p,n->nv", slopes.reshape(*asked.shape, -1), weights, half)
        kept = np.abs(sums.sum(-1) - (high - low)) <= close
        kept |= halving == _HALVINGS
        total = total + sums[kept].sum(0)
        if kept.all():
            break
        left, right, low, high = (one[~kept] for one in (left, right, low, high))
        middle = (left + right) / 2
        between, _ = ask(middle)
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
        low, high = np.concatenate([low, between]), np.concatenate([between, high])
    return np.asarray(total), end, begin
