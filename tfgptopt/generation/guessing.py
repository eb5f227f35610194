"""Where guesses of the next tokens come from: the text itself, or a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from tfgptopt.file.metadata import Metadata
from tfgptopt.generation import samplers
from tfgptopt.generation.caches import Cache
from tfgptopt.generation.engine import Engine


class Guess(NamedTuple):
    """Tokens that may come next.

    Attributes:
        tokens: The guess.
        chances: For each token, the distribution that it was drawn from, or `None` if the guess was
            sure of them.
    """

    tokens: list[int]
    chances: list[np.ndarray] | None


class Guesser(Protocol):
    """Guesses the next tokens of one text.

    Attributes:
        free: Whether a guess costs next to nothing.
    """

    free: bool

    def follow(self, tokens: list[int]) -> None:
        """Reads what is new of the text, before a guess."""

    def guess(self, tokens: list[int], count: int) -> Guess:
        """Returns at most so many tokens that may follow, possibly none.

        Args:
            tokens: The text so far; it has only grown since the last call.
            count: Most tokens to guess.
        """


@dataclass(frozen=True)
class NGram:
    """Guesses that a text goes on as it did before, after the same few tokens.

    It pays where answers quote their prompt: summaries, code that is changed, records. No model is
    needed, and where nothing repeats, nothing is guessed.

    Args:
        max_ngram: int. The longest sequence of tokens that is looked for. Defaults to `4`.
        min_ngram: int. The shortest. Defaults to `2`.
        num_tokens: int. Most tokens to guess at once. Defaults to `7`.

    Raises:
        ValueError: If a number is below 1, or `min_ngram` is above `max_ngram`.

    Example:

    ```python
    lm.generate("import os; import os", speculative=NGram(max_ngram=3))
    ```

    Reference: Saxena, 2023, "Prompt Lookup Decoding"
    (https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    max_ngram: int = 4
    min_ngram: int = 2
    num_tokens: int = 7

    def __post_init__(self) -> None:
        for name in ("max_ngram", "min_ngram", "num_tokens"):
            samplers.check_count(name, getattr(self, name))
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"`min_ngram` must not be above `max_ngram`. Received: {self.min_ngram} and "
                f"{self.max_ngram}"
            )


class Repeats:
    """Remembers where each sequence of tokens stood last.

    Args:
        settings: How long sequences are.
    """

    free = True

    def __init__(self, settings: NGram) -> None:
        self._sizes = range(settings.max_ngram, settings.min_ngram - 1, -1)
        # Ends of a sequence: the last one, and the one before, since the text ends with the last.
        self._ends: dict[tuple[int, ...], tuple[int, int]] = {}
        self._known = 0

    def guess(self, tokens: list[int], count: int) -> Guess:
        """Returns what followed the longest end of the text the last time."""
        for size in self._sizes:
            ends = self._ends.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if ends is not None and ends[1]:
                return Guess(tokens[ends[1] : ends[1] + count], None)
        return Guess([], None)

    def follow(self, tokens: list[int]) -> None:
        """Learns where the sequences of new tokens stand."""
        for end in range(self._known + 1, len(tokens) + 1):
            for size in self._sizes:
                if size <= end:
                    key = tuple(tokens[end - size : end])
                    last, _ = self._ends.get(key, (0, 0))
                    self._ends[key] = (end, last)
        self._known = len(tokens)


@dataclass(frozen=True)
class Draft:
    """Guesses with a smaller model of the same tokens: one that was shrunk and distilled, say.

    Args:
        path: A file that `tfgptopt.export` wrote. It is loaded at the first use. Defaults to
            `None`: the draft that the model's own file carries, as `export(gpt, path,
            draft=student)` writes it.
        num_tokens: int. Most tokens to guess at once. Defaults to `7`.
        num_threads: int. Threads for its kernels. Defaults to `None`: as many as the model has.

    Raises:
        ValueError: If a number is below 1. When it is used: if the file has another tokenizer or
            vocabulary than the model that it guesses for, or carries no draft.
        FileNotFoundError: When it is used, if there is no such file.

    Example:

    ```python
    student = tfgptopt.shrink(gpt, feedforward=0.5, calibration=corpus.train.take(16))
    tfgptopt.export(student, "draft.tflite")
    lm.generate("import os", speculative=Draft("draft.tflite"))
    ```

    Reference: Leviathan et al., 2023, "Fast Inference from Transformers via Speculative Decoding"
    (https://arxiv.org/abs/2211.17192).
    """

    path: str | Path | None = None
    num_tokens: int = 7
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))
        samplers.check_count("num_tokens", self.num_tokens)
        if self.num_threads is not None:
            samplers.check_count("num_threads", self.num_threads)


def check_tokens(draft: Draft, own: Metadata, target: Metadata) -> None:
    """Raises if a draft does not have the tokens of the file that it guesses for.

    Args:
        draft: The settings.
        own: What the draft's file says of itself.
        target: The same of the other file.

    Raises:
        ValueError: If it does not.
    """
    for name, mine, its in (
        ("vocabulary", own.decoder.vocabulary_size, target.decoder.vocabulary_size),
        ("tokenizer", own.tokenizer, target.tokenizer),
        ("tokenizer", own.sentencepiece, target.sentencepiece),
    ):
        if mine != its:
            raise ValueError(
                f"The draft '{draft.path}' has another {name} than the model that it guesses for. "
                "Export a model of the same tokens: one that was shrunk from it, or is of the same "
                "family."
            )


class Small:
    """Continues a text with a smaller model.

    Args:
        engine: The model.
        cache: A cache of it.
        chain: How a token is chosen.
        seed: Of the samplers; `None` for another guess each time.
    """

    free = False

    def __init__(
        self, engine: Engine, cache: Cache, chain: Sequence[samplers.Sampler], seed: int | None
    ) -> None:
        self._engine, self._cache, self._chain = engine, cache, chain
        self._greedy = isinstance(chain[-1], samplers.Greedy)
        # A stream of its own: guesses must not know what they are judged with.
        self._generator = np.random.default_rng(None if seed is None else [seed, 1])

    def follow(self, tokens: list[int]) -> None:
        """Reads what is new of the text, as far as its own context reaches."""
        if len(tokens) <= self._engine.context_length:
            self._engine.read(self._cache, tokens[:-1])

    def guess(self, tokens: list[int], count: int) -> Guess:
        """Returns what the model says."""
        count = min(count, self._engine.context_length - len(tokens))
        text: list[int] = list(tokens)
        chances: list[np.ndarray] = []
        for _ in range(count):
            logits = self._engine.decode(self._cache, text[-1])
            if self._greedy:
                text.append(samplers.choose(logits, text, self._chain, self._generator))
                continue
            chance = samplers.distribution(logits, text, self._chain)
            chances.append(chance)
            text.append(int(self._generator.choice(len(chance), p=chance)))
        return Guess(text[len(tokens) :], None if self._greedy else chances)


Speculation = NGram | Draft


def get(speculative: Speculation | str | None, carried: bool = False) -> Speculation | None:
    """Returns settings from what a user gave.

    Args:
        speculative: `None`, `"auto"` or settings.
        carried: Whether the file carries a draft, which is what `"auto"` takes then. Defaults to
            `False`.

    Raises:
        ValueError: If it is neither `None`, `"auto"` nor settings.
    """
    if speculative is None or isinstance(speculative, NGram | Draft):
        return speculative
    if speculative == "auto":
        return Draft() if carried else NGram()
    raise ValueError(
        f"`speculative` must be None, 'auto', NGram(...) or Draft(path). Received: {speculative!r}"
    )
