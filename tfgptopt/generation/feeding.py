"""Continuous batching: a slot whose text is finished takes the next prompt at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tfgptopt.generation.caches import Cache
from tfgptopt.generation.engine import Engine
from tfgptopt.generation.speculating import Statistics
from tfgptopt.generation.texts import Text

# Prompts of a server that are kept for those that begin like them, such as the next turn of a chat.
_CACHES = 4
# Steps for which a server keeps a batch that is larger than it needs: to change takes as long.
_PATIENCE = 16


class Feeder:
    """Continues texts together, as many at once as the file allows. One thread uses it.

    Args:
        engine: The model.
        cache: A cache, in which prompts are read one after the other; a server has some more.
        serving: bool. Whether texts come at any time: then one prompt is read between two steps,
            so that others do not wait for long, and a batch that is too large is kept for a
            while. Defaults to `False`.

    Attributes:
        waiting: Texts that have no slot yet.
    """

    def __init__(self, engine: Engine, cache: Cache, serving: bool = False) -> None:
        self.waiting: deque[Text] = deque()
        self._engine = engine
        # The one that was used last is the last.
        self._caches = [cache]
        self._most_caches = _CACHES if serving else 1
        self._sizes = [1, *engine.batch_sizes]
        self._batch = engine.new_batch(1)
        self._slots: dict[int, Text] = {}
        self._at_once = 1 if serving else self._sizes[-1]
        self._patience = _PATIENCE if serving else 0
        self._too_large = 0  # Steps since the batch is.

    @property
    def busy(self) -> bool:
        """Whether there are texts to go on with."""
        return bool(self.waiting or self._slots)

    @property
    def running(self) -> list[Text]:
        """The texts that have a slot."""
        return list(self._slots.values())

    def remove(self, text: Text) -> None:
        """Gives up a text, wherever it is."""
        if text in self.waiting:
            self.waiting.remove(text)
        self._slots = {slot: one for slot, one in self._slots.items() if one is not text}

    def step(self, statistics: Statistics) -> list[tuple[Text, str]]:
        """Makes one token more of each text; returns each with the piece of text that is sure.

        Args:
            statistics: Counts calls and tokens.
        """
        full = [text for text in self.waiting if text.finished]  # Prompts that leave no room.
        self.waiting = deque(text for text in self.waiting if not text.finished)
        self._choose_size()
        self._fill()
        pieces = [(text, "") for text in full]
        if self._slots:
            last = {slot: text.tokens[-1] for slot, text in self._slots.items()}
            expected = max(text.length for text in self._slots.values())
            logits = self._batch.decode(last, expected)
            statistics.calls += 1
            statistics.tokens += len(last)
            pieces += [(text, text.take(logits[slot])) for slot, text in self._slots.items()]
            self._slots = {slot: text for slot, text in self._slots.items() if not text.finished}
        return pieces

    def _fill(self) -> None:
        """Reads the prompts of waiting texts into the slots that are free."""
        free = [slot for slot in range(self._batch.size) if slot not in self._slots]
        for slot in free[: self._at_once]:
            if self.waiting:
                text = self.waiting.popleft()
                cache = self._cache_for(text.tokens)
                self._engine.read(cache, text.tokens[:-1], whole=True)
                self._batch.place(slot, cache, text.length)
                self._slots[slot] = text

    def _cache_for(self, tokens: list[int]) -> Cache:
        """Returns a cache to read a prompt in: one that knows most of its beginning, or is free."""
        known = max(self._caches, key=lambda cache: cache.shared_with(tokens))
        # Less than half of what it holds would be thrown away for the others that begin so.
        if known.shared_with(tokens) < len(known.tokens) // 2:
            full = len(self._caches) >= self._most_caches
            known = self._caches[0] if full else self._engine.new_cache()
        self._caches = [*(cache for cache in self._caches if cache is not known), known]
        return known

    def _choose_size(self) -> None:
        """Goes on with a batch of the size that there are texts for."""
        count = len(self._slots) + len(self.waiting)
        size = next((size for size in self._sizes if size >= count), self._sizes[-1])
        self._too_large = self._too_large + 1 if size < self._batch.size else 0
        if size > self._batch.size or self._too_large > self._patience:
            batch = self._engine.new_batch(size)
            if self._slots:
                batch.take_over(self._batch, list(self._slots))
            self._slots = dict(enumerate(self._slots.values()))
            self._batch, self._too_large = batch, 0


def continue_together(
    engine: Engine, cache: Cache, texts: Sequence[Text], statistics: Statistics
) -> None:
    """Continues texts to their ends.

    Args:
        engine: The model.
        cache: A cache, in which prompts are read.
        texts: The texts.
        statistics: Counts calls and tokens.
    """
    feeder = Feeder(engine, cache)
    feeder.waiting.extend(texts)
    while feeder.busy:
        feeder.step(statistics)
    for number, text in enumerate(texts):
        if text.error is not None:
            raise ValueError(f"Prompt {number} of {len(texts)}: {text.error}") from text.error
