"""Trains a byte-level byte-pair tokenizer for KerasHub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import keras_hub
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tfgptopt.data.files import BadBytes, TextFile, read_pieces

END_TOKEN = "<|endoftext|>"
_SMALLEST = 256 + 1 + 1


def _all_pieces(files: Iterable[TextFile]) -> Iterator[str]:
    for file in files:
        yield from read_pieces(file, BadBytes())


def train_tokenizer(
    files: Sequence[TextFile], vocabulary_size: int = 4096
) -> keras_hub.models.GPT2Tokenizer:
    """Trains a byte-level byte-pair tokenizer.

    All 256 bytes are in the vocabulary, so that it encodes any text.

    Args:
        files: The training files.
        vocabulary_size: int. Number of tokens, bytes and the end token included. A small text may
            give fewer. Defaults to `4096`.

    Returns:
        `keras_hub.models.GPT2Tokenizer`.

    Raises:
        ValueError: If `vocabulary_size` is below 258, or the text gives no merges.

    Reference: Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909); Radford et al., 2019
    (bytes as the alphabet).
    """
    if not isinstance(vocabulary_size, int) or vocabulary_size < _SMALLEST:
        raise ValueError(
            f"`vocabulary_size` must be an int of at least {_SMALLEST} (all bytes, the end "
            f"token and one merge). Received: {vocabulary_size!r}"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = tokenizers.Tokenizer(models.BPE())
    # GPT-2's own splitting into words: merges that stay inside words encode the same whether or
    # not the encoder splits first (KerasHub does so in TensorFlow graphs only).
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(_all_pieces(files), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise ValueError("The training text is too short to learn a vocabulary from.")
    # The end token goes last, as in GPT-2: KerasHub pads with token 0, and would take an end token
    # there for the end of the text.
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens.remove(END_TOKEN)
    vocabulary = {token: i for i, token in enumerate([*tokens, END_TOKEN])}
    return keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
