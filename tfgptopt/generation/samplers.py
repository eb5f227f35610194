"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Sampler = Callable[[np.ndarray, np.random.Generator], int]


@dataclass(frozen=True)
class Greedy:
    """Takes the most likely token."""

    def __call__(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        return int(np.argmax(logits))


@dataclass(frozen=True)
class TopK:
    """Draws one of the `k` most likely tokens, by their probability.

    Args:
        k: int, how many tokens to choose from. Defaults to `5`, as in KerasHub.
        temperature: float. Below 1 the likely get likelier, above 1 the unlikely do. Defaults to
            `1.0`.

    Raises:
        ValueError: If `k` or `temperature` is not positive.

    Reference: Fan et al., 2018, "Hierarchical Neural Story Generation"
    (https://arxiv.org/abs/1805.04833).
    """

    k: int = 5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"`k` must be an int >= 1. Received: k={self.k!r}")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be > 0. Received: {self.temperature!r}")

    def __call__(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        k = min(self.k, logits.size)
        best = np.argpartition(logits, -k)[-k:]
        scaled = logits[best].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        return int(generator.choice(best, p=weights / weights.sum()))


_NAMES: dict[str, Sampler] = {"greedy": Greedy(), "top_k": TopK()}


def get(sampler: str | Sampler) -> Sampler:
    """Returns a sampler from its name, or the sampler itself.

    Raises:
        ValueError: If the name is not known.
    """
    if callable(sampler):
        return sampler
    if sampler in _NAMES:
        return _NAMES[sampler]
    raise ValueError(
        f"`sampler` must be one of {', '.join(_NAMES)}, or a callable such as TopK(k=5). "
        f"Received: {sampler!r}"
    )
