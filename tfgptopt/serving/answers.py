"""Answers as OpenAI's clients read them."""

from __future__ import annotations

import abc
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.generation.texts import TokenScore
from tfgptopt.serving.scheduling import Answer, Piece

_Json = dict[str, Any]


def _usage(answers: Sequence[Answer]) -> _Json:
    # Several answers to one prompt are one prompt to the client.
    prompts = {tuple(answer.text.prompt) for answer in answers}
    read = sum(len(prompt) for prompt in prompts)
    made = sum(len(answer.text.tokens) - len(answer.text.prompt) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class _Head:
    """What all that belongs to one request has in common."""

    def __init__(self, kind: str, name: str, model: TFLiteCausalLM) -> None:
        self._kind, self._name, self._model = kind, name, model
        self._id, self._created = f"{kind[:4]}-{uuid.uuid4().hex}", int(time.time())

    def __call__(self, choices: list[_Json], stream: bool, usage: _Json | None = None) -> _Json:
        kind = f"{self._kind}.chunk" if stream and self._kind.startswith("chat") else self._kind
        head: _Json = {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._name,
            "choices": choices,
        }
        return head if usage is None else {**head, "usage": usage}

    def text_of(self, token: int) -> str:
        """Returns a token as text, as far as it is one alone."""
        return self._model.detokenize([token])


class Writer(abc.ABC):
    """Writes the answers of one request.

    Args:
        name: Of the model.
        model: The model.
    """

    is_chat: ClassVar[bool]
    kind: ClassVar[str]

    def __init__(self, name: str, model: TFLiteCausalLM) -> None:
        self._head = _Head(self.kind, name, model)

    @abc.abstractmethod
    def first(self, answers: Sequence[Answer]) -> Iterator[_Json]:
        """Yields what a stream begins with."""

    @abc.abstractmethod
    def chunk(self, number: int, answer: Answer, piece: Piece) -> _Json:
        """Returns a piece of a stream."""

    @abc.abstractmethod
    def _choice(self, number: int, text: str, answer: Answer, reason: str | None) -> _Json:
        """Returns an answer that is complete."""

    def usage_chunk(self, answers: Sequence[Answer]) -> _Json:
        """Returns the numbers of tokens, with which a stream can end."""
        return self._head([], stream=True, usage=_usage(answers))

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]]) -> _Json:
        """Returns answers that are complete."""
        choices = [
            self._choice(i, "".join(piece.text for piece in found), answer, found[-1].reason)
            for i, (answer, found) in enumerate(zip(answers, pieces, strict=True))
        ]
        return self._head(choices, stream=False, usage=_usage(answers))


class Completions(Writer):
    """Continuations of prompts."""

    is_chat, kind = False, "text_completion"

    def first(self, answers: Sequence[Answer]) -> Iterator[_Json]:
        yield from ()

    def chunk(self, number: int, answer: Answer, piece: Piece) -> _Json:
        choice = self._written(number, piece.text, answer, piece.scores, piece.reason)
        return self._head([choice], stream=True)

    def _choice(self, number: int, text: str, answer: Answer, reason: str | None) -> _Json:
        return self._written(number, text, answer, answer.text.scores, reason)

    def _written(
        self,
        number: int,
        text: str,
        answer: Answer,
        scores: Sequence[TokenScore],
        reason: str | None,
    ) -> _Json:
        found = None if answer.text.top_scores is None else self._scores(scores)
        return {"index": number, "text": text, "logprobs": found, "finish_reason": reason}

    def _scores(self, scores: Sequence[TokenScore]) -> _Json:
        named = self._head.text_of
        return {
            "tokens": [named(one.token) for one in scores],
            "token_logprobs": [one.log_probability for one in scores],
            "top_logprobs": [{named(t): value for t, value in one.largest} for one in scores],
            "text_offset": [],
        }


class Chats(Writer):
    """Answers to chats."""

    is_chat, kind = True, "chat.completion"

    def first(self, answers: Sequence[Answer]) -> Iterator[_Json]:
        for number in range(len(answers)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._head([choice], stream=True)

    def chunk(self, number: int, answer: Answer, piece: Piece) -> _Json:
        choice: _Json = {
            "index": number,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._scores(answer, piece.scores),
            "finish_reason": piece.reason,
        }
        return self._head([choice], stream=True)

    def _choice(self, number: int, text: str, answer: Answer, reason: str | None) -> _Json:
        return {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._scores(answer, answer.text.scores),
            "finish_reason": reason,
        }

    def _scores(self, answer: Answer, scores: Sequence[TokenScore]) -> _Json | None:
        if answer.text.top_scores is None:
            return None

        def written(token: int, value: float) -> _Json:
            text = self._head.text_of(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                {
                    **written(one.token, one.log_probability),
                    "top_logprobs": [written(token, value) for token, value in one.largest],
                }
                for one in scores
            ]
        }
