"""Stores a KerasHub tokenizer as JSON of the `tokenizers` library, which needs no TensorFlow.

Byte-pair tokenizers are that library's already. SentencePiece models are rebuilt with its parts,
and compared with KerasHub's tokenizer on probes before they are trusted. One difference is known:
tokens of single bytes that are no valid UTF-8 together become other replacement characters.
"""

from __future__ import annotations

import random
import re
from typing import Any

import keras_hub
import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers

# Their classes are made at run time.
_SCHEMA: Any = sentencepiece_model_pb2
_Proto = Any
_TURN = "<end_of_turn>"
_SPACE = "▁"  # SentencePiece's mark of a space.
_UNWRITABLE = "\0"
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


def tokenizer_json(tokenizer: keras_hub.tokenizers.Tokenizer) -> str:
    """Returns a tokenizer in the format of the `tokenizers` library.

    Args:
        tokenizer: A tokenizer of KerasHub.

    Raises:
        ValueError: If it is of another kind, or cannot be rebuilt to give the same tokens.
    """
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        tokenizer("")  # KerasHub makes its backend on first use.
        return str(tokenizer._tokenizer.to_str())
    if not isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
        raise ValueError(
            f"Cannot store a {type(tokenizer).__name__}: only byte-pair and SentencePiece "
            "tokenizers can be. Set `model.preprocessor = None` and work with token ids."
        )
    proto = _SCHEMA.ModelProto()
    proto.ParseFromString(tokenizer.proto)
    rebuilt = _rebuild(proto)
    _check_equal(tokenizer, rebuilt, proto)
    return str(rebuilt.to_str())


def _rebuild(proto: _Proto) -> tokenizers.Tokenizer:
    """Returns a tokenizer that splits as a SentencePiece model does."""
    piece = _SCHEMA.ModelProto.SentencePiece
    control = [p.piece for p in proto.pieces if p.type == piece.CONTROL]
    own = [p.piece for p in proto.pieces if p.type == piece.USER_DEFINED]
    unigram = proto.trainer_spec.model_type == _SCHEMA.TrainerSpec.UNIGRAM
    rebuilt = tokenizers.Tokenizer(_unigram(proto) if unigram else _byte_pairs(proto))
    prefix = proto.normalizer_spec.add_dummy_prefix
    steps: list[normalizers.Normalizer] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if prefix else []
    rebuilt.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    # Matched in the normalized text, where spaces are marked already.
    rebuilt.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in own])
    silent = "|".join(re.escape(text) for text in control)
    unknown = re.escape(proto.pieces[proto.trainer_spec.unk_id].piece)
    rebuilt.decoder = decoders.Sequence(
        [
            decoders.Replace(tokenizers.Regex(f"^\0?(?:{silent})$"), ""),
            decoders.Replace(tokenizers.Regex(f"^\0?{unknown}$"), proto.trainer_spec.unk_surface),
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return rebuilt


def _byte_pairs(proto: _Proto) -> models.BPE:
    """Returns the merges that lead to each piece, the best piece first."""
    piece = _SCHEMA.ModelProto.SentencePiece
    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    usable = {p.piece: p.score for p in proto.pieces if p.type == piece.NORMAL}
    merges = []
    for text, score in usable.items():
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in usable and right in usable:
                merges.append((-score, ids[left], ids[right], left, right))
    return models.BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=any(p.type == piece.BYTE for p in proto.pieces),
    )


def _unigram(proto: _Proto) -> models.Unigram:
    piece = _SCHEMA.ModelProto.SentencePiece
    lowest = min(p.score for p in proto.pieces)
    scores = []
    for p in proto.pieces:
        if p.type in (piece.CONTROL, piece.UNKNOWN):
            # No text may read as such a piece.
            scores.append((_UNWRITABLE + p.piece, lowest))
        else:
            scores.append((p.piece, 100 * lowest if p.type == piece.BYTE else p.score))
    fallback = any(p.type == piece.BYTE for p in proto.pieces)
    return models.Unigram(scores, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)


def _probes(proto: _Proto) -> list[str]:
    """Returns texts that try a tokenizer: known hard ones, and its own pieces in any order."""
    generator = random.Random(0)
    byte = _SCHEMA.ModelProto.SentencePiece.BYTE
    pieces = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type != byte]
    mixed = ["".join(generator.choices(pieces, k=generator.randint(1, 12))) for _ in range(300)]
    return [*_PROBES, *mixed]


def _check_equal(
    tokenizer: keras_hub.tokenizers.Tokenizer, rebuilt: tokenizers.Tokenizer, proto: _Proto
) -> None:
    """Raises unless both tokenizers give the same ids for texts, and the same text for those."""
    for text in _probes(proto):
        expected = np.asarray(tokenizer.tokenize(text)).tolist()
        back = tokenizer.detokenize(expected)
        found = rebuilt.encode(text, add_special_tokens=False).ids
        if found != expected or rebuilt.decode(found) != back:
            raise ValueError(
                f"The {type(tokenizer).__name__} cannot be stored so that it gives the same "
                f"tokens: for {text!r} it gives {expected} and the stored one {found}. Set "
                "`model.preprocessor = None` and work with token ids."
            )


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
        turn = tokenizer.token_to_id(_TURN)
        found.append(turn if tokenizer.id_to_token(turn) == _TURN else None)
    return list(dict.fromkeys(int(token) for token in found if token is not None))
