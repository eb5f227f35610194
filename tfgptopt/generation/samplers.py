"""How the next token is chosen from the logits.

A sampler reshapes logits: it scales them, or sets those of tokens that are out to minus infinity.
`choose` then draws from what is left. Samplers are therefore combined by applying one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Sampler = Callable[[np.ndarray, Sequence[int]], np.ndarray]


def _check_positive(name: str, value: float) -> None:
    """Checks a positive number.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise ValueError(f"`{name}` must be a number > 0. Received: {name}={value!r}")


def _check_share(name: str, value: float) -> None:
    """Checks a number above 0, up to 1.

    Raises:
        ValueError: If it is none.
    """
    _check_positive(name, value)
    if value > 1:
        raise ValueError(f"`{name}` must lie in (0, 1]. Received: {name}={value!r}")


def check_count(name: str, value: int) -> None:
    """Checks an integer from 1 on.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an int >= 1. Received: {name}={value!r}")


def _only(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Returns logits in which all but the tokens `kept` are out."""
    result = np.full_like(logits, -np.inf)
    result[kept] = logits[kept]
    return result


def _scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    return logits if temperature == 1 else logits / temperature


def _probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    shares: np.ndarray = weights / weights.sum()
    return shares


@dataclass(frozen=True)
class Greedy:
    """Takes the most likely token."""

    def __call__(self, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        return _only(logits, np.asarray([logits.argmax()]))


@dataclass(frozen=True)
class Random:
    """Draws from all tokens by their probability.

    Args:
        temperature: float. Below 1 the likely get likelier, above 1 the unlikely do. Defaults to
            `1.0`.

    Raises:
        ValueError: If `temperature` is not positive.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)

    def __call__(self, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        return _scaled(logits, self.temperature)


@dataclass(frozen=True)
class TopK:
    """Draws one of the `k` most likely tokens.

    Args:
        k: int. How many tokens to choose from. Defaults to `5`, as in KerasHub.
        temperature: float. As for `Random`. Defaults to `1.0`.

    Raises:
        ValueError: If `k` or `temperature` is not positive.

    Reference: Fan et al., 2018, "Hierarchical Neural Story Generation"
    (https://arxiv.org/abs/1805.04833).
    """

    k: int = 5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_count("k", self.k)
        _check_positive("temperature", self.temperature)

    def __call__(self, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        if self.k < logits.size:
            logits = _only(logits, np.argpartition(logits, -self.k)[-self.k :])
        return _scaled(logits, self.temperature)


@dataclass(frozen=True)
class TopP:
    """Draws from the fewest tokens whose probabilities sum up to `p`.

    Args:
        p: float in (0, 1]. Defaults to `0.1`, as in KerasHub.
        k: int. Choose from the `k` most likely tokens first. Defaults to `None`: from all.
        temperature: float. As for `Random`, applied before `p`. Defaults to `1.0`.

    Raises:
        ValueError: If an argument is out of its range.

    Reference: Holtzman et al., 2019, "The Curious Case of Neural Text Degeneration"
    (https://arxiv.org/abs/1904.09751).
    """

    p: float = 0.1
    k: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_share("p", self.p)
        _check_positive("temperature", self.temperature)
        if self.k is not None:
            check_count("k", self.k)

    def __call__(self, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        if self.k is not None:
            logits = TopK(self.k)(logits, tokens)
        logits = _scaled(logits, self.temperature)
        probabilities = _probabilities(logits)
        # Tokens below this cannot be needed: together they have less than 1 - p. Few are sorted.
        likely = np.flatnonzero(probabilities >= (1 - self.p) / probabilities.size)
        likely = likely[np.argsort(-probabilities[likely], kind="stable")]
        before = np.cumsum(probabilities[likely]) - probabilities[likely]
        return _only(logits, likely[before < self.p])


@dataclass(frozen=True)
class MinP:
    """Draws from the tokens at least `p` times as likely as the likeliest.

    Args:
        p: float in (0, 1]. Defaults to `0.05`.
        temperature: float. As for `Random`, applied before `p`. Defaults to `1.0`.

    Raises:
        ValueError: If an argument is out of its range.

    Reference: Nguyen et al., 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent
    LLM Outputs" (https://arxiv.org/abs/2407.01082).
    """

    p: float = 0.05
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_share("p", self.p)
        _check_positive("temperature", self.temperature)

    def __call__(self, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        logits = _scaled(logits, self.temperature)
        return np.where(logits >= logits.max() + np.log(self.p), logits, -np.inf)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Makes the tokens of the text so far, prompt included, less likely.

    Args:
        penalty: float. Positive logits are divided by it and negative ones multiplied. Defaults to
            `1.1`; 1 changes nothing.

    Raises:
        ValueError: If `penalty` is not positive.

    Reference: Keskar et al., 2019, "CTRL: A Conditional Transformer Language Model for
    Controllable Generation" (https://arxiv.org/abs/1909.05858).
    """

    penalty: float = 1.1

    def __post_init__(self) -> None:
        _check_positive("penalty", self.penalty)

    def __call__(self, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        seen = np.unique(np.asarray(tokens, np.int64))
        result = logits.copy()
        old = logits[seen]
        result[seen] = np.where(old > 0, old / self.penalty, old * self.penalty)
        return result


_NAMES: dict[str, Sampler] = {
    "greedy": Greedy(),
    "random": Random(),
    "top_k": TopK(),
    "top_p": TopP(),
    "min_p": MinP(),
}


def get(sampler: str | Sampler | Sequence[Sampler]) -> tuple[Sampler, ...]:
    """Returns samplers in the order of their application, from a name, one sampler or several.

    Raises:
        ValueError: If a name is not known, or it is no sampler.
    """
    if isinstance(sampler, str):
        if sampler in _NAMES:
            return (_NAMES[sampler],)
    elif isinstance(sampler, Sequence) and sampler:
        return tuple(one for entry in sampler for one in get(entry))
    elif callable(sampler) and not isinstance(sampler, type):
        return (sampler,)
    beams = sampler == "beam" or hasattr(sampler, "num_beams")
    only = " Beams are for `generate` and `beam_search` only, and alone." if beams else ""
    raise ValueError(
        f"`sampler` must be one of {', '.join(_NAMES)}, a sampler such as TopK(k=5), or a list of "
        f"samplers. Received: {sampler!r}.{only}"
    )


def choose(
    logits: np.ndarray,
    tokens: Sequence[int],
    samplers: Sequence[Sampler],
    generator: np.random.Generator,
) -> int:
    """Returns the next token.

    Args:
        logits: float array of shape `(vocabulary,)`.
        tokens: Token ids of the text so far.
        samplers: Applied one after the other.
        generator: Source of randomness.

    Raises:
        ValueError: If the samplers leave no token.
    """
    *first, last = samplers
    for sampler in first:
        logits = sampler(logits, tokens)
    if isinstance(last, Greedy):
        return int(logits.argmax())
    left, chances = _left(last(logits, tokens), samplers)
    return int(generator.choice(left, p=chances))


def distribution(
    logits: np.ndarray, tokens: Sequence[int], samplers: Sequence[Sampler]
) -> np.ndarray:
    """Returns how likely `choose` is to return each token, float64 `(vocabulary,)`.

    Raises:
        ValueError: If the samplers leave no token.
    """
    shares = np.zeros(len(logits))
    for sampler in samplers:
        logits = sampler(logits, tokens)
    left, shares[left] = _left(logits, samplers)
    return shares


def _left(logits: np.ndarray, samplers: Sequence[Sampler]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that are not out, and how likely each is."""
    left = np.flatnonzero(logits > -np.inf)
    if not left.size:
        raise ValueError(f"The samplers {list(samplers)} left no token to choose from.")
    return left, _probabilities(logits[left])
