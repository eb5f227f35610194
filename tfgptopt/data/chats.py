"""The chat template of a model, and conversations as tokens of which the answers are learned."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

from tfgptopt.data.encoding import special_id, tokenizer_of
from tfgptopt.data.portable import text_tokenizer
from tfgptopt.generation.templates import (
    KNOWN,
    TURN_TOKENS,
    ChatTemplate,
    encode_written,
    get_template,
    shielded,
)
from tfgptopt.generation.tokenizing import TextTokenizer

# The attribute of a model that holds its template.
_ATTRIBUTE = "chat_template"
# Known templates by the beginning of a tokenizer's class, where its vocabulary has the tokens.
_FAMILIES = (
    ("Gemma4", "gemma4"),
    ("Gemma", "gemma"),
    ("Llama3", "llama3"),
    ("Qwen", "qwen"),
    ("SmolLM", "smollm"),
    ("Phi3", "phi3"),
    ("", "chatml"),
)


def set_template(model: keras.Model, template: ChatTemplate | str | None) -> None:
    """Gives a model a chat template, which `tfgptopt.export` stores in its file.

    Args:
        model: keras.Model Keras model.
        template: A `ChatTemplate`, the name of a known one, Jinja, or `None` to take it away.
    """
    setattr(model, _ATTRIBUTE, None if template is None else get_template(template))


@contextlib.contextmanager
def with_template(model: keras.Model, template: ChatTemplate | str | None) -> Iterator[None]:
    """Gives a model a chat template for a while; with `None` it keeps what it has."""
    if template is None:
        yield
        return
    before = getattr(model, _ATTRIBUTE, None)
    set_template(model, template)
    try:
        yield
    finally:
        set_template(model, before)


def template_of(model: keras.Model) -> ChatTemplate | None:
    """Returns the chat template of a model: the one it was given, or that of its family.

    Args:
        model: A KerasHub task, or any Keras model.

    Returns:
        A `ChatTemplate`, or `None` if there is none that the tokenizer has tokens for.
    """
    for owner in (model, getattr(model, "preprocessor", None)):
        given = getattr(owner, _ATTRIBUTE, None)
        if given is not None:
            return get_template(given)
    tokenizer = tokenizer_of(model)
    return None if tokenizer is None else template_for(tokenizer)


def template_for(tokenizer: keras_hub.tokenizers.Tokenizer) -> ChatTemplate | None:
    """Returns the known template of a tokenizer's family, or `None` if it lacks its tokens."""
    for beginning, name in _FAMILIES:
        if type(tokenizer).__name__.startswith(beginning):
            template = KNOWN[name]
            return template if _has(tokenizer, template.stop_tokens[0]) else None
    return None


def _has(tokenizer: keras_hub.tokenizers.Tokenizer, token: str) -> bool:
    try:
        return bool(tokenizer.id_to_token(int(tokenizer.token_to_id(token))) == token)
    except (KeyError, ValueError, NotImplementedError):
        return False


def load_template(folder: str | Path) -> ChatTemplate | None:
    """Returns the chat template of a folder: of a Hugging Face model, or a preset.

    Args:
        folder: It may have `chat_template.jinja`, `chat_template.json`, and
            `tokenizer_config.json` with the template and the names of its tokens.

    Returns:
        A `ChatTemplate`, or `None` if there is none.

    Raises:
        ValueError: If a file is no JSON, or the template does not compile.
    """
    folder = Path(folder)
    settings = _json(folder / "tokenizer_config.json") | _json(folder / "chat_template.json")
    source = settings.get("chat_template")
    if isinstance(source, list):  # Several, by name.
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default") or next(iter(named.values()), None)
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text("utf-8")
    if not isinstance(source, str):
        return None
    eos, bos = _token(settings.get("eos_token")), _token(settings.get("bos_token"))
    turns = [name for known in KNOWN.values() for name in known.stop_tokens if name in source]
    stops = dict.fromkeys([*turns, eos])
    return ChatTemplate(source, tuple(name for name in stops if name), bos, eos)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _token(value: object) -> str:
    """Returns the name of a token, which Hugging Face writes in two ways."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) else ""


def written_turns(
    template: ChatTemplate, messages: Sequence[Mapping[str, str]]
) -> list[list[tuple[str, bool]]]:
    """Returns a conversation as texts, and whether each is an answer.

    A template that writes earlier turns in another way once there are more gives several rows.

    Raises:
        ValueError: If the template refuses the messages, or writes no answers.
    """
    messages = shielded(messages)
    rows: list[list[tuple[str, bool]]] = []
    row: list[tuple[str, bool]] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = template.render(messages[:i], True), template.render(messages[: i + 1])
        if not whole.startswith(prompt):
            prompt = template.render(messages[:i])
        if not whole.startswith(prompt):
            raise ValueError(
                "The chat template writes the messages before an answer in another way once the "
                "answer is there, so that the answer cannot be told apart."
            )
        if not prompt.startswith(written):
            rows.append(row)
            row, written = [], ""
        row += [(prompt[len(written) :], False), *_answer(whole[len(prompt) :], template)]
        written = whole
    return [*rows, row] if row else rows


def _answer(text: str, template: ChatTemplate) -> list[tuple[str, bool]]:
    """Returns an answer with the token that ends it, and what the template writes behind that."""
    ends = [text.rfind(name) + len(name) for name in template.stop_tokens if name in text]
    end = max(ends, default=len(text))
    return [(text[:end], True), (text[end:], False)] if end < len(text) else [(text, True)]


class ChatEncoder:
    """Makes rows of tokens from conversations, or from prompts and responses.

    In a row, a token that is not learned is stored as `-2 - token`.

    Args:
        tokenizer: Of KerasHub.
        template: How messages are written out; `None` joins a prompt and its response as
            KerasHub does, between the start and the end token.
    """

    def __init__(
        self, tokenizer: keras_hub.tokenizers.Tokenizer, template: ChatTemplate | None
    ) -> None:
        self._template = template
        names = (*TURN_TOKENS, *(template.names if template else ()))
        self._tokenizer: TextTokenizer = text_tokenizer(tokenizer, names)
        self._start, self._end = special_id(tokenizer, "start"), special_id(tokenizer, "end")

    def rows(self, messages: Sequence[Mapping[str, str]]) -> Iterator[np.ndarray]:
        """Yields the rows of a conversation, int32.

        Raises:
            ValueError: As `written_turns`.
        """
        if self._template is None:
            yield self._joined(messages)
            return
        for row in written_turns(self._template, messages):
            parts = []
            for i, (text, learned) in enumerate(row):
                ids = np.asarray(encode_written(self._tokenizer, text, i == 0), np.int32)
                parts.append(ids if learned else -2 - ids)
            yield np.concatenate(parts)

    def _joined(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        prompt, response = (
            np.asarray(self._tokenizer.encode(message["content"], True), np.int32)
            for message in messages
        )
        start = [] if self._start is None else [self._start]
        end = [] if self._end is None else [self._end]
        context = np.concatenate([np.asarray(start, np.int32), prompt])
        return np.concatenate([-2 - context, response, np.asarray(end, np.int32)])
