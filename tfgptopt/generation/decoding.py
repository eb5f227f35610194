"""Where new tokens come from: one call of the model for each, or guesses that are read at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tfgptopt.file.container import file_identity, read_container
from tfgptopt.file.metadata import Metadata
from tfgptopt.generation import guessing, samplers
from tfgptopt.generation.caches import Cache
from tfgptopt.generation.engine import Engine
from tfgptopt.generation.guessing import Draft, Guesser, Repeats, Small, Speculation, check_tokens
from tfgptopt.generation.speculating import Pace, Statistics, speculated_tokens


class Decoding:
    """Makes the tokens of texts with one model.

    Args:
        engine: The model.
        metadata: What its file says of itself.
        speculation: Where guesses come from, or `None` for none.
        num_threads: Threads for the kernels of a draft.
        folder: Where packed weights of a draft are kept, or `None`.

    Attributes:
        engine: The model.

    Raises:
        FileNotFoundError: If there is no file of the draft.
        ValueError: If the guesses would be of other tokens.
    """

    def __init__(
        self,
        engine: Engine,
        metadata: Metadata,
        speculation: Speculation | None,
        num_threads: int,
        folder: Path | None,
    ) -> None:
        self.engine = engine
        self._speculation = speculation
        self._draft: Engine | None = None
        if isinstance(speculation, Draft) and speculation.path is None:
            if metadata.draft is None:
                raise ValueError(
                    "The file carries no draft. Write one into it, `tfgptopt.export(gpt, path, "
                    "draft=student)`, or give the draft's own file: `Draft(path)`."
                )
            self._draft = engine.carried(metadata.draft)
        elif isinstance(speculation, Draft):
            path = Path(speculation.path or "")
            container = read_container(path, folder)
            check_tokens(speculation, container.metadata, metadata)
            threads = speculation.num_threads or num_threads
            self._draft = Engine.load(path, container, threads, folder)
        self._pace: Pace | None = None
        self._spare: list[Cache] = []
        self._lock = threading.Lock()

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
        held = chain if matcher is None else (matcher, *chain)
        if self._speculation is None:
            return self._plain(cache, prompt, length, held, seed, counts)
        return self._guessing(cache, prompt, length, chain, held, seed, counts)

    def _guessing(
        self,
        cache: Cache,
        prompt: Sequence[int],
        length: int,
        chain: Sequence[samplers.Sampler],
        held: Sequence[samplers.Sampler],
        seed: int | None,
        counts: Statistics,
    ) -> Iterator[int]:
        settings, spare = self._speculation, None
        assert settings is not None
        guesser: Guesser
        if self._draft is not None:
            with self._lock:  # The cache of the text before may know the beginning of this one.
                spare = self._spare.pop() if self._spare else None
            spare = spare or self._draft.new_cache()
            guesser = Small(self._draft, spare, chain, seed)
        else:
            assert not isinstance(settings, Draft)
            guesser = Repeats(settings)
        if self._pace is None:  # What was learned of this machine serves the next text, too.
            self._pace = Pace(self.engine.verified_at_once, settings.num_tokens, guesser.free)
        try:
            yield from speculated_tokens(
                self.engine, cache, prompt, length, held, seed, guesser, self._pace, counts
            )
        finally:
            if spare is not None:
                with self._lock:
                    self._spare.append(spare)

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


class Decodings:
    """Keeps the ways to decode with one model: what each learned of this machine serves again.

    Args:
        engine: The model.
        metadata: What its file says of itself.
        num_threads: Threads for the kernels of drafts.
        folder: Where packed weights of drafts are kept, or `None`.
    """

    def __init__(
        self, engine: Engine, metadata: Metadata, num_threads: int, folder: Path | None
    ) -> None:
        self._engine, self._metadata = engine, metadata
        self._num_threads, self._folder = num_threads, folder
        # By settings, and by which file a draft is: another may take its place.
        self._made: dict[object, Decoding] = {}

    def get(self, speculative: Speculation | str | None) -> Decoding:
        """Returns how tokens are made.

        Raises:
            FileNotFoundError: If there is no file of the draft.
            ValueError: If the guesses would be of other tokens.
        """
        settings = guessing.get(speculative, self._metadata.draft is not None)
        path = settings.path if isinstance(settings, Draft) else None
        key = settings, None if path is None else file_identity(path)
        if key not in self._made:
            self._made[key] = Decoding(
                self._engine, self._metadata, settings, self._num_threads, self._folder
            )
        return self._made[key]
