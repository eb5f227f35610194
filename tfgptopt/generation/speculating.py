"""Speculative decoding: reads several guessed tokens at once, and keeps what the model itself says.

A model that decodes spends its time on reading weights, and reads them once for one token or for
eight. So what comes next is guessed, all guesses are read in one call, and those that the model
would have chosen are kept. The text is that of plain decoding; only its speed depends on guesses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tfgptopt.generation import samplers
from tfgptopt.generation.caches import Cache
from tfgptopt.generation.engine import Engine
from tfgptopt.generation.guessing import Guess, Guesser

# Of what was measured before, how much counts when the next is measured.
_MEMORY_OF_TIMES, _MEMORY_OF_GUESSES = 0.7, 0.9
# What reading one token more costs, of reading one, before it was measured.
_FIRST_SLOPE = 0.05
# A gain that is worth the risk, and after how many tokens a costly guesser is tried again.
_WORTH, _AGAIN = 1.03, 64


@dataclass
class Statistics:
    """How a text came about.

    Attributes:
        tokens: Tokens that were made, one that stops the text included.
        calls: Calls of the model for them.
        guessed: Tokens that were guessed and read.
        accepted: Those of `tokens` that were guessed.
        seconds: Time of all, prompts included.
    """

    tokens: int = 0
    calls: int = 0
    guessed: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def add(self, other: Statistics) -> None:
        """Adds the counts of other texts, without their time."""
        self.tokens += other.tokens
        self.calls += other.calls
        self.guessed += other.guessed
        self.accepted += other.accepted

    @property
    def acceptance(self) -> float:
        """Share of the guesses that were kept."""
        return self.accepted / max(self.guessed, 1)

    @property
    def tokens_per_call(self) -> float:
        """Tokens for each call of the model: 1 without guesses."""
        return self.tokens / max(self.calls, 1)


class Pace:
    """Decides how many tokens to guess, from what calls cost here and how guesses fared.

    Args:
        lengths: How many tokens the model can read at once with logits for each.
        most: Most tokens to guess.
        free: Whether guessing costs next to nothing.
    """

    def __init__(self, lengths: Sequence[int], most: int, free: bool) -> None:
        self._lengths, self._free = sorted(lengths), free
        self._most = min(most, max(lengths, default=1) - 1)
        self._seconds: dict[int, float] = {}  # Of a call, by the tokens that it reads.
        self._warm: set[int] = set()
        self._guessing = 0.0  # Seconds for each token.
        self._right = 0.6  # Share of guesses, until there were some.
        self._since = 0

    def length_for(self, tokens: int) -> int:
        """Returns the length of the call that reads so many tokens."""
        return next(length for length in self._lengths if length >= tokens)

    def count(self, left: int) -> int:
        """Returns how many tokens to guess; 0 for plain decoding.

        Args:
            left: Most that there is use for.
        """
        most = min(self._most, left)
        if most < 1:
            return 0
        gains = [(self._gain(count), count) for count in range(1, most + 1)]
        gain, count = max(gains)
        self._since += 1
        if gain < _WORTH:
            if self._since < _AGAIN:
                return 0
            count = count if self._free else 1  # What was bad once is tried again.
        self._since = 0
        return count

    def _gain(self, count: int) -> float:
        """Returns how much faster than plain decoding so many guesses are expected to be."""
        expected = sum(self._right**i for i in range(count + 1))
        return (
            expected
            * self._cost(1)
            / (self._cost(self.length_for(count + 1)) + count * self._guessing)
        )

    def _cost(self, length: int) -> float:
        if length in self._seconds:
            return self._seconds[length]
        known = min(self._seconds, default=0)
        if not known:
            return 1.0 + _FIRST_SLOPE * (length - 1)
        return self._seconds[known] * (1 + _FIRST_SLOPE * length) / (1 + _FIRST_SLOPE * known)

    def took(self, length: int, seconds: float) -> None:
        """Says how long a call took that read so many tokens."""
        if length not in self._warm:  # The first call makes buffers.
            self._warm.add(length)
            return
        old = self._seconds.get(length)
        # A call may wait for another process: twice the usual counts as that.
        new = seconds if old is None else min(seconds, 2 * old)
        self._seconds[length] = _mixed(old, new, _MEMORY_OF_TIMES)

    def guessed(self, count: int, seconds: float) -> None:
        """Says how long it took to guess so many tokens."""
        if count:
            self._guessing = _mixed(self._guessing or None, seconds / count, _MEMORY_OF_TIMES)

    def fared(self, right: bool) -> None:
        """Says whether a guess was right."""
        self._right = _mixed(self._right, float(right), _MEMORY_OF_GUESSES)


def _mixed(old: float | None, new: float, memory: float) -> float:
    return new if old is None else memory * old + (1.0 - memory) * new


def speculated_tokens(
    engine: Engine,
    cache: Cache,
    prompt: Sequence[int],
    length: int,
    chain: Sequence[samplers.Sampler],
    seed: int | None,
    guesser: Guesser,
    pace: Pace,
    statistics: Statistics,
) -> Iterator[int]:
    """Yields tokens until prompt and continuation have `length` of them.

    Args:
        engine: The model.
        cache: A cache of it.
        prompt: Tokens to continue.
        length: Tokens of both together.
        chain: How a token is chosen.
        seed: Of the samplers.
        guesser: Guesses the next tokens.
        pace: Says how many.
        statistics: Counts.

    Reference: Leviathan et al., 2023, "Fast Inference from Transformers via Speculative Decoding"
    (https://arxiv.org/abs/2211.17192).
    """
    generator = np.random.default_rng(seed)
    tokens = list(prompt)
    if len(tokens) < length:
        engine.read(cache, tokens[:-1])
    while len(tokens) < length:
        before = len(tokens)
        count = pace.count(min(length - before - 1, engine.room(cache) - 1))
        guess = _guess(guesser, tokens, count, pace)
        read = guess.tokens if count else []
        kept = []
        for token, right in _checked(
            _logits(engine, cache, tokens[-1], read, pace), tokens, guess, read, chain, generator
        ):
            tokens.append(token)
            kept.append(bool(right and read))
            if right is not None:
                pace.fared(right)
        del cache.tokens[len(tokens) - 1 :]
        statistics.calls += 1
        statistics.guessed += len(read)
        for token, guessed in zip(tokens[before:], kept, strict=True):
            statistics.tokens += 1  # As they are taken: what stops a text may stand among them.
            statistics.accepted += guessed
            yield token


def _guess(guesser: Guesser, tokens: list[int], count: int, pace: Pace) -> Guess:
    """Returns a guess of so many tokens; where it is free, of one to compare with what comes."""
    if not count and not guesser.free:
        return Guess([], None)
    guesser.follow(tokens)
    began = time.perf_counter()
    guess = guesser.guess(tokens, count or 1)
    if count:
        pace.guessed(len(guess.tokens), time.perf_counter() - began)
    return guess


def _logits(engine: Engine, cache: Cache, last: int, guesses: list[int], pace: Pace) -> np.ndarray:
    """Returns the logits behind the last token and behind each guess."""
    began = time.perf_counter()
    if guesses:
        rows = engine.verify(cache, [last, *guesses])
        pace.took(pace.length_for(len(guesses) + 1), time.perf_counter() - began)
        return rows
    rows = engine.decode(cache, last)[np.newaxis]
    pace.took(1, time.perf_counter() - began)
    return rows


def _checked(
    rows: np.ndarray,
    tokens: list[int],
    guess: Guess,
    read: list[int],
    chain: Sequence[samplers.Sampler],
    generator: np.random.Generator,
) -> Iterator[tuple[int, bool | None]]:
    """Yields the tokens that the model chooses, as far as their guesses hold, and one more.

    Args:
        rows: Logits.
        tokens: The text, to which each token is appended before the next is asked for.
        guess: The guess, and the distributions that it was drawn from.
        read: The part of the guess whose logits there are.
        chain: How a token is chosen.
        generator: Source of randomness.

    Yields:
        `(token, right)`: whether the guess for it was right, `None` if there was none.
    """
    guesses, chances = guess
    for i, row in enumerate(rows):
        if i >= len(guesses):
            yield samplers.choose(row, tokens, chain, generator), None
            return
        if isinstance(chain[-1], samplers.Greedy) or not read:
            token = samplers.choose(row, tokens, chain, generator)
            right = token == guesses[i]
        else:
            chance = samplers.distribution(row, tokens, chain)
            drawn = None if chances is None else chances[i]
            token, right = accept(chance, guesses[i], drawn, generator)
        yield token, right
        if not right:
            return


def accept(
    chance: np.ndarray, guess: int, drawn: np.ndarray | None, generator: np.random.Generator
) -> tuple[int, bool]:
    """Keeps a guess, or draws another token, so that tokens have the distribution of the model.

    Args:
        chance: The distribution of the model, float64 `(vocabulary,)`.
        guess: The guessed token.
        drawn: The distribution that it was drawn from, or `None` if it was certain.
        generator: Source of randomness.

    Returns:
        `(token, kept)`.
    """
    of_guess = 1.0 if drawn is None else float(drawn[guess])
    if generator.random() * of_guess < chance[guess]:
        return guess, True
    if drawn is None:
        rest = chance.copy()
        rest[guess] = 0.0
    else:
        rest = np.maximum(chance - drawn, 0.0)
    total = rest.sum()
    if total <= 0.0:  # The two are equal but for rounding.
        return guess, True
    return int(generator.choice(len(rest), p=rest / total)), False
