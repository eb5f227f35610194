"""Texts while they are being continued, and how they begin: from a prompt, or from messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tfgptopt.file.metadata import Metadata
from tfgptopt.generation import samplers
from tfgptopt.generation.caches import Cache
from tfgptopt.generation.chat import answer_ends
from tfgptopt.generation.codec import Codec, Prompt, Stop, StopLike
from tfgptopt.generation.constraints import Constraint, Matchers, check_ends
from tfgptopt.generation.continuing import Continuation
from tfgptopt.generation.decoding import Decoding
from tfgptopt.generation.prompts import Prompts
from tfgptopt.generation.speculating import Statistics
from tfgptopt.generation.templates import (
    ChatTemplate,
    Message,
    check_messages,
    encode_written,
    shielded,
)


@dataclass(frozen=True)
class TokenScore:
    """How likely a token was, before samplers.

    Attributes:
        token: The token.
        log_probability: Natural logarithm of its probability.
        largest: The likeliest tokens and theirs.
    """

    token: int
    log_probability: float
    largest: list[tuple[int, float]]


class Text:
    """A prompt that is being continued.

    Args:
        prompt: Its tokens.
        length: Tokens of prompt and continuation together.
        chain: How a token is chosen.
        seed: Of the samplers; `None` for another text each time.
        continuation: Takes the tokens.
        matcher: What the text is held to, before `chain`. Defaults to `None`.

    Attributes:
        prompt: Its tokens.
        tokens: The tokens so far, prompt included.
        error: Why it could not be continued, or `None`.
        top_scores: How many of the likeliest tokens are wanted with each, or `None` for no scores.
        scores: Of the new tokens, if they are wanted.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        length: int,
        chain: Sequence[samplers.Sampler],
        seed: int | None,
        continuation: Continuation,
        matcher: samplers.Sampler | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.error: Exception | None = None
        self.top_scores: int | None = None
        self.scores: list[TokenScore] = []
        self.tokens = list(prompt)
        self.length = length
        self.continuation = continuation
        self._chain, self._seed, self._matcher = chain, seed, matcher
        self._generator = np.random.default_rng(seed)

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        ended = self.continuation.ended or self.error is not None
        return ended or len(self.tokens) >= self.length

    def take(self, logits: np.ndarray) -> str:
        """Chooses the next token; returns the text that is sure now.

        Where none can be chosen, the text is finished, and the others are not concerned.
        """
        chain = self._chain if self._matcher is None else (self._matcher, *self._chain)
        try:
            token = samplers.choose(logits, self.tokens, chain, self._generator)
        except Exception as error:
            self.error = error
            return ""
        if self.top_scores is not None:
            self.scores.append(_score(logits, token, self.top_scores))
        self.tokens.append(token)
        piece = self.continuation.add(token)
        if self.finished and not self.continuation.ended:
            piece += self.continuation.finish()
        return piece

    def continue_alone(self, decoding: Decoding, cache: Cache, statistics: Statistics) -> None:
        """Continues it to its end, by guesses where there are any.

        Args:
            decoding: How tokens are made.
            cache: A cache of the model.
            statistics: Counts calls and tokens.
        """
        for _ in self.pieces(decoding, cache, statistics):
            pass

    def pieces(self, decoding: Decoding, cache: Cache, statistics: Statistics) -> Iterator[str]:
        """Continues it as `continue_alone` does; yields its text as it comes."""
        new = decoding.tokens(
            cache, self.prompt, self.length, self._chain, self._seed, statistics, self._matcher
        )
        yield from self.continuation.pieces(new)

    def result(self, prompt: Prompt, strip_prompt: bool) -> str | list[int]:
        """Returns what a prompt became, as text or ids, as it was given.

        Args:
            prompt: The prompt as it was given.
            strip_prompt: Whether only what is new is wanted.
        """
        made = self.continuation
        if isinstance(prompt, str):
            return made.text if strip_prompt else prompt + made.text
        return made.tokens if strip_prompt else self.prompt + made.tokens


