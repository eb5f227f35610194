"""Packs text into windows of tokens: written to a file once, read by `tf.data`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.data.encoding import encode_all, special_id
from tfgptopt.data.files import BadBytes, TextFile, read_pieces

# Windows held in memory to shuffle: 32 MB for 128 tokens each.
_SHUFFLED = 1 << 16


def _tokens(files: Sequence[TextFile], tokenizer: Any, bad: BadBytes) -> Iterator[np.ndarray]:
    """Yields the tokens of files, each file closed by the end token where there is one."""
    end = special_id(tokenizer, "end")
    closing = np.asarray([] if end is None else [end], np.int32)
    for file in files:
        yield from encode_all(tokenizer, read_pieces(file, bad))
        yield closing


def write_windows(
    files: Sequence[TextFile],
    tokenizer: Any,
    sequence_length: int,
    path: Path,
) -> tuple[int, int]:
    """Writes text as windows of `sequence_length + 1` tokens, each overlapping the next by one.

    The last window is filled up with -1.

    Args:
        files: The text.
        tokenizer: Any tokenizer of KerasHub.
        sequence_length: int. Inputs per window.
        path: The file to write: int32, one window after the other.

    Returns:
        `(tokens, bad_bytes)`.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    bad, total = BadBytes(), 0
    rest = np.empty(0, np.int32)
    with path.open("wb") as stream:
        for tokens in _tokens(files, tokenizer, bad):
            total += len(tokens)
            rest = np.concatenate([rest, tokens])
            windows = max(0, (len(rest) - 1) // sequence_length)
            for i in range(windows):
                start = i * sequence_length
                stream.write(rest[start : start + sequence_length + 1].tobytes())
            rest = rest[windows * sequence_length :]
        if total <= sequence_length:
            raise ValueError(
                f"The text has {total} tokens, and one window needs {sequence_length + 1}. Give "
                f"more text, or a shorter window ({', '.join(str(f.path) for f in files[:3])})."
            )
        if len(rest) > 1:
            fill = np.full(sequence_length + 1 - len(rest), -1, np.int32)
            stream.write(np.concatenate([rest, fill]).tobytes())
    return total, bad.count


def read_windows(
    path: Path,
    sequence_length: int,
    batch_size: int,
    pad_token_id: int = 0,
    shuffle_seed: int | None = None,
) -> tf.data.Dataset:
    """Reads windows as batches for `fit`.

    Args:
        path: A file that `write_windows` wrote.
        sequence_length: int. Inputs per window.
        batch_size: int. Windows per batch.
        pad_token_id: int. Fills the last window. Defaults to `0`.
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
        real = tf.cast(tokens >= 0, tf.int32)
        tokens = tf.where(tokens >= 0, tokens, pad_token_id)
        inputs = {"token_ids": tokens[:, :-1], "padding_mask": real[:, :-1]}
        return inputs, tokens[:, 1:], tf.cast(real[:, 1:], tf.float32)

    dataset = dataset.batch(batch_size, drop_remainder=shuffled and count >= batch_size)
    batches = count // batch_size if shuffled and count >= batch_size else -(-count // batch_size)
    dataset = dataset.map(unpack, num_parallel_calls=1)
    return dataset.apply(tf.data.experimental.assert_cardinality(batches)).prefetch(2)
