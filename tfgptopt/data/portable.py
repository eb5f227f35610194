"""KerasHub's tokenizers as a file holds them, and as a chat is written with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import keras_hub
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tfgptopt.data.encoding import encode_texts
from tfgptopt.generation.tokenizing import Json, SentencePiece, TextTokenizer


@dataclass(frozen=True)
class Portable:
    """A tokenizer that needs no TensorFlow; it has one of both.

    Attributes:
        json: JSON of the `tokenizers` library.
        sentencepiece: A SentencePiece model.
        special_tokens: Names of tokens that are no text.
    """

    json: str | None = None
    sentencepiece: bytes | None = None
    special_tokens: tuple[str, ...] = ()

    def load(self) -> TextTokenizer:
        """Returns the tokenizer."""
        if self.sentencepiece is not None:
            return SentencePiece(self.sentencepiece, self.special_tokens)
        return Json(self.json or "", self.special_tokens)


def portable(
    tokenizer: keras_hub.tokenizers.Tokenizer, special_tokens: Sequence[str] = ()
) -> Portable:
    """Returns what is left of a KerasHub tokenizer without KerasHub.

    Args:
        tokenizer: The tokenizer.
        special_tokens: Names of tokens that are no text besides those that KerasHub knows, such
            as those of a chat template. Names that the vocabulary lacks are passed over.

    Raises:
        ValueError: If it is neither a byte-pair nor a SentencePiece tokenizer.
    """
    names = sorted({*getattr(tokenizer, "special_tokens", ()), *special_tokens})
    if isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
        known = set(tokenizer.get_vocabulary())
        special = tuple(name for name in names if name in known)
        return Portable(sentencepiece=tokenizer.proto, special_tokens=special)
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        special = tuple(name for name in names if name in tokenizer.vocabulary)
        return Portable(json=_byte_pairs(tokenizer).to_str(), special_tokens=special)
    raise ValueError(
        f"Cannot store a {type(tokenizer).__name__}: only byte-pair and SentencePiece "
        "tokenizers can be. Set `model.preprocessor = None` and work with token ids."
    )


def _byte_pairs(tokenizer: keras_hub.tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns the tokenizer that KerasHub makes of a vocabulary and merges."""
    merges = [merge.split(" ") for merge in map(str, tokenizer.merges) if "#version:" not in merge]
    rebuilt = tokenizers.Tokenizer(
        models.BPE(vocab=dict(tokenizer.vocabulary), merges=[(a, b) for a, b in merges])
    )
    rebuilt.add_special_tokens(list(tokenizer.unsplittable_tokens or ()))
    bytes_of = pre_tokenizers.ByteLevel(
        add_prefix_space=tokenizer.add_prefix_space, use_regex=False
    )
    # KerasHub gives its own pattern as plain text, which splits nothing: only Tekken's splits.
    pattern = getattr(tokenizer, "split_pattern", None)
    if pattern:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        rebuilt.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    else:
        rebuilt.pre_tokenizer = bytes_of
    rebuilt.decoder = decoders.ByteLevel()
    return rebuilt


class AnyTokenizer:
    """A KerasHub tokenizer that is neither of both, in the shape of the runtime's.

    Args:
        tokenizer: The tokenizer.
        special_tokens: Names of tokens that are no text.
    """

    prefixed = False

    def __init__(
        self, tokenizer: keras_hub.tokenizers.Tokenizer, special_tokens: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self.size: int = tokenizer.vocabulary_size()
        known = {name: self.token_to_id(name) for name in special_tokens}
        self.specials: Mapping[str, int] = {n: t for n, t in known.items() if t is not None}

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Returns the ids of a text."""
        found: list[int] = encode_texts(self._tokenizer, [text])[0].tolist()
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self._tokenizer.detokenize(np.asarray(ids, np.int32)))

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token, or `None`."""
        try:
            found = int(self._tokenizer.token_to_id(token))
            return found if self._tokenizer.id_to_token(found) == token else None
        except (KeyError, ValueError, NotImplementedError):
            return None

    def lacks(self, text: str, ids: Sequence[int]) -> bool:
        """Returns whether a text has characters without a token, which nothing tells."""
        return False


def text_tokenizer(
    tokenizer: keras_hub.tokenizers.Tokenizer, special_tokens: Sequence[str] = ()
) -> TextTokenizer:
    """Returns any KerasHub tokenizer in the shape of the runtime's; see `portable`."""
    kinds = (
        keras_hub.tokenizers.SentencePieceTokenizer,
        keras_hub.tokenizers.BytePairTokenizer,
    )
    if isinstance(tokenizer, kinds):
        return portable(tokenizer, special_tokens).load()
    return AnyTokenizer(tokenizer, special_tokens)
