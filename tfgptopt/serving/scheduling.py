"""One thread that runs the model, and the answers that it makes for many clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.generation.speculating import Statistics
from tfgptopt.generation.texts import Text, TokenScore
from tfgptopt.monitoring.generation import GenerationMetrics

# Turns of an event loop in which a piece goes from its queue into a socket, and how many seconds
# the model waits for them at most.
_TURNS, _PATIENCE = 8, 0.01


@dataclass(frozen=True)
class Piece:
    """What came of an answer.

    Attributes:
        text: Text that is sure now.
        tokens: New tokens so far.
        scores: Of the tokens since the piece before, if they are wanted.
        reason: Why it ended, `"stop"` or `"length"`; `None` while it goes on.
        error: Why it could not go on, or `None`.
    """

    text: str
    tokens: int
    scores: Sequence[TokenScore]
    reason: str | None
    error: str | None


@dataclass(eq=False)
class Answer:
    """An answer that is being made. A client reads its pieces.

    Attributes:
        text: The text.
        loop: The event loop of the client.
        pieces: What came and was not read yet.
    """

    text: Text
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    asked: float = field(default_factory=time.perf_counter)
    last: float | None = None
    told: int = 0

    async def read(self) -> AsyncIterator[Piece]:
        """Yields pieces until it has ended."""
        while True:
            piece = await self.pieces.get()
            yield piece
            if piece.reason is not None or piece.error is not None:
                return


class Full(Exception):
    """Too many texts wait already."""


class Scheduler:
    """Continues the texts of all clients with one model, several at once if the file allows it.

    Args:
        model: The model.
        queue: Texts that may wait.
        metrics: Counts and times.
    """

    def __init__(self, model: TFLiteCausalLM, queue: int, metrics: GenerationMetrics) -> None:
        self._model, self._queue, self._metrics = model, queue, metrics
        self._feeder = model.feeder()
        self._answers: dict[Text, Answer] = {}
        self._new: deque[Answer] = deque()
        self._given_up: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tfgptopt-model", daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[Text]) -> list[Answer]:
        """Takes texts from an event loop, all or none.

        Raises:
            Full: If too many wait already.
        """
        loop = asyncio.get_running_loop()
        with self._changed:
            if len(self._new) + len(self._feeder.waiting) + len(texts) > self._queue:
                raise Full
            answers = [Answer(text, loop) for text in texts]
            self._new.extend(answers)
            self._changed.notify()
        return answers

    def give_up(self, answers: Sequence[Answer]) -> None:
        """Forgets answers that nobody waits for any more."""
        with self._changed:
            self._given_up.extend(answers)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread, after the step that it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._new or self._given_up or self._feeder.busy or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                self._take()
            try:
                self._tell(self._feeder.step(Statistics()))
            except Exception as error:  # The model itself: nothing that it held can be trusted.
                self._fail(f"{type(error).__name__}: {error}")
            self._metrics.waiting.set(len(self._feeder.waiting) + len(self._new))
            self._metrics.running.set(len(self._feeder.running))

    def _take(self) -> None:
        """Takes what clients asked for since the last step."""
        while self._new:
            answer = self._new.popleft()
            self._answers[answer.text] = answer
            self._feeder.waiting.append(answer.text)
        while self._given_up:
            text = self._given_up.popleft().text
            self._feeder.remove(text)
            self._answers.pop(text, None)

    def _tell(self, made: Sequence[tuple[Text, str]]) -> None:
        """Gives clients what a step made."""
        now = time.perf_counter()
        pieces: dict[asyncio.AbstractEventLoop, list[tuple[Answer, Piece]]] = {}
        for text, shown in made:
            answer = self._answers.get(text)
            if answer is None:
                continue
            self._time(answer, now)
            pieces.setdefault(answer.loop, []).append((answer, _piece(answer, shown)))
            if text.finished:
                del self._answers[text]
        sent = [_call(loop, found) for loop, found in pieces.items()]
        for one in sent:
            one.wait(_PATIENCE)

    def _time(self, answer: Answer, now: float) -> None:
        count = len(answer.text.tokens) - len(answer.text.prompt)
        if count and answer.last is None:
            self._metrics.first_token.observe(now - answer.asked)
            self._metrics.prompt_tokens.inc(len(answer.text.prompt))
        elif answer.last is not None:
            self._metrics.inter_token.observe(now - answer.last)
        self._metrics.new_tokens.inc(1 if count else 0)
        answer.last = now

    def _fail(self, error: str) -> None:
        """Ends all answers with an error, and begins anew."""
        for answer in self._answers.values():
            _call(answer.loop, [(answer, Piece("", 0, (), None, error))])
        self._answers.clear()
        self._feeder = self._model.feeder()


def _piece(answer: Answer, shown: str) -> Piece:
    """Returns what a step made of an answer."""
    text = answer.text
    scores, answer.told = text.scores[answer.told :], len(text.scores)
    reason = None
    if text.finished:
        reason = "stop" if text.continuation.ended else "length"
    error = None if text.error is None else str(text.error)
    return Piece(shown, len(text.tokens) - len(text.prompt), scores, reason, error)


def _call(loop: asyncio.AbstractEventLoop, found: list[tuple[Answer, Piece]]) -> threading.Event:
    """Puts pieces into their queues, in the loop that reads them.

    LiteRT keeps Python's lock while it computes: a loop that has to ask for it at each of its
    steps would send the pieces of many tokens together, some steps of the model later.

    Returns:
        What is set when the loop has gone on far enough to have sent them.
    """
    sent = threading.Event()

    def put() -> None:
        for answer, piece in found:
            answer.pieces.put_nowait(piece)
        go_on(_TURNS)

    def go_on(turns: int) -> None:
        if turns:
            loop.call_soon(go_on, turns - 1)
        else:
            sent.set()

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # The loop is closed: nobody listens.
        sent.set()
    return sent
