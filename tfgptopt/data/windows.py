"""Packs text into windows of tokens: written to a file once, read by `tf.data`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras_hub
import numpy as np
import tensorflow as tf

from tfgptopt.data.encoding import encode_all, special_id
from tfgptopt.data.files import BadBytes, TextFile, read_pieces

# Windows held in memory to shuffle: 32 MB for 128 tokens each.
_SHUFFLED = 1 << 16


def _tokens(
    files: Sequence[TextFile], tokenizer: keras_hub.tokenizers.Tokenizer, bad: BadBytes
) -> Iterator[np.ndarray]:
    """Yields the tokens of files, each file closed by the end token where there is one."""
    end = special_id(tokenizer, "end")
    closing = np.asarray([] if end is None else [end], np.int32)
    for file in files:
        yield from encode_all(tokenizer, read_pieces(file, bad))
        yield closing


class WindowWriter:
    """Writes windows of `sequence_length + 1` tokens to a file, int32, one after the other.

    A token that is read and not learned stands there as `-2 - token`, and -1 fills windows up.

    Args:
        path: The file.
        sequence_length: int. Inputs per window.

    Attributes:
        tokens: Tokens that were written, each once.
        rows: Rows that were written, by `row`.
        cut_tokens, cut_rows: What did not fit, and of how many rows.
        dropped_rows: Rows of which nothing to learn was left; no part of them was written.
    """

    def __init__(self, path: Path, sequence_length: int) -> None:
        self.tokens = self.rows = self.cut_tokens = self.cut_rows = self.dropped_rows = 0
        self._length = sequence_length
        self._rest = np.empty(0, np.int32)
        self._stream = path.open("wb")

    def pack(self, tokens: np.ndarray) -> None:
        """Takes the next tokens of a long text, of which each window overlaps the next by one."""
        self.tokens += len(tokens)
        rest, length = np.concatenate([self._rest, tokens]), self._length
        windows = max(0, (len(rest) - 1) // length)
        for start in range(0, windows * length, length):
            self._stream.write(rest[start : start + length + 1].tobytes())
        self._rest = rest[windows * length :]

    def learns(self, tokens: np.ndarray) -> bool:
        """Returns whether a row has something to learn within a window."""
        return bool((tokens[1 : self._length + 1] >= 0).any())

    def row(self, tokens: np.ndarray) -> None:
        """Takes tokens that have a window of their own, cut where they do not fit."""
        kept = tokens[: self._length + 1]
        self.cut_tokens += len(tokens) - len(kept)
        self.cut_rows += len(tokens) > len(kept)
        if not self.learns(tokens):
            self.dropped_rows += 1
            return
        self.tokens += len(kept)
        self.rows += 1
        self._write_filled(kept)

    def close(self) -> None:
        """Writes what is left."""
        if len(self._rest) > 1:
            self._write_filled(self._rest)
        self._stream.close()

    def _write_filled(self, tokens: np.ndarray) -> None:
        fill = np.full(self._length + 1 - len(tokens), -1, np.int32)
        self._stream.write(np.concatenate([tokens, fill]).tobytes())


def write_windows(
    files: Sequence[TextFile],
    tokenizer: keras_hub.tokenizers.Tokenizer,
    sequence_length: int,
    path: Path,
) -> tuple[int, int]:
    """Writes text as windows of `sequence_length + 1` tokens, each overlapping the next by one.

    Args:
        files: The text.
        tokenizer: Any tokenizer of KerasHub.
        sequence_length: int. Inputs per window.
        path: The file to write; see `WindowWriter`.

    Returns:
        `(tokens, bad_bytes)`.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    bad, writer = BadBytes(), WindowWriter(path, sequence_length)
    with contextlib.closing(writer):
        for tokens in _tokens(files, tokenizer, bad):
            writer.pack(tokens)
    check_enough(writer, sequence_length, ", ".join(str(f.path) for f in files[:3]))
    return writer.tokens, bad.count


def check_enough(writer: WindowWriter, sequence_length: int, origin: str) -> None:
    """Raises a `ValueError` if packed text is shorter than one window."""
    if writer.tokens <= sequence_length:
        raise ValueError(
            f"The text has {writer.tokens} tokens, and one window needs {sequence_length + 1}. "
            f"Give more text, or a shorter window ({origin})."
        )


def read_windows(
    path: Path,
    sequence_length: int,
    batch_size: int,
    pad_token_id: int = 0,
    shuffle_seed: int | None = None,
) -> tf.data.Dataset:
    """Reads windows as batches for `fit`.

    Args:
        path: A file of a `WindowWriter`.
        sequence_length: int. Inputs per window.
        batch_size: int. Windows per batch.
        pad_token_id: int. Fills windows up. Defaults to `0`.
        shuffle_seed: int. Shuffles in an order that depends on it, another one each epoch, and
            drops the last incomplete batch. Defaults to `None`: in order, all batches.

    Returns:
        `tf.data.Dataset` of `({"token_ids", "padding_mask"}, labels, sample_weight)`, all int32 of
        shape `(batch_size, sequence_length)`, weights float32.
    """
    record = 4 * (sequence_length + 1)
    dataset = tf.data.FixedLengthRecordDataset(str(path), record)
    count = path.stat().st_size // record
    shuffled = shuffle_seed is not None
    if shuffled:
        dataset = dataset.shuffle(min(count, _SHUFFLED), shuffle_seed)

    def unpack(records: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
        tokens = tf.reshape(tf.io.decode_raw(records, tf.int32), (-1, sequence_length + 1))
        real, learned = tokens != -1, tokens >= 0
        tokens = tf.where(learned, tokens, tf.where(real, -2 - tokens, pad_token_id))
        mask = tf.cast(real[:, :-1], tf.int32)
        inputs = {"token_ids": tokens[:, :-1], "padding_mask": mask}
        return inputs, tokens[:, 1:], tf.cast(learned[:, 1:], tf.float32)

    dataset = dataset.batch(batch_size, drop_remainder=shuffled and count >= batch_size)
    batches = count // batch_size if shuffled and count >= batch_size else -(-count // batch_size)
    dataset = dataset.map(unpack, num_parallel_calls=1)
    return dataset.apply(tf.data.experimental.assert_cardinality(batches)).prefetch(2)
