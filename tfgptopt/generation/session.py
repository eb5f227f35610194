"""A text that grows by turns, as in a chat, and keeps its KV cache between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from tfgptopt.generation import samplers
from tfgptopt.generation.caches import Cache
from tfgptopt.generation.codec import Codec, Stop, StopLike
from tfgptopt.generation.constraints import Constraint, Matchers, check_ends
from tfgptopt.generation.continuing import Continuation
from tfgptopt.generation.decoding import Decoding


class Session:
    """A text that grows by turns. `TFLiteCausalLM.session()` makes it.

    Only what is new is read at each turn. Sessions of one model share its weights, and each has a
    KV cache of its own.

    Example:

    ```python
    chat = lm.session()
    print(chat.generate("Q: What is a KV cache?\\nA:", max_new_tokens=40, stop="\\n"))
    print(chat.generate("\\nQ: Why does it help?\\nA:", max_new_tokens=40, stop="\\n"))
    ```
    """

    def __init__(
        self,
        decoding: Decoding,
        codec: Codec,
        matchers: Matchers,
        cache: Cache,
        tokens: Sequence[int],
    ) -> None:
        self._tokens = list(tokens)
        self._matchers = matchers
        self._decoding = decoding
        self._codec = codec
        self._cache = cache
        self._lock = threading.Lock()
        self._turn: Iterator[str] | None = None
        self._continuation: Continuation | None = None

    @property
    def tokens(self) -> list[int]:
        """The text so far as token ids: prompts and continuations, also of an open stream."""
        tokens, turn = list(self._tokens), self._continuation
        if turn is not None:
            tokens += turn.tokens
            if turn.tail:
                tokens += self._codec.tokenizer.encode(turn.tail, special_tokens=False)
        return tokens

    @property
    def text(self) -> str:
        """The text so far, without special tokens.

        Raises:
            ValueError: If the file has no tokenizer.
        """
        return self._codec.detokenize(self.tokens)

    def generate(
        self,
        text: str,
        max_new_tokens: int | None = None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler] = "greedy",
        stop: StopLike = "auto",
        seed: int | None = None,
        special_tokens: bool = False,
        constraint: Constraint | None = None,
    ) -> str:
        """Appends a text and its continuation to the session, and returns the continuation.

        Args:
            text: What comes next. The first text gets the model's start token, if it has one.
            max_new_tokens: int. Most tokens to continue with. Defaults to `None`: until the
                context is full.
            sampler: As for `TFLiteCausalLM.generate`, as are all arguments behind it. What stops
                the continuation is not kept: in a chat, begin the next text with it.

        Returns:
            The continuation.

        Raises:
            ValueError: If the text is empty, cannot be encoded or does not fit into the context,
                or an argument is out of range. The session is then as it was.
            RuntimeError: If another thread is using the session.
        """
        return "".join(
            self.stream(text, max_new_tokens, sampler, stop, seed, special_tokens, constraint)
        )

    def stream(
        self,
        text: str,
        max_new_tokens: int | None = None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler] = "greedy",
        stop: StopLike = "auto",
        seed: int | None = None,
        special_tokens: bool = False,
        constraint: Constraint | None = None,
    ) -> Iterator[str]:
        """Appends a text to the session, and yields its continuation as it comes.

        A stream that is broken off leaves the session with what came until then; the next call
        ends a stream that is still open.

        Args:
            text: As for `generate`, as are all arguments behind it.

        Yields:
            Pieces of text: whole characters, and nothing of a stop text.
        """
        chosen, ends = samplers.get(sampler), self._codec.stop(stop)
        if constraint is not None:
            check_ends(ends, self._codec, stop)
        with self._lock:
            self._end_turn()
            tokens = self.tokens + self._encode(text, special_tokens)
            return self._begin(tokens, max_new_tokens, chosen, ends, seed, constraint)

    def begin(
        self,
        tokens: list[int],
        max_new_tokens: int | None,
        sampler: Sequence[samplers.Sampler],
        stop: Stop,
        seed: int | None,
        constraint: Constraint | None = None,
    ) -> Iterator[str]:
        """Continues tokens that take the place of the text so far; what is alike is not read again.

        Args:
            tokens: The whole text.
            max_new_tokens: As for `stream`, as is `seed`.
            sampler: The samplers.
            stop: What ends the continuation.
            constraint: What the continuation must be. Defaults to `None`.

        Yields:
            Pieces of text, as `stream`.
        """
        with self._lock:
            self._end_turn()
            return self._begin(tokens, max_new_tokens, sampler, stop, seed, constraint)

    def _begin(
        self,
        tokens: list[int],
        max_new_tokens: int | None,
        sampler: Sequence[samplers.Sampler],
        stop: Stop,
        seed: int | None,
        constraint: Constraint | None,
    ) -> Iterator[str]:
        """Begins to continue a text, which takes the place of the one so far."""
        length = self._length(len(tokens), max_new_tokens)
        held = None if constraint is None else self._matchers.matcher(constraint, tokens)
        new = self._decoding.tokens(self._cache, tokens, length, sampler, seed, matcher=held)
        self._tokens = tokens
        self._continuation = Continuation(self._codec, tokens, stop)
        self._turn = self._continuation.pieces(new)
        return self._turn

    def reset(self) -> None:
        """Forgets the text. The cache stays, for what begins with the same tokens."""
        with self._lock:
            self._end_turn()
            self._tokens, self._continuation = [], None

    def fork(self) -> Session:
        """Returns a session with the same text so far, which then goes its own way."""
        with self._lock:
            self._end_turn()
            cache = self._decoding.engine.copy_cache(self._cache)
            return Session(self._decoding, self._codec, self._matchers, cache, self.tokens)

    def _end_turn(self) -> None:
        """Ends a stream that is still open.

        Raises:
            RuntimeError: If another thread is in it.
        """
        if self._turn is not None:
            try:
                self._turn.close()  # type: ignore[attr-defined]
            except ValueError:  # Python's own check: the generator is running.
                raise RuntimeError(
                    "Another thread is using this session. Give each thread a session of its own: "
                    "`lm.session()` or `session.fork()`."
                ) from None
            self._turn = None

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        """Returns the ids of what comes next.

        Raises:
            ValueError: If it is no text, or cannot be encoded.
        """
        if not isinstance(text, str):
            raise ValueError(f"A session continues text. Received: {type(text).__name__}")
        return self._codec.encode(text, not self.tokens, special_tokens)

    def _length(self, size: int, max_new_tokens: int | None) -> int:
        """Returns the number of tokens to stop at.

        Raises:
            ValueError: If the text does not fit, or `max_new_tokens` is out of range.
        """
        context = self._decoding.engine.context_length
        if max_new_tokens is not None and (
            isinstance(max_new_tokens, bool)
            or not isinstance(max_new_tokens, int)
            or max_new_tokens < 1
        ):
            raise ValueError(
                f"`max_new_tokens` must be an int >= 1, or None. Received: {max_new_tokens!r}"
            )
        if size >= context:
            raise ValueError(
                f"The session would have {size} tokens, and the model's context has {context}. "
                f"It has {len(self.tokens)} now: call `reset()`, and give a shorter text."
            )
        return context if max_new_tokens is None else min(context, size + max_new_tokens)
