"""From text to tokenizer, training and validation data in one call."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_hub
import tensorflow as tf

from tfgptopt.data.encoding import special_id
from tfgptopt.data.files import (
    TextFile,
    check_share,
    find_files,
    split_files,
    standard_library,
    total_size,
)
from tfgptopt.data.records import Record, is_records, read_files, read_items, record_files
from tfgptopt.data.tokenizer import train_tokenizer
from tfgptopt.data.windows import WindowWriter, read_windows, write_windows
from tfgptopt.data.writing import check_records, write_records
from tfgptopt.generation.templates import ChatTemplate, get_template


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text, ready for `fit`.

    Attributes:
        tokenizer: KerasHub tokenizer.
        training_files, validation_files: What they were made of.
        training_tokens, validation_tokens: Number of tokens.
        bad_bytes: Bytes that were no UTF-8, each replaced by U+FFFD.
        sequence_length, batch_size: Shape of a batch.
        training_records, validation_records: Number of records, of which `cut_records` were longer
            than a window and lost `cut_tokens` together; `dropped_records` had no answer in what
            was left, and are not part of the data. 0 for text.
    """

    tokenizer: keras_hub.tokenizers.Tokenizer
    training_files: list[TextFile]
    validation_files: list[TextFile]
    training_tokens: int
    validation_tokens: int
    bad_bytes: int
    sequence_length: int
    batch_size: int
    seed: int
    _folder: Any
    training_records: int = 0
    validation_records: int = 0
    cut_records: int = 0
    cut_tokens: int = 0
    dropped_records: int = 0

    def _read(self, name: str, shuffle_seed: int | None) -> tf.data.Dataset:
        dataset = read_windows(
            Path(self._folder.name) / name,
            self.sequence_length,
            self.batch_size,
            special_id(self.tokenizer, "pad") or 0,
            shuffle_seed,
        )
        # Data that outlive the corpus keep the folder.
        object.__setattr__(dataset, "_folder", self._folder)
        return dataset

    @property
    def train(self) -> tf.data.Dataset:
        """Training batches in shuffled order: the same each time this is read, another one in
        each epoch of a `fit`.

        Raises:
            ValueError: If all of the text was held out.
        """
        if not self.training_tokens:
            raise ValueError("All of the text is held out, so there is nothing to train on.")
        return self._read("training", self.seed)

    @property
    def validation(self) -> tf.data.Dataset:
        """Batches of the held-out files, in order."""
        return self._read("validation", None)

    @property
    def training_bytes(self) -> int:
        """Bytes of training text."""
        return total_size(self.training_files)

    @property
    def training_words(self) -> str:
        """What there is to train on, in words."""
        if self.training_records:
            return f"{self.training_records:,} records, {self.training_tokens:,} tokens"
        return (
            f"{len(self.training_files)} files, {self.training_bytes / 1e6:.1f} MB, "
            f"{self.training_tokens:,} tokens"
        )

    @property
    def validation_words(self) -> str:
        """What there is to validate with, in words."""
        count = f"{len(self.validation_files)} files"
        if self.validation_records:
            count = f"{self.validation_records:,} records"
        return f"{count}, {self.validation_tokens:,} tokens"

    def describe(self) -> str:
        """Returns what there is, and what was cut off, in a line for each."""
        words = f"{self.training_words}; held out: {self.validation_words}"
        lines = [f"Text: {words if self.training_tokens else self.validation_words}"]
        if self.cut_records:
            lines.append(
                f"{self.cut_records:,} records were longer than {self.sequence_length + 1} tokens "
                f"and lost {self.cut_tokens:,}; {self.dropped_records:,} of them had no answer in "
                "what was left and were dropped"
            )
        if self.bad_bytes:
            lines.append(f"{self.bad_bytes:,} bytes were no UTF-8 and became U+FFFD")
        return "\n".join(lines)


