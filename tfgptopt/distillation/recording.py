"""What a teacher said of a corpus, on disk: read by training in the place of the teacher."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.model.types import Config, Data

# The header of a recording that is whole, and of one that is being made.
WHOLE, PARTIAL, ROWS = "recording.json", "partial.json", "rows.bin"
_INDICES, _LOGS = "teacher_indices", "teacher_log_probabilities"
FORMAT = 1


def row_type(tokens: int, top_k: int, vocabulary: int) -> np.dtype:
    """Returns how a window lies in the file: 4 bytes for each token of the top k, or 5."""
    shape = (tokens, top_k)
    high = [("high", "u1", shape)] if vocabulary > 1 << 16 else []
    return np.dtype([("key", "<u8"), ("low", "<u2", shape), *high, ("logs", "<f2", shape)])


def window_keys(inputs: Data) -> np.ndarray:
    """Returns a number for each window that depends on its real tokens."""
    tokens = np.asarray(inputs["token_ids"]).astype("<i4")
    if "padding_mask" in inputs:
        tokens = np.where(np.asarray(inputs["padding_mask"]) != 0, tokens, -1).astype("<i4")
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in tokens]
    return np.frombuffer(b"".join(digests), "<u8")


def read_json(path: Path) -> Config:
    """Returns what a file of a recording says.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The recording '{path.parent}' is damaged: {path.name} cannot be read ({error}). "
            "Remove it and record again."
        ) from None


def read_header(path: Path) -> Config:
    """Returns what a whole recording says of itself.

    Raises:
        FileNotFoundError: If there is no recording at `path`.
        ValueError: If it is not whole, or of another format.
    """
    if not (path / WHOLE).is_file():
        if (path / PARTIAL).is_file():
            raise ValueError(
                f"The recording '{path}' is not whole: it was interrupted. Call "
                "`tfgptopt.distillation.record` with the same teacher and data to complete it."
            )
        raise FileNotFoundError(f"There is no recording at '{path}'.")
    header = read_json(path / WHOLE)
    if header.get("format") != FORMAT:
        raise ValueError(f"The recording '{path}' was written by another version of tfgptopt.")
    return header


class Recording:
    """What a teacher said of a corpus: its likeliest tokens at each position.

    Give it to `Distiller` in the place of the teacher; `fit` then finds what was recorded for each
    window of its data, in whatever order they come.

    Args:
        path: A folder that `tfgptopt.distillation.record` wrote.

    Attributes:
        path: The folder.
        top_k: Tokens per position.
        temperature: What the teacher's logits were divided by.
        vocabulary_size: Tokens that the teacher knows.
        tokenizer: Hash of the teacher's tokens, or `None`.
        rows, tokens: Number of windows, and tokens in each.
        keys: A number for each window, from its tokens.

    Raises:
        FileNotFoundError: If there is no recording at `path`.
        ValueError: If it is not whole, or the file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self.top_k: int = header["top_k"]
        self.temperature: float = header["temperature"]
        self.vocabulary_size: int = header["vocabulary_size"]
        self.tokenizer: str | None = header["tokenizer"]
        self.rows: int = header["rows"]
        self.tokens: int = header["tokens"]
        layout = row_type(self.tokens, self.top_k, self.vocabulary_size)
        rows = self.path / ROWS
        size = rows.stat().st_size if rows.is_file() else 0
        if size != self.rows * layout.itemsize:
            raise ValueError(
                f"The recording '{path}' is damaged: it should have {self.rows} windows of "
                f"{layout.itemsize} bytes, and has {size} bytes. Remove it and record again."
            )
        self._memory = np.memmap(self.path / ROWS, layout, "r")
        self.keys = np.array(self._memory["key"])
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]

    @property
    def file_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def lookup(self, inputs: Data) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the teacher said of a batch.

        Args:
            inputs: Arrays `token_ids` and, if there was one, `padding_mask`, `(batch, tokens)`.

        Returns:
            `(indices, log_probabilities)`, int32 and float32 of shape `(batch, tokens, top_k)`.

        Raises:
            ValueError: If a window was not recorded.
        """
        if not isinstance(inputs, dict) or inputs["token_ids"].shape[1] != self.tokens:
            raise ValueError(
                f"The recording '{self.path}' has windows of {self.tokens} 'token_ids'. Received: "
                f"{tf.nest.map_structure(np.shape, inputs)}"
            )
        keys = window_keys(inputs)
        places = np.searchsorted(self._sorted, keys)
        places = np.minimum(places, self.rows - 1)
        missing = int((self._sorted[places] != keys).sum())
        if missing:
            raise ValueError(
                f"{missing} of {len(keys)} windows of a batch are not in the recording "
                f"'{self.path}': it was made from another corpus, or other windows of it. Record "
                "this data as well, or evaluate `distiller.student` on it."
            )
        found = self._memory[self._order[places]]
        indices = found["low"].astype(np.int32)
        if "high" in (found.dtype.names or ()):
            indices |= found["high"].astype(np.int32) << 16
        return indices, found["logs"].astype(np.float32)

    def attach(self, data: Data) -> tf.data.Dataset:
        """Returns batches with what the teacher said of them beside their inputs.

        Args:
            data: `tf.data.Dataset` of batches of `({"token_ids", "padding_mask"}, ...)`.

        Raises:
            ValueError: If it is something else, or its first batch was not recorded.
        """
        if not isinstance(data, tf.data.Dataset):
            raise ValueError(
                "With a recorded teacher, data must be a tf.data.Dataset of batches of "
                f"({{'token_ids', 'padding_mask'}}, labels, ...). Received: {type(data)}"
            )
        for batch in data.take(1).as_numpy_iterator():
            self.lookup(batch[0] if isinstance(batch, tuple) else batch)

        def read(token_ids: Any, mask: tf.Tensor) -> Any:
            return self.lookup({"token_ids": token_ids, "padding_mask": mask})

        def add(inputs: Data, *rest: Any) -> Any:
            tokens = inputs["token_ids"]
            mask = inputs.get("padding_mask", tf.ones_like(tokens))
            indices, logs = tf.numpy_function(read, (tokens, mask), (tf.int32, tf.float32))
            for tensor in (indices, logs):
                tensor.set_shape((*tokens.shape, self.top_k))
            return {**inputs, _INDICES: indices, _LOGS: logs}, *rest

        return data.map(add, num_parallel_calls=1).prefetch(2)


def split_inputs(inputs: Data) -> tuple[Any, Any]:
    """Returns the inputs of the student, and what `Recording.attach` put beside them or `None`."""
    if not isinstance(inputs, dict) or _INDICES not in inputs:
        return inputs, None
    plain = {key: value for key, value in inputs.items() if key not in (_INDICES, _LOGS)}
    return plain, (inputs[_INDICES], inputs[_LOGS])
