"""Between text and token ids, with what a file knows of its special tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfgptopt.file.metadata import Metadata
from tfgptopt.generation.templates import TURN_TOKENS
from tfgptopt.generation.tokenizing import Json, SentencePiece, TextTokenizer

Prompt = str | Sequence[int] | np.ndarray
StopLike = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Stop:
    """What ends a continuation: token ids, and texts that may span several tokens."""

    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


class Codec:
    """Encodes prompts and decodes tokens. The tokenizer is read when it is first needed.

    Args:
        metadata: Of the file.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.vocabulary_size = metadata.decoder.vocabulary_size
        self.start_token_id = metadata.generation.start_token_id
        self.end_token_ids = frozenset(metadata.generation.end_token_ids)
        self._metadata = metadata

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer.

        Raises:
            ValueError: If the file has none, or it has more tokens than the model.
        """
        found, known = _tokenizer_of(self._metadata), self.vocabulary_size
        if found is None:
            raise ValueError(
                "The file has no tokenizer: the model was exported without a preprocessor. "
                "Give lists of token ids, and no text."
            )
        if found.size > known:
            raise ValueError(
                f"The file's tokenizer has {found.size} tokens, and its model only {known}. "
                "Export the model with the tokenizer that it was trained with."
            )
        return found

    def tokenize(self, text: str, special_tokens: bool = False) -> list[int]:
        """Returns the token ids of a text, without a start token.

        Args:
            text: The text.
            special_tokens: Whether names of special tokens in it are those. Defaults to `False`:
                they are text.

        Raises:
            ValueError: If the text cannot be encoded, or there is no tokenizer.
        """
        tokenizer = self.tokenizer
        try:
            ids = tokenizer.encode(text, special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"The prompt is no valid Unicode text: {error}") from None
        if tokenizer.lacks(text, ids):
            raise ValueError("The prompt has characters that the tokenizer's vocabulary lacks.")
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self.tokenizer.decode(ids)

    def encode(self, prompt: Prompt, start: bool = True, special_tokens: bool = False) -> list[int]:
        """Checks a prompt and returns its ids; a text gets the start token if `start` is true.

        Raises:
            ValueError: If it is empty, cannot be encoded or has ids that the model does not know.
        """
        if isinstance(prompt, bytes):
            raise ValueError(
                "A prompt is text or a list of token ids. Received bytes: decode them."
            )
        begins = start and isinstance(prompt, str) and self.start_token_id is not None
        if len(prompt) == 0 and not begins:
            raise ValueError(
                "The prompt is empty, and no start token begins it. Give at least one character "
                "or token id."
            )
        if isinstance(prompt, str):
            ids = self.tokenize(prompt, special_tokens) if prompt else []
            if start and self.start_token_id is not None:
                ids = [self.start_token_id, *ids]
            if not ids:
                raise ValueError(f"The prompt {prompt!r} is empty to the tokenizer: it has no ids.")
        else:
            ids = [int(token) for token in prompt]
        wrong = [token for token in ids if not 0 <= token < self.vocabulary_size]
        if wrong:
            raise ValueError(
                f"The prompt has token id {wrong[0]}; ids of this model go from 0 to "
                f"{self.vocabulary_size - 1}."
            )
        return ids

    def stop(self, stop: StopLike) -> Stop:
        """Returns what ends a continuation.

        Raises:
            ValueError: If an entry is empty or neither a text nor a token id, or is a text and
                there is no tokenizer.
        """
        end = self.end_token_ids
        if stop is None:
            return Stop()
        if isinstance(stop, str) and stop == "auto":
            return Stop(end)
        entries: list[str | int] = [stop] if isinstance(stop, str | int) else list(stop)
        texts = tuple(entry for entry in entries if isinstance(entry, str))
        ids = {e for e in entries if isinstance(e, int | np.integer) and not isinstance(e, bool)}
        if len(texts) + len([e for e in entries if not isinstance(e, str) and e in ids]) < len(
            entries
        ) or not all(texts):
            raise ValueError(
                "`stop` is 'auto', None, or texts and token ids, none of them empty. "
                f"Received: {stop!r}"
            )
        # A special token, such as <|im_end|>, gives no text in which it could be found.
        special = (self.tokenizer.token_to_id(text) for text in texts)
        named = {token for token in special if token is not None}
        return Stop(frozenset({int(i) for i in ids} | named) | (frozenset() if ids else end), texts)


def _tokenizer_of(metadata: Metadata) -> TextTokenizer | None:
    """Returns the tokenizer of a file, if it has one."""
    names = metadata.special_tokens or TURN_TOKENS
    if metadata.sentencepiece is not None:
        return SentencePiece(metadata.sentencepiece, names)
    if metadata.tokenizer is not None:
        return Json(metadata.tokenizer, names)
    return None
