"""Stores a KerasHub tokenizer so that a runtime without TensorFlow gives the same tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import keras_hub
import numpy as np

from tfgptopt.data.portable import Portable, portable

_TURNS = ("<end_of_turn>", "<turn|>")  # Of Gemma 1 to 3 and 3n, and of Gemma 4.
_PROBES = (
    "a",
    " a  b   c ",
    "The quick brown fox jumped over 3.14159 lazy dogs, didn't it?",
    "def main(argv):\n    return {'a': [1, 2, 3]}\n\n\n",
    "\tTabs\tand\r\nline ends\n\n",
    "Größe, naïve façade, Ελληνικά, русский, עברית, العربية, हिन्दी",
    "日本語のテキストと中文文本",
    "emoji 🙂🏳️‍🌈 and \u200b zero width, ﬁ ligature, ½, ①",
    "<s> </s> <unk> <bos> <eos> <pad> <0x41> <start_of_turn>user\nhi<end_of_turn>",
    "x" * 50 + " " * 20 + "=" * 30,
)


def store_tokenizer(
    tokenizer: keras_hub.tokenizers.Tokenizer, special_tokens: Sequence[str] = ()
) -> Portable:
    """Returns a tokenizer as a file holds it, compared with KerasHub's on probes.

    Args:
        tokenizer: A tokenizer of KerasHub.
        special_tokens: Names of tokens that are no text besides those that KerasHub knows.
            Defaults to none.

    Raises:
        ValueError: If it is of another kind, or does not give the same tokens without KerasHub.
    """
    stored = portable(tokenizer, special_tokens)
    loaded = stored.load()
    for text in _probes(tokenizer):
        expected = np.asarray(tokenizer.tokenize(text)).tolist()
        found = loaded.encode(text, special_tokens=True)
        if found != expected:
            raise ValueError(
                f"The {type(tokenizer).__name__} cannot be stored so that it gives the same "
                f"tokens: for {text!r} it gives {expected} and the stored one {found}. Set "
                "`model.preprocessor = None` and work with token ids."
            )
    return stored


def _probes(tokenizer: keras_hub.tokenizers.Tokenizer) -> list[str]:
    """Returns texts that try a tokenizer: known hard ones, and its own pieces in any order."""
    generator = random.Random(0)
    pieces = list(tokenizer.get_vocabulary())
    mixed = ["".join(generator.choices(pieces, k=generator.randint(1, 12))) for _ in range(100)]
    return [*_PROBES, *(text.replace("▁", " ").replace("Ġ", " ") for text in mixed)]


def end_token_ids(tokenizer: keras_hub.tokenizers.Tokenizer | None) -> list[int]:
    """Returns the tokens at which generation stops: the end of a text, and of a turn in a chat.

    Args:
        tokenizer: A KerasHub tokenizer, or `None`.
    """
    if tokenizer is None:
        return []
    found = [getattr(tokenizer, name, None) for name in ("end_token_id", "end_token2_id")]
    if isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
        # In the vocabulary of Gemma, whose tokenizer has no name for it.
        turns = {name: tokenizer.token_to_id(name) for name in _TURNS}
        found += [turn for name, turn in turns.items() if tokenizer.id_to_token(turn) == name]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
