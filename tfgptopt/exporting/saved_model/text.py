"""Texts to tokens and back within a graph, by tensorflow-text."""

from __future__ import annotations

import keras
import keras_hub
import tensorflow as tf

from tfgptopt.data.portable import portable
from tfgptopt.exporting.tokenizers import end_token_ids

try:
    import tensorflow_text
except ImportError:  # KerasHub works without it; then no graph reads texts.
    tensorflow_text = None


class TextTokenizer(tf.Module):  # type: ignore[misc]
    """Encodes and decodes texts by a SentencePiece model.

    Args:
        proto: The SentencePiece model.
        start: Token that begins a text, or `None`.
        hidden: Tokens that are no text.
    """

    def __init__(self, proto: bytes, start: int | None, hidden: list[int]) -> None:
        super().__init__()
        self._start, self._hidden = start, hidden
        self._sentencepiece = tensorflow_text.SentencepieceTokenizer(proto, out_type=tf.int32)

    def encode(self, texts: tf.Tensor, max_length: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns tokens, padded or cut to a length, and where they are."""
        tokens = self._sentencepiece.tokenize(texts)
        if self._start is not None:
            begin = tf.fill((tokens.nrows(), 1), self._start)
            tokens = tf.concat([begin, tokens], axis=1)
        lengths = tf.minimum(tf.cast(tokens.row_lengths(), tf.int32), max_length)
        cut = tokens[:, :max_length].to_tensor()
        padded = tf.pad(cut, [[0, 0], [0, max_length - tf.shape(cut)[1]]])
        return padded, tf.sequence_mask(lengths, max_length, tf.int32)

    def decode(self, token_ids: tf.Tensor, padding_mask: tf.Tensor) -> tf.Tensor:
        """Returns the texts of tokens, without those that are none."""
        kept = padding_mask > 0
        for token in self._hidden:
            kept = tf.logical_and(kept, token_ids != token)
        return self._sentencepiece.detokenize(tf.ragged.boolean_mask(token_ids, kept))


def text_tokenizer(model: keras.Model) -> TextTokenizer | None:
    """Returns the tokenizer of a causal LM for graphs, or `None` where it can be none."""
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    sentencepiece = isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer)
    proto = portable(tokenizer).sentencepiece if sentencepiece and tensorflow_text else None
    if proto is None:
        return None
    starts = getattr(preprocessor, "add_start_token", False)
    start = getattr(tokenizer, "start_token_id", None) if starts else None
    pad = getattr(tokenizer, "pad_token_id", None)
    hidden = {start, pad, *end_token_ids(tokenizer)} - {None}
    return TextTokenizer(proto, start, sorted(int(token) for token in hidden if token is not None))
