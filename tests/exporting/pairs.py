"""A byte-pair tokenizer in which two letters are a token, so that a text shows its tokens."""

from __future__ import annotations

import string
import types

import keras_hub
from decoder.families import VOCABULARY, make

END, LINE = "!", "Ċ"  # Byte pairs write the end of a line so.
_UPPER, _LOWER = string.ascii_uppercase[:16], string.ascii_lowercase[:16]
_PAIRS = [upper + lower for upper in _UPPER for lower in _LOWER]
PAIRS = _PAIRS[: VOCABULARY - len([END, LINE, *_UPPER, *_LOWER])]


def pairs_tokenizer():
    """Returns the tokenizer; token 0 ends a text."""
    tokens = [END, LINE, *_UPPER, *_LOWER, *PAIRS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [" ".join(pair) for pair in PAIRS]
    tokenizer = keras_hub.tokenizers.BytePairTokenizer(vocabulary, merges)
    tokenizer.end_token_id = 0
    return tokenizer


def with_pairs(name, length, start_token_id=None, **changes):
    """Returns a tiny model of a family that has the tokenizer."""
    return dressed(make(name, **changes), length, start_token_id)


def dressed(model, length, start_token_id=None):
    """Gives a model the tokenizer, and returns it."""
    tokenizer = pairs_tokenizer()
    tokenizer.start_token_id = start_token_id
    model.preprocessor = types.SimpleNamespace(
        tokenizer=tokenizer, sequence_length=length, add_start_token=start_token_id is not None
    )
    return model


def pairs(tokens):
    """Returns a text of as many pairs as there are tokens."""
    return "".join(PAIRS[token % len(PAIRS)] for token in tokens)
