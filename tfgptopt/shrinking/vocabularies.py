"""Keeps the tokens that a corpus uses, and rewrites the tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras
import keras_hub
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from tfgptopt.data.encoding import tokenizer_of

_SCHEMA: Any = sentencepiece_model_pb2  # Its classes are made at run time.

# Gives the two tokens that a token is merged from, or `None` for one that stands by itself.
Split = Callable[[str], tuple[str, str] | None]


def rewritable_tokenizer(model: keras.Model) -> Any:
    """Returns the tokenizer of a model, of a kind that can be rewritten.

    Raises:
        ValueError: If there is none, or it is of another kind.
    """
    tokenizer = tokenizer_of(model)
    kinds = keras_hub.tokenizers.BytePairTokenizer | keras_hub.tokenizers.SentencePieceTokenizer
    if not isinstance(tokenizer, kinds):
        raise ValueError(
            "To shrink the vocabulary, the model needs a preprocessor with a byte-pair or "
            f"SentencePiece tokenizer to rewrite. It has {tokenizer!r}."
        )
    return tokenizer


def _merges(tokenizer: keras_hub.tokenizers.Tokenizer) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer.merges)
    return [(left, right) for left, right in pairs]


def _of_byte_pairs(tokenizer: keras_hub.tokenizers.Tokenizer) -> tuple[set[str], Split]:
    """Returns the tokens that have to stay, and how each other one is merged."""
    first: dict[str, tuple[str, str]] = {}
    for left, right in _merges(tokenizer):
        first.setdefault(left + right, (left, right))
    # What nothing is merged to is a byte, or special: tokens of chats among them.
    return {token for token in tokenizer.vocabulary if token not in first}, first.get


def _proto(tokenizer: keras_hub.tokenizers.Tokenizer) -> Any:
    proto = _SCHEMA.ModelProto()
    proto.ParseFromString(tokenizer.proto)
    return proto


def _of_pieces(tokenizer: keras_hub.tokenizers.Tokenizer) -> tuple[set[str], Split]:
    """Returns the same for a SentencePiece model."""
    proto, kinds = _proto(tokenizer), _SCHEMA.ModelProto.SentencePiece
    fixed = {p.piece for p in proto.pieces if p.type != kinds.NORMAL}
    if not any(p.type == kinds.BYTE for p in proto.pieces):
        # Without bytes to fall back to, letters stay.
        fixed |= {p.piece for p in proto.pieces if len(p.piece) == 1}
    if proto.trainer_spec.model_type != _SCHEMA.TrainerSpec.BPE:
        return fixed, lambda token: None
    scores = {p.piece: p.score for p in proto.pieces if p.type == kinds.NORMAL}

    def split(token: str) -> tuple[str, str] | None:
        ways = [(token[:i], token[i:]) for i in range(1, len(token))]
        ways = [way for way in ways if way[0] in scores and way[1] in scores]
        return max(ways, key=lambda way: min(scores[p] for p in way), default=None)

    return fixed, split


def _with_parts(token: str, split: Split, kept: set[str]) -> set[str]:
    """Returns a token and what it is merged from, as far as it is not kept yet."""
    needed, open_ = set(), [token]
    while open_:
        part = open_.pop()
        if part not in kept and part not in needed:
            needed.add(part)
            open_ += split(part) or ()
    return needed


def choose_tokens(
    tokenizer: keras_hub.tokenizers.Tokenizer, counts: np.ndarray, size: int
) -> np.ndarray:
    """Returns which tokens stay: those used most, and what they are merged from.

    Args:
        tokenizer: A byte-pair or SentencePiece tokenizer of KerasHub.
        counts: How often each token of the model's table occurs.
        size: int. How many stay.

    Returns:
        Their ids in ascending order; the place in it is the new id.

    Raises:
        ValueError: If bytes and special tokens alone are more than `size`.
    """
    known = min(tokenizer.vocabulary_size(), len(counts))
    tokens = [tokenizer.id_to_token(i) for i in range(known)]
    pairs = isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer)
    kept, split = _of_byte_pairs(tokenizer) if pairs else _of_pieces(tokenizer)
    kept = set(kept)
    # KerasHub's byte-pair tokenizers need a merge.
    smallest = len(kept) + pairs
    if size < smallest:
        raise ValueError(
            f"`vocabulary` must be at least {smallest}: so many are single bytes and special "
            f"tokens, which any text needs{', and one merge' if pairs else ''}. Received: {size}"
        )
    order = np.argsort(-counts[:known], kind="stable")
    growing = True
    while growing and len(kept) < size:
        growing = False
        for i in order:
            needed = _with_parts(tokens[i], split, kept)
            if needed and len(kept) + len(needed) <= size:
                kept |= needed
                growing = True
    chosen = [i for i, token in enumerate(tokens) if token in kept]
    # A table may have more rows than the tokenizer has tokens.
    spare = range(known, known + size - len(chosen))
    return np.asarray([*chosen, *spare])


def _rewritten(tokenizer: keras_hub.tokenizers.Tokenizer, kept: Iterable[int]) -> Any:
    """Returns a tokenizer of the same class with some of its tokens."""
    new = type(tokenizer).from_config(tokenizer.get_config())
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        tokens = [tokenizer.id_to_token(i) for i in kept]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        merges = [
            f"{left} {right}"
            for left, right in _merges(tokenizer)
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]
        new.set_vocabulary_and_merges(vocabulary, merges)
        return new
    proto = _proto(tokenizer)
    places = {old: i for i, old in enumerate(kept)}
    pieces = [proto.pieces[i] for i in kept]
    spec = proto.trainer_spec
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        setattr(spec, name, places.get(getattr(spec, name), -1))
    spec.vocab_size = len(pieces)
    shrunk = _SCHEMA.ModelProto()
    shrunk.CopyFrom(proto)
    del shrunk.pieces[:]
    shrunk.pieces.extend(pieces)
    new.set_proto(shrunk.SerializeToString())
    return new


def shrink_preprocessor(
    preprocessor: keras_hub.models.CausalLMPreprocessor | None, tokens: Any, context: int | None
) -> Any:
    """Returns a preprocessor for fewer tokens or positions; the same one if nothing changes.

    Args:
        preprocessor: That of a causal LM, or `None`.
        tokens: Ids that stay, or `None` for all.
        context: Positions of the model, or `None` for any number.
    """
    if preprocessor is None:
        return None
    length = preprocessor.sequence_length
    if context is not None:
        length = min(length, context)
    if tokens is None and length == preprocessor.sequence_length:
        return preprocessor
    tokenizer = preprocessor.tokenizer
    if tokens is not None:
        known = tokenizer.vocabulary_size()
        tokenizer = _rewritten(tokenizer, [int(i) for i in tokens if i < known])
    return type(preprocessor)(
        tokenizer,
        sequence_length=length,
        add_start_token=preprocessor.add_start_token,
        add_end_token=preprocessor.add_end_token,
    )
