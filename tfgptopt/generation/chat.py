"""A chat: messages in, answers out, written as the file's template has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tfgptopt.generation import samplers
from tfgptopt.generation.codec import Codec, Stop, StopLike
from tfgptopt.generation.constraints import Constraint, check_ends
from tfgptopt.generation.session import Session
from tfgptopt.generation.templates import (
    ChatTemplate,
    check_messages,
    encode_written,
    shielded,
)


class Chat:
    """A conversation with a model. `TFLiteCausalLM.chat()` makes it.

    Only what is new is read at each turn. What a person typed is text: names of special tokens in
    messages mean nothing.

    Attributes:
        messages: The conversation so far, dictionaries of `role` and `content`.

    Example:

    ```python
    chat = lm.chat(template="{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}")
    print(chat.generate("What is it?", max_new_tokens=8))
    for piece in chat.stream("Why?", max_new_tokens=8):
        print(piece, end="", flush=True)
    ```
    """

    def __init__(
        self, session: Session, codec: Codec, template: ChatTemplate, system: str | None
    ) -> None:
        self._session = session
        self._tokenizer = codec.tokenizer
        self._codec = codec
        self._template = template
        self._first = check_messages([{"role": "system", "content": system}]) if system else []
        self.messages: list[dict[str, str]] = list(self._first)
        # What the template wrote of them, as far as the session holds it as tokens.
        self._written = ""
        self._turn: Iterator[str] | None = None

    @property
    def tokens(self) -> list[int]:
        """The conversation so far as token ids."""
        return self._session.tokens

    def generate(
        self,
        message: str | Sequence[Mapping[str, str]],
        max_new_tokens: int | None = None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler] = "greedy",
        stop: StopLike = "auto",
        seed: int | None = None,
        constraint: Constraint | None = None,
    ) -> str:
        """Appends a message, and returns the answer, which is appended too.

        Args:
            message: What the user says, or a list of messages of `role` and `content`.
            max_new_tokens: int. Most tokens of the answer. Defaults to `None`: until the context
                is full.
            sampler: As for `TFLiteCausalLM.generate`, as is `seed`.
            stop: `"auto"` for the tokens that end a turn; texts and token ids, or `None`, as for
                `TFLiteCausalLM.generate`. Defaults to `"auto"`.
            constraint: What the answer must be, as for `TFLiteCausalLM.generate`. Defaults to
                `None`.

        Returns:
            The answer.

        Raises:
            ValueError: If the messages have an unknown role, the template refuses them, they do
                not fit into the context, or an argument is out of range. The chat is then as it
                was.
        """
        return "".join(self.stream(message, max_new_tokens, sampler, stop, seed, constraint))

    def stream(
        self,
        message: str | Sequence[Mapping[str, str]],
        max_new_tokens: int | None = None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler] = "greedy",
        stop: StopLike = "auto",
        seed: int | None = None,
        constraint: Constraint | None = None,
    ) -> Iterator[str]:
        """Appends a message, and yields the answer as it comes.

        A stream that is broken off leaves the chat with what came until then.

        Args:
            message: As for `generate`, as are all arguments behind it.

        Yields:
            Pieces of text: whole characters.
        """
        if self._turn is not None:
            self._turn.close()  # type: ignore[attr-defined]
            self._turn = None
        new = [{"role": "user", "content": message}] if isinstance(message, str) else message
        messages = [*self.messages, *check_messages(new)]
        chosen, ends = samplers.get(sampler), answer_ends(self._codec, self._template, stop)
        if constraint is not None:
            check_ends(ends, self._codec, stop)
        prompt = self._template.render(shielded(messages), add_generation_prompt=True)
        tokens = self._encoded(prompt)
        answer = self._session.begin(tokens, max_new_tokens, chosen, ends, seed, constraint)
        self.messages = messages
        self._written = prompt
        self._turn = self._pieces(answer)
        return self._turn

    def reset(self) -> None:
        """Forgets the conversation, but for the message of the system that the chat began with."""
        self._session.reset()
        self.messages, self._written, self._turn = list(self._first), "", None

    def _pieces(self, answer: Iterator[str]) -> Iterator[str]:
        """Yields an answer, and appends it in the end."""
        shown: list[str] = []
        try:
            for piece in answer:
                shown.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(shown)})
            self._written += shielded(self.messages[-1:])[0]["content"]

    def _encoded(self, prompt: str) -> list[int]:
        """Returns the tokens of the conversation, those of earlier turns as they were sampled."""
        held, tokenizer = self._session.tokens, self._tokenizer
        if held and prompt.startswith(self._written):
            return held + encode_written(tokenizer, prompt[len(self._written) :], begins=False)
        # The template writes earlier turns in another way now: what is alike is not read again.
        return encode_written(tokenizer, prompt)


def answer_ends(codec: Codec, template: ChatTemplate, stop: StopLike) -> Stop:
    """Returns what ends an answer: for `"auto"`, the template's tokens too.

    Args:
        codec: Knows the tokenizer.
        template: Writes the messages.
        stop: As for `TFLiteCausalLM.generate`.

    Raises:
        ValueError: If `stop` is none.
    """
    ends = codec.stop(stop)
    if not (isinstance(stop, str) and stop == "auto"):
        return ends
    ids = [codec.tokenizer.token_to_id(name) for name in template.stop_tokens]
    # A model whose vocabulary has no such token writes the name out.
    texts = [name for name, token in zip(template.stop_tokens, ids, strict=True) if token is None]
    return Stop(ends.ids | {token for token in ids if token is not None}, tuple(texts))
