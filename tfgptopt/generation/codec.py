"""Between text and token ids, with what a file knows of its special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from tfgptopt.file.metadata import Metadata

Prompt = str | Sequence[int] | np.ndarray
StopLike = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Stop:
    """What ends a continuation: token ids, and texts that may span several tokens."""

    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


class Codec:
    """Encodes prompts and decodes tokens.

    Args:
        metadata: Of the file.

    Raises:
        ValueError: If the tokenizer has more tokens than the model.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.vocabulary_size = metadata.decoder.vocabulary_size
        self.start_token_id = metadata.generation.start_token_id
        self.end_token_ids = frozenset(metadata.generation.end_token_ids)
        blob = metadata.tokenizer
        self._tokenizer = tokenizers.Tokenizer.from_str(blob) if blob else None
        size = self._tokenizer.get_vocab_size() if self._tokenizer else 0
        known = self.vocabulary_size
        if size > known:
            raise ValueError(
                f"The file's tokenizer has {size} tokens, and its model only {known}. "
                "Export the model with the tokenizer that it was trained with."
            )

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: If the file has none.
        """
        if self._tokenizer is None:
            raise ValueError(
                "The file has no tokenizer: the model was exported without a preprocessor. "
                "Give lists of token ids, and no text."
            )
        return self._tokenizer

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, without a start token.

        Raises:
            ValueError: If the text cannot be encoded, or there is no tokenizer.
        """
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
            lossless = self.tokenizer.decode(ids, skip_special_tokens=False) == text
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"The prompt is no valid Unicode text: {error}") from None
        if not lossless:
            raise ValueError("The prompt has characters that the tokenizer's vocabulary lacks.")
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids))
        return text

    def encode(self, prompt: Prompt, start: bool = True) -> list[int]:
        """Checks a prompt and returns its ids; a text gets the start token if `start` is true.

        Raises:
            ValueError: If it is empty, cannot be encoded or has ids that the model does not know.
        """
        if isinstance(prompt, bytes):
            raise ValueError(
                "A prompt is text or a list of token ids. Received bytes: decode them."
            )
        if len(prompt) == 0:
            raise ValueError("The prompt is empty. Give at least one character or token id.")
        if isinstance(prompt, str):
            ids = self.tokenize(prompt)
            if start and self.start_token_id is not None:
                ids = [self.start_token_id, *ids]
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
