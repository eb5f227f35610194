"""Tokenizers as a file holds them: JSON of the `tokenizers` library, or a SentencePiece model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import tokenizers


class TextTokenizer(Protocol):
    """Turns text into token ids and back."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    @property
    def specials(self) -> Mapping[str, int]:
        """Special tokens, by name."""

    @property
    def prefixed(self) -> bool:
        """Whether a text gets a space before it."""

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Returns the ids of a text; names of special tokens in it are those, or text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token, or `None` if there is no such token."""

    def lacks(self, text: str, ids: Sequence[int]) -> bool:
        """Returns whether a text has characters that its ids do not tell of."""


class SentencePiece:
    """A SentencePiece model, read by SentencePiece's own library.

    Args:
        proto: The serialized model.
        special: Names of special tokens. The model knows the control tokens, which no text can
            write, but not which of its user-defined pieces are more than text.
    """

    prefixed: bool

    def __init__(self, proto: bytes, special: Sequence[str] = ()) -> None:
        import sentencepiece  # Small devices leave it out where no file needs it.

        self._proto = proto
        self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.size: int = self._model.vocab_size()
        known = {name: self.token_to_id(name) for name in special}
        self.specials = {name: token for name, token in known.items() if token is not None}
        self._special_ids = frozenset(self.specials.values())
        # Without context, a space before the text shows in the ids of a text without one.
        first = self._model.encode("a")
        self.prefixed = bool(first) and self._model.id_to_piece(first[0]).startswith("▁")

    @functools.cached_property
    def _plain(self) -> Any:
        """The model to which its special tokens are text like any other."""
        # It takes memory, and few texts need it.
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        schema: Any = sentencepiece_model_pb2
        proto = schema.ModelProto()
        proto.ParseFromString(self._proto)
        for token in self._special_ids:
            if proto.pieces[token].type == schema.ModelProto.SentencePiece.USER_DEFINED:
                proto.pieces[token].type = schema.ModelProto.SentencePiece.CONTROL
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Returns the ids of a text; see `TextTokenizer`."""
        text.encode()  # Half of a surrogate pair raises here, and says so.
        ids: list[int] = self._model.encode(text)
        # Looked for among the ids: normalization may make such a token of other characters.
        if not special_tokens and not self._special_ids.isdisjoint(ids):
            ids = self._plain.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; those that a model has beyond the tokenizer give none."""
        text: str = self._model.decode(
            [int(i) for i in ids if i < self.size and i not in self._special_ids]
        )
        return text

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a piece, or `None`."""
        found = int(self._model.piece_to_id(token))
        return found if self._model.id_to_piece(found) == token else None

    def bytes_of_tokens(self) -> tuple[list[bytes], list[int]]:
        """Returns what each token adds to a text, and which tokens are special."""
        model, found, special = self._model, [], set(self._special_ids)
        for token in range(self.size):
            piece = model.id_to_piece(token)
            if model.is_byte(token):
                found.append(bytes([int(piece[1:-1], 16)]))
                continue
            if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
                special.add(token)
            found.append(piece.replace("▁", " ").encode())
        return found, sorted(special)

    def lacks(self, text: str, ids: Sequence[int]) -> bool:
        """Returns whether there is an unknown token among ids."""
        return self._model.unk_id() in ids


class Json:
    """A tokenizer of the `tokenizers` library.

    Args:
        blob: Its JSON.
        special: Names of special tokens besides those that the JSON calls so.
    """

    def __init__(self, blob: str, special: Sequence[str] = ()) -> None:
        self._blob = blob
        self._model = tokenizers.Tokenizer.from_str(blob)
        self.size: int = self._model.get_vocab_size()
        added = self._model.get_added_tokens_decoder().values()
        names = [*(token.content for token in added if token.special), *special]
        known = {name: self.token_to_id(name) for name in names}
        self.specials = {name: token for name, token in known.items() if token is not None}
        self._special_ids = frozenset(self.specials.values())
        self.prefixed = bool(getattr(self._model.pre_tokenizer, "add_prefix_space", False))

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer to which its special tokens are text like any other."""
        plain = tokenizers.Tokenizer.from_str(self._blob)
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _unknown(self) -> int | None:
        name = getattr(self._model.model, "unk_token", None)
        if name is not None:
            return self.token_to_id(name)
        found: int | None = json.loads(self._blob)["model"].get("unk_id")
        return found

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Returns the ids of a text; see `TextTokenizer`."""
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        if not special_tokens and not self._special_ids.isdisjoint(ids):
            ids = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        special = self._special_ids
        text: str = self._model.decode([int(i) for i in ids if i not in special])
        return text

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token, or `None`."""
        found: int | None = self._model.token_to_id(token)
        return found

    def lacks(self, text: str, ids: Sequence[int]) -> bool:
        """Returns whether there is an unknown token, or bytes without a token were passed over."""
        if isinstance(self._model.decoder, tokenizers.decoders.ByteLevel):
            # A space may have been put before the text, and behind special tokens.
            back = self._model.decode(list(ids), skip_special_tokens=False)
            return "".join(back.split(" ")) != "".join(text.split(" "))
        return self._unknown in ids