def load_corpus(
    sources: Any = None,
    *,
    tokenizer: keras_hub.tokenizers.Tokenizer | None = None,
    chat_template: ChatTemplate | str | None = None,
    vocabulary_size: int = 4096,
    sequence_length: int = 128,
    batch_size: int = 16,
    validation_share: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """Turns text or chats into batches for `fit`, deterministically.

    Text is split into training and validation by files, tokenized, and packed into windows without
    padding. Records of JSON Lines, Parquet or Python are split one by one; a conversation, or a
    prompt with its response, has a window of its own, padded or cut, and only answers count in the
    loss. The windows lie in a temporary folder, so memory does not grow with the corpus; the folder
    goes when the corpus does.

    Args:
        sources: Files, folders or globs of UTF-8 text, or of records (`.jsonl`, `.json`,
            `.parquet`) with `text`, with `prompt` and `response`, or with `messages` of `role` and
            `content`; or such records from Python: an iterable of dictionaries or texts (no list
            of texts, which are names of files), a dictionary of columns, a data frame, a
            `datasets.Dataset`, a `tf.data.Dataset` of texts. Defaults to `None`: the source of
            Python's standard library.
        tokenizer: Any tokenizer of KerasHub. Defaults to `None`: one is trained on the
            training files.
        chat_template: Writes messages out as text, prompts and responses as well if it is given: a
            `ChatTemplate`, the name of a known one, or Jinja. Defaults to `None`: messages get the
            one of the tokenizer's family; prompts and responses are joined as KerasHub does.
        vocabulary_size: int. Size of the tokenizer to train. Defaults to `4096`.
        sequence_length: int. Tokens per window. Defaults to `128`.
        batch_size: int. Windows per batch. Defaults to `16`.
        validation_share: float in `(0, 1]`. Share of bytes or records for validation; with 1 there
            is nothing to train on, only to measure with. Defaults to `0.05`.
        seed: int. Seed of the shuffling. Defaults to `0`.

    Returns:
        `Corpus`.

    Raises:
        FileNotFoundError: If a source stands for no text file.
        ValueError: If the text is binary, empty, or shorter than a window, a record is none or of
            another kind than the first, no conversation fits, or an argument is out of range.

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
    template = None if chat_template is None else get_template(chat_template)
    shape = (sequence_length, batch_size, validation_share, seed)
    if is_records(sources):
        return _from_records(read_items(sources), "Python", tokenizer, template, *shape)
    paths = [] if sources is None else record_files(sources)
    if paths:
        return _from_records(read_files(paths), str(paths[0]), tokenizer, template, *shape)
    files = standard_library() if sources is None else find_files(sources)
    training, validation = split_files(files, validation_share)
    if tokenizer is None and not training:
        raise ValueError("There is no text to train a tokenizer on: give `tokenizer`.")
    tokenizer = tokenizer or train_tokenizer(training, vocabulary_size)
    folder, (first, second) = _new_folder()
    tokens = bad = 0
    if training:
        tokens, bad = write_windows(training, tokenizer, sequence_length, first)
    held_out, more_bad = write_windows(validation, tokenizer, sequence_length, second)
    return Corpus(
        tokenizer=tokenizer,
        training_files=training,
        validation_files=validation,
        training_tokens=tokens,
        validation_tokens=held_out,
        bad_bytes=bad + more_bad,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        _folder=folder,
    )


def _new_folder() -> tuple[tempfile.TemporaryDirectory[str], list[Path]]:
    """Returns a folder that goes when the corpus does, and its two files of windows."""
    folder = tempfile.TemporaryDirectory(prefix="tfgptopt-")
    return folder, [Path(folder.name) / name for name in ("training", "validation")]


def _from_records(
    records: Iterator[Record],
    origin: str,
    tokenizer: keras_hub.tokenizers.Tokenizer,
    template: ChatTemplate | None,
    sequence_length: int,
    batch_size: int,
    validation_share: float,
    seed: int,
) -> Corpus:
    """Returns the corpus of records.

    Raises:
        ValueError: If there is no tokenizer, or the records cannot be used.
    """
    if tokenizer is None:
        raise ValueError("Records need a tokenizer: give `tokenizer=model.preprocessor.tokenizer`.")
    check_share(validation_share)
    folder, paths = _new_folder()
    with contextlib.ExitStack() as stack:
        training, validation = (
            stack.enter_context(contextlib.closing(WindowWriter(path, sequence_length)))
            for path in paths
        )
        counts = write_records(records, tokenizer, template, training, validation, validation_share)
    check_records(counts, (training, validation), validation_share, sequence_length, origin)
    return Corpus(
        tokenizer=tokenizer,
        training_files=[],
        validation_files=[],
        training_tokens=training.tokens,
        validation_tokens=validation.tokens,
        bad_bytes=0,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        _folder=folder,
        training_records=counts[0],
        validation_records=counts[1],
        cut_records=training.cut_rows + validation.cut_rows,
        cut_tokens=training.cut_tokens + validation.cut_tokens,
        dropped_records=training.dropped_rows + validation.dropped_rows,
    )


@contextlib.contextmanager
def tokens_as_input(model: keras.Model) -> Iterator[None]:
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