def _score(logits: np.ndarray, token: int, count: int) -> TokenScore:
    largest = logits.max()
    total = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    best = np.argsort(-logits, kind="stable")[:count]
    pairs = [(int(i), float(logits[i]) - total) for i in best]
    return TokenScore(token, float(logits[token]) - total, pairs)


class TextMaker:
    """Makes the texts of one model.

    Args:
        codec: Encodes texts.
        metadata: Of the file.

    Attributes:
        prompts: Checks prompts.
        matchers: Hold texts to constraints.
    """

    def __init__(self, codec: Codec, metadata: Metadata) -> None:
        self._codec, self._metadata = codec, metadata
        self._context_length = metadata.decoder.context_length
        self.prompts = Prompts(codec, self._context_length)
        self.matchers = Matchers(codec, metadata)

    def ends(self, stop: StopLike, constraint: Constraint | None) -> Stop:
        """Returns what ends a continuation.

        Raises:
            ValueError: If it could not end where its form is complete, or `stop` is none.
        """
        ends = self._codec.stop(stop)
        if constraint is not None:
            check_ends(ends, self._codec, stop)
        return ends

    def make(
        self,
        ids: list[int],
        length: int,
        chain: Sequence[samplers.Sampler],
        ends: Stop,
        seed: int | None,
        constraint: Constraint | None = None,
        as_text: bool = True,
    ) -> Text:
        """Returns a text that begins with tokens.

        Args:
            ids: The tokens, which were checked.
            length: Tokens of prompt and continuation together.
            chain: How a token is chosen.
            ends: What ends it.
            seed: Of the samplers, or `None`.
            constraint: What the continuation must be. Defaults to `None`.
            as_text: Whether its text is wanted. Defaults to `True`.
        """
        continuation = Continuation(self._codec, ids, ends, as_text)
        matcher = None if constraint is None else self.matchers.matcher(constraint, ids)
        return Text(ids, length, chain, seed, continuation, matcher)

    def from_prompt(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler],
        stop: StopLike,
        seed: int | None,
        constraint: Constraint | None,
    ) -> Text:
        """Returns a text that begins with a prompt.

        Args:
            prompt: As for `TFLiteCausalLM.generate`, as are `sampler` and what is behind it.
            max_new_tokens: Most tokens of the continuation; `None` for the rest of the context.

        Raises:
            ValueError: As `TFLiteCausalLM.generate`.
        """
        chain, ends = samplers.get(sampler), self.ends(stop, constraint)
        ids, _ = self.prompts.prepare(prompt, None, special_tokens=False)
        return self.make(ids, self._length(ids, max_new_tokens), chain, ends, seed, constraint)

    def from_messages(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler],
        stop: StopLike,
        seed: int | None,
        constraint: Constraint | None,
    ) -> Text:
        """Returns the answer to messages, written as the file's template has it.

        Args:
            messages: Dictionaries of `role` and `content`.
            max_new_tokens: As for `from_prompt`, as are all arguments behind it.

        Raises:
            ValueError: As `TFLiteCausalLM.generate`, and if the file has no template, or that
                refuses the messages.
        """
        if self._metadata.chat is None:
            raise ValueError("The file has no chat template: its model is not one for chats.")
        template, chain = ChatTemplate.from_metadata(self._metadata.chat), samplers.get(sampler)
        asked, own = self.ends(stop, constraint), answer_ends(self._codec, template, "auto")
        ends = own if stop == "auto" else Stop(asked.ids | own.ids, asked.texts + own.texts)
        written = template.render(shielded(check_messages(messages)), add_generation_prompt=True)
        ids = encode_written(self._codec.tokenizer, written)
        self.prompts.check_length(ids, self._context_length)
        return self.make(ids, self._length(ids, max_new_tokens), chain, ends, seed, constraint)

    def _length(self, ids: list[int], max_new_tokens: int | None) -> int:
        if max_new_tokens is None:
            return self._context_length
        samplers.check_count("max_new_tokens", max_new_tokens)
        return min(self._context_length, len(ids) + max_new_tokens)
