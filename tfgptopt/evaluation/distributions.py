"""How the weights of a model lie, before and after: counted in bins, by their place in layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import keras
import numpy as np

from tfgptopt.model.current import current
from tfgptopt.model.targets import Target, candidates
from tfgptopt.terminal.tables import across_layers

# An odd number, so that zero has a bin of its own.
_BINS = 81
# Of each weight, at even distances: more would not be seen.
_MOST = 1 << 20
# Of this share of weights at both ends, bins say nothing: a few far ones would squeeze the rest.
_FAR = 1e-3


@dataclass(frozen=True)
class Distribution:
    """Weights of one place of all layers, of two models, in bins of one width.

    Attributes:
        low: Where the first bin begins.
        high: Where the last one ends; what lies beyond is counted in neither.
        before: Share of the weights in each bin, in the first model.
        after: The same in the second.
        zeros: Share of exact zeros of the second, which are in no bin.
    """

    low: float
    high: float
    before: tuple[float, ...]
    after: tuple[float, ...]
    zeros: float


def distributions(before: keras.Layer, after: keras.Layer) -> dict[str, Distribution]:
    """Returns how weights lie in two models, by their place in layers.

    Places that only one has are left out; shapes may differ.

    Args:
        before: A model.
        after: What became of it.

    Example:

    ```python
    from tfgptopt.evaluation.distributions import distributions

    for place, found in distributions(gpt, gpt).items():
        print(place, found.low, found.high, found.zeros)
    ```
    """
    first, second = _weights(before), _weights(after)
    return {place: _counted(first[place], second[place]) for place in first if place in second}


def _weights(model: keras.Layer) -> dict[str, np.ndarray]:
    """Returns some weights of each place."""
    found: dict[str, list[np.ndarray]] = {}
    for target in candidates(model):
        if isinstance(target, Target):
            values = current(target.layer, target.variable).numpy().reshape(-1)
            some = values[:: -(-len(values) // _MOST)]
            found.setdefault(across_layers(target.path), []).append(some)
    return {place: np.concatenate(values) for place, values in found.items()}


def _counted(before: np.ndarray, after: np.ndarray) -> Distribution:
    """Returns what two sets of weights have in bins around zero."""
    zeros = float(np.mean(after == 0))
    others = after[after != 0]
    ends = [np.quantile(np.abs(x), 1 - _FAR) for x in (before, others) if len(x)]
    far = float(max(ends, default=0.0)) or 1.0
    counts: Mapping[str, np.ndarray] = {
        name: np.histogram(values, _BINS, (-far, far))[0] / max(len(all_), 1)
        for name, values, all_ in (("before", before, before), ("after", others, after))
    }
    shares = {name: tuple(round(float(x), 6) for x in found) for name, found in counts.items()}
    return Distribution(-far, far, **shares, zeros=zeros)
