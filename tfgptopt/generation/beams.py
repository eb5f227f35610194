"""Beam search: the likeliest continuations as a whole, found by following several at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tfgptopt.generation.caches import Cache
from tfgptopt.generation.codec import Stop
from tfgptopt.generation.continuing import Continuation
from tfgptopt.generation.engine import Engine
from tfgptopt.generation.samplers import check_count
from tfgptopt.generation.speculating import Statistics
from tfgptopt.generation.texts import Text

# Size of groups of scores whose largest say which scores need not be looked at.
_GROUP = 32


@dataclass(frozen=True)
class Beam:
    """Takes the continuation that is likeliest as a whole, as far as so many beams find it.

    For files with a batch of `num_beams` or more: `TFLite(batch_sizes=(4,))`.

    Args:
        num_beams: int. How many continuations are followed at once. Defaults to `4`.
        length_penalty: float. The sum of a continuation's log-probabilities is divided by its
            number of tokens to this power: above 0 long ones are favoured. Defaults to `0.0`, the
            sum, as in KerasHub; 1 is the mean.
        early_stopping: bool. Whether to stop once `num_beams` continuations have ended, rather
            than when no other could be better. Defaults to `False`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    tfgptopt.export(gpt, "gpt.tflite", TFLite(batch_sizes=(4,)))
    lm = tfgptopt.TFLiteCausalLM("gpt.tflite")
    print(lm.generate("import os", max_length=16, sampler=Beam(num_beams=4)))
    for found in lm.beam_search("import os", max_length=16, num_return_sequences=3):
        print(f"{found.score:.2f} {found.text}")
    ```

    Reference: Wu et al., 2016, "Google's Neural Machine Translation System"
    (https://arxiv.org/abs/1609.08144), for the penalty in its plain form.
    """

    num_beams: int = 4
    length_penalty: float = 0.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        check_count("num_beams", self.num_beams)
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float):
            raise ValueError(f"`length_penalty` must be a number. Received: {penalty!r}")
        if not isinstance(self.early_stopping, bool):
            raise ValueError(f"`early_stopping` must be a bool. Received: {self.early_stopping!r}")

    def score(self, log_probability: float, count: int) -> float:
        """Returns what continuations of so many tokens are compared by."""
        return log_probability / float(max(count, 1) ** self.length_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that beam search found.

    Attributes:
        tokens: Its tokens, without one that ended it.
        score: The sum of the log-probabilities of its tokens, one that ended it included, with
            the penalty for its length.
        text: The prompt and its text; empty of a file without tokenizer.
    """

    tokens: list[int]
    score: float
    text: str = ""

    def with_text(self, prompt: str, continuation: Continuation) -> Hypothesis:
        """Returns it with the text of a prompt and its tokens.

        Args:
            prompt: The prompt.
            continuation: One that has no tokens yet.
        """
        return replace(self, text=prompt + "".join(continuation.pieces(iter(self.tokens))))


@dataclass(frozen=True)
class _Live:
    """A continuation that goes on."""

    slot: int
    tokens: list[int]
    log_probability: float


def _in_slots(beams: list[_Live], count: int) -> dict[int, _Live]:
    """Returns beams by slot: one of each parent's stays where that was, and need not be moved."""
    placed: dict[int, _Live] = {}
    others = []
    for beam in beams:
        if beam.slot in placed:
            others.append(beam)
        else:
            placed[beam.slot] = beam
    free = [slot for slot in range(count) if slot not in placed]
    return placed | dict(zip(free, others, strict=False))


class BeamSearch:
    """One search.

    Args:
        engine: The model.
        settings: What is asked for.
        ends: Tokens that end a continuation.

    Raises:
        ValueError: If the file has no batch of so many, or the vocabulary fewer tokens.
    """

    def __init__(self, engine: Engine, settings: Beam, ends: Collection[int]) -> None:
        count, sizes = settings.num_beams, engine.batch_sizes
        fitting = [size for size in sizes if size >= count]
        if not fitting:
            has = f"batches of {', '.join(map(str, sizes))}" if sizes else "no batches"
            raise ValueError(
                f"Beam search with {count} beams decodes {count} texts together, and the file has "
                f"{has}. Export it with `TFLite(batch_sizes=({count},))`, on the command line "
                f"`--batch-sizes {count}`."
            )
        if 2 * count > engine.vocabulary_size:
            raise ValueError(
                f"{count} beams choose from {2 * count} tokens, and the model knows "
                f"{engine.vocabulary_size}. Take fewer beams."
            )
        self._engine, self._settings, self._ends = engine, settings, ends
        self._size = fitting[0]
        self._finished: list[Hypothesis] = []

    def run(
        self, cache: Cache, prompt: Sequence[int], length: int, statistics: Statistics
    ) -> list[Hypothesis]:
        """Returns continuations, the best first: `num_beams` of them, if there are so many.

        Args:
            cache: A cache, in which the prompt is read.
            prompt: Tokens to continue.
            length: Tokens of prompt and continuation together.
            statistics: Counts calls and tokens.
        """
        steps = length - len(prompt)
        if steps < 1:
            return [Hypothesis([], 0.0)]
        self._engine.read(cache, prompt[:-1], whole=True)
        logits = self._engine.decode(cache, prompt[-1], whole=True)
        live = self._continued([_Live(0, [], 0.0)], [logits])
        batch = self._engine.new_batch(self._size)
        for slot in range(self._settings.num_beams):
            batch.place(slot, cache, length)
        for _ in range(steps - 1):
            if not live or self._is_over(live, steps):
                live = []  # What has ended is better than what could become of them.
                break
            beams = _in_slots(live, self._settings.num_beams)
            parents = list(range(self._size))
            for slot, beam in beams.items():
                parents[slot] = beam.slot
            batch.reorder(parents)
            rows = batch.decode({slot: beam.tokens[-1] for slot, beam in beams.items()}, length)
            statistics.calls += 1
            statistics.tokens += 1
            live = self._continued(
                [replace(beam, slot=slot) for slot, beam in beams.items()],
                [rows[slot] for slot in beams],
            )
        return self._best(live)

    def continue_text(self, text: Text, cache: Cache, statistics: Statistics) -> None:
        """Continues a text with what is best.

        Args:
            text: The text.
            cache: A cache, in which the prompt is read.
            statistics: Counts calls and tokens.
        """
        best = self.run(cache, text.prompt, text.length, statistics)[0]
        for _ in text.continuation.pieces(iter(best.tokens)):
            pass

    def _continued(self, beams: list[_Live], rows: list[np.ndarray]) -> list[_Live]:
        """Returns the best continuations by one token; those that end are put aside."""
        logits = np.stack(rows)
        largest = logits.max(axis=1, keepdims=True)
        sums = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64))
        before = np.asarray([beam.log_probability for beam in beams])
        offsets = before - sums - largest[:, 0]
        found: list[_Live] = []
        wanted = self._settings.num_beams
        for rank, (row, token, score) in enumerate(_largest(logits, offsets, 2 * wanted)):
            tokens = [*beams[row].tokens, token]
            if token in self._ends:
                if rank < wanted:  # Others would not have been followed either.
                    score = self._settings.score(score, len(tokens))
                    self._finished.append(Hypothesis(tokens[:-1], score))
            elif len(found) < wanted:
                found.append(_Live(beams[row].slot, tokens, score))
        return found

    def _is_over(self, beams: list[_Live], steps: int) -> bool:
        """Returns whether no beam can become better than what has ended."""
        settings = self._settings
        if len(self._finished) < settings.num_beams:
            return False
        if settings.early_stopping:
            return True
        best = max(beam.log_probability for beam in beams)
        count = steps if settings.length_penalty > 0 else len(beams[0].tokens)
        kept = sorted((one.score for one in self._finished), reverse=True)
        return settings.score(best, count) <= kept[settings.num_beams - 1]

    def _best(self, beams: list[_Live]) -> list[Hypothesis]:
        score = self._settings.score
        live = [Hypothesis(b.tokens, score(b.log_probability, len(b.tokens))) for b in beams]
        found = sorted(self._finished + live, key=lambda one: -one.score)
        return found[: self._settings.num_beams]


def _largest(logits: np.ndarray, offsets: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """Returns row, column and value of the largest of logits and an offset for each row.

    Args:
        logits: float32 `(rows, columns)`.
        offsets: float64 `(rows,)`.
        count: How many, at least as many as there are columns.
    """
    found: list[tuple[int, int, float]] = []
    for row, (values, offset) in enumerate(zip(logits, offsets, strict=True)):
        groups = len(values) // _GROUP
        if groups >= count:
            # So many groups have a number that is as large: no other can be needed.
            tops = values[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
            columns = np.flatnonzero(values >= np.partition(tops, -count)[-count])
        else:
            columns = np.arange(len(values))
        best = columns[np.argsort(-values[columns], kind="stable")[:count]]
        found += [(row, int(column), float(values[column] + offset)) for column in best]
    return sorted(found, key=lambda one: -one[2])[:count]


def check_alone(speculative: object, constraint: object, ends: Stop) -> None:
    """Raises where beam search is asked for together with what it cannot go with.

    Raises:
        ValueError: If it is.
    """
    for name, value in (("speculative", speculative), ("constraint", constraint)):
        if value is not None:
            raise ValueError(
                f"Beam search takes no `{name}`: it compares continuations as a whole. "
                f"Received: {name}={value!r}"
            )
    if ends.texts:
        raise ValueError(
            "Beam search stops at tokens: give token ids as `stop`, or leave it at 'auto'. "
            f"Received: {list(ends.texts)}"
        )


def names_beams(sampler: object) -> Beam | None:
    """Returns beam search as it is asked for in place of a sampler, or `None`."""
    if sampler == "beam":
        return Beam()
    return sampler if isinstance(sampler, Beam) else None
