"""Where new tokens come from: one call of the model for each, or guesses that are read at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tfgptopt.file.metadata import Metadata
from tfgptopt.generation import samplers
from tfgptopt.generation.caches import Cache
from tfgptopt.generation.engine import Engine
from tfgptopt.generation.guessing import Speculation
from tfgptopt.generation.speculating import Pace, Statistics, speculated_tokens


class Decoding:
    """Makes the tokens of texts with one model.

    Args:
        engine: The model.
        metadata: What its file says of itself.
        speculation: Where guesses come from, or `None` for none.

    Attributes:
        engine: The model.

    Raises:
        ValueError: If the guesses would be of other tokens.
    """

    def __init__(self, engine: Engine, metadata: Metadata, speculation: Speculation | None) -> None:
        if speculation is not None:
            speculation.check(metadata)
        self.engine = engine
        self._speculation = speculation
        self._pace: Pace | None = None

    def tokens(
        self,
        cache: Cache,
        prompt: Sequence[int],
        length: int,
        chain: Sequence[samplers.Sampler],
        seed: int | None,
        statistics: Statistics | None = None,
        matcher: samplers.Sampler | None = None,
    ) -> Iterator[int]:
        """Yields tokens until prompt and continuation have `length` of them.

        Args:
            cache: A cache of the model.
            prompt: Tokens to continue.
            length: Tokens of both together.
            chain: How a token is chosen.
            seed: Of the samplers; `None` for another text each time.
            statistics: Counts. Defaults to `None`: nobody wants to know.
            matcher: What the text is held to, before `chain`; guesses are not. Defaults to `None`.
        """
        counts = Statistics() if statistics is None else statistics
        guessed, chain = chain, chain if matcher is None else (matcher, *chain)
        if self._speculation is None:
            return self._plain(cache, prompt, length, chain, seed, counts)
        guesser = self._speculation.guesser(guessed)
        if self._pace is None:  # What was learned of this machine serves the next text, too.
            lengths = self.engine.verified_at_once
            self._pace = Pace(lengths, self._speculation.num_tokens, guesser.free)
        return speculated_tokens(
            self.engine, cache, prompt, length, chain, seed, guesser, self._pace, counts
        )

    def _plain(
        self,
        cache: Cache,
        prompt: Sequence[int],
        length: int,
        chain: Sequence[samplers.Sampler],
        seed: int | None,
        statistics: Statistics,
    ) -> Iterator[int]:
        generator = np.random.default_rng(seed)
        tokens = list(prompt)
        if len(tokens) < length:
            self.engine.read(cache, tokens[:-1])
        while len(tokens) < length:
            logits = self.engine.decode(cache, tokens[-1])
            tokens.append(samplers.choose(logits, tokens, chain, generator))
            statistics.calls += 1
            statistics.tokens += 1
            yield tokens[-1]
