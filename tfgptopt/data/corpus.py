"""From text to tokenizer, training and validation data in one call."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfgptopt.data.encoding import special_id
from tfgptopt.data.files import TextFile, find_files, split_files, standard_library, total_size
from tfgptopt.data.tokenizer import train_tokenizer
from tfgptopt.data.windows import read_windows, write_windows


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text, ready for `fit`.

    Attributes:
        tokenizer: KerasHub tokenizer.
        training_files, validation_files: What they were made of.
        training_tokens, validation_tokens: Number of tokens.
        bad_bytes: Bytes that were no UTF-8, each replaced by U+FFFD.
        sequence_length, batch_size: Shape of a batch.
    """

    tokenizer: Any
    training_files: list[TextFile]
    validation_files: list[TextFile]
    training_tokens: int
    validation_tokens: int
    bad_bytes: int
    sequence_length: int
    batch_size: int
    seed: int
    _folder: Any

    def _read(self, name: str, shuffle_seed: int | None) -> tf.data.Dataset:
        return read_windows(
            Path(self._folder.name) / name,
            self.sequence_length,
            self.batch_size,
            special_id(self.tokenizer, "pad") or 0,
            shuffle_seed,
        )

    @property
    def train(self) -> tf.data.Dataset:
        """Training batches in shuffled order: the same each time this is read, another one in
        each epoch of a `fit`."""
        return self._read("training", self.seed)

    @property
    def validation(self) -> tf.data.Dataset:
        """Batches of the held-out files, in order."""
        return self._read("validation", None)

    @property
    def training_bytes(self) -> int:
        """Bytes of training text."""
        return total_size(self.training_files)


def load_corpus(
    sources: str | Path | Sequence[str | Path] | None = None,
    *,
    tokenizer: Any = None,
    vocabulary_size: int = 4096,
    sequence_length: int = 128,
    batch_size: int = 16,
    validation_share: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """Turns text files into batches for `fit`, deterministically.

    Files are split into training and validation, tokenized, and packed into windows without
    padding. The windows lie in a temporary folder, so memory does not grow with the corpus; the
    folder goes when the corpus does.

    Args:
        sources: Files, folders or globs of UTF-8 text. Defaults to `None`: the source of Python's
            standard library.
        tokenizer: Any tokenizer of KerasHub. Defaults to `None`: one is trained on the
            training files.
        vocabulary_size: int. Size of the tokenizer to train. Defaults to `4096`.
        sequence_length: int. Tokens per window. Defaults to `128`.
        batch_size: int. Windows per batch. Defaults to `16`.
        validation_share: float in `(0, 1)`. Share of bytes for validation. Defaults to `0.05`.
        seed: int. Seed of the shuffling. Defaults to `0`.

    Returns:
        `Corpus`.

    Raises:
        FileNotFoundError: If a source stands for no text file.
        ValueError: If the text is binary, empty, or shorter than a window, or an argument is out
            of range.

    Example:

    ```python
    from tfgptopt.data import load_corpus, tokens_as_input

    corpus = load_corpus("notes/*.md", vocabulary_size=2048)
    with tokens_as_input(model):
        model.fit(corpus.train, validation_data=corpus.validation)
    ```
    """
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an int >= 1. Received: {value!r}")
    files = standard_library() if sources is None else find_files(sources)
    training, validation = split_files(files, validation_share)
    tokenizer = tokenizer or train_tokenizer(training, vocabulary_size)
    folder = tempfile.TemporaryDirectory(prefix="tfgptopt-")
    paths = [Path(folder.name) / name for name in ("training", "validation")]
    counts = [
        write_windows(part, tokenizer, sequence_length, path)
        for part, path in zip((training, validation), paths, strict=True)
    ]
    return Corpus(
        tokenizer=tokenizer,
        training_files=training,
        validation_files=validation,
        training_tokens=counts[0][0],
        validation_tokens=counts[1][0],
        bad_bytes=counts[0][1] + counts[1][1],
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        _folder=folder,
    )


@contextlib.contextmanager
def tokens_as_input(model: Any) -> Iterator[None]:
    """Detaches the preprocessor of a KerasHub model, which expects text, and attaches it again.

    Args:
        model: A KerasHub task, with or without a preprocessor, or any Keras model.
    """
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is not None:
        model.preprocessor = None
    try:
        yield
    finally:
        if preprocessor is not None:
            model.preprocessor = preprocessor
