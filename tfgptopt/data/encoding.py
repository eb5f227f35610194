"""Token ids of texts by any tokenizer of KerasHub, through its public methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np

# Texts that a tokenizer gets at once: byte-pair and SentencePiece tokenizers share them out among
# threads.
_TEXTS = 16


def tokenizer_of(model: keras.Model) -> Any:
    """Returns the tokenizer of a KerasHub model, or `None`."""
    return getattr(getattr(model, "preprocessor", None), "tokenizer", None)


def encode_texts(
    tokenizer: keras_hub.tokenizers.Tokenizer, texts: Sequence[str]
) -> list[np.ndarray]:
    """Returns the token ids of each text, those that `tokenizer(text)` gives.

    Args:
        tokenizer: Any tokenizer of KerasHub.
        texts: The texts.

    Raises:
        ValueError: If the tokenizer pads, or gives no ids.
    """
    length = getattr(tokenizer, "sequence_length", None)
    if length is not None:
        raise ValueError(
            f"The tokenizer pads and cuts texts to {length} tokens. Give one without "
            "`sequence_length`; windows have a length of their own."
        )
    found = tokenizer.tokenize(list(texts))
    rows = found.to_list() if hasattr(found, "to_list") else found
    ids = [np.asarray(row) for row in rows]
    wrong = next(
        (row for row in ids if row.size and not np.issubdtype(row.dtype, np.integer)), None
    )
    if wrong is not None:
        raise ValueError(
            f"The tokenizer gives {wrong[0]!r} where a token id is expected. Make it with "
            "`dtype='int32'`."
        )
    return [row.astype(np.int32) for row in ids]


def encode_all(
    tokenizer: keras_hub.tokenizers.Tokenizer, texts: Iterable[str]
) -> Iterator[np.ndarray]:
    """Yields the token ids of texts one after the other, several made at once."""
    waiting: list[str] = []
    for text in texts:
        waiting.append(text)
        if len(waiting) == _TEXTS:
            yield from encode_texts(tokenizer, waiting)
            waiting = []
    if waiting:
        yield from encode_texts(tokenizer, waiting)


def special_id(tokenizer: keras_hub.tokenizers.Tokenizer, name: str) -> int | None:
    """Returns the id of a special token (`"end"`, `"start"` or `"pad"`), or `None` without one."""
    found = getattr(tokenizer, f"{name}_token_id", None)
    return None if found is None else int(found)
