"""Writes what a teacher says to disk once, so that training need not run it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.data.encoding import tokenizer_of
from tfgptopt.data.text import as_tokens, is_text
from tfgptopt.distillation.divergences import log_softmax
from tfgptopt.distillation.losses import check_temperature
from tfgptopt.distillation.recording import (
    FORMAT,
    PARTIAL,
    ROWS,
    WHOLE,
    Recording,
    read_json,
    row_type,
    window_keys,
)
from tfgptopt.distillation.teachers import check_built, tokenizer_hash
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import Verbose, check_verbose, showing, track


def weights_hash(model: keras.Model) -> str:
    """Returns a hash of the weights of a model, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for variable in model.variables:
        if "seed_generator" not in variable.path:
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return digest.hexdigest()


def _batches(data: Data) -> Iterator[Any]:
    """Yields the inputs of batches, as arrays."""
    if isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("The data repeats forever. Give a finite dataset: leave out `repeat()`.")
    if not isinstance(data, tf.data.Dataset):
        raise ValueError(
            "`data` must be a tf.data.Dataset of batches of ({'token_ids', 'padding_mask'}, ...). "
            f"Received: {data!r}"
        )
    for batch in data.as_numpy_iterator():
        inputs = batch[0] if isinstance(batch, tuple) else batch
        if not isinstance(inputs, dict) or "token_ids" not in inputs:
            raise ValueError("The batches have no 'token_ids': what was said could not be found.")
        yield inputs


def record(
    teacher: keras.Model,
    data: Data,
    path: str | Path,
    top_k: int = 64,
    temperature: float = 1.0,
    verbose: Verbose = "auto",
) -> Recording:
    """Writes a teacher's likeliest next tokens for each position of a corpus to disk.

    One pass over the data; memory does not grow with it. A run that was interrupted continues
    where it stopped when it is called again. A recording of the same teacher, tokenizer and data
    that is there already is returned as it is.

    On disk, a position takes 4 bytes for each of the `top_k` tokens (5 in vocabularies above
    65,536): a float16 log-probability and the token.

    Args:
        teacher: A built causal LM.
        data: Finite dataset of batches of `({"token_ids", "padding_mask"}, ...)`, all windows of
            one length, in the same order each time it is read. Or text, which the teacher's
            preprocessor tokenizes: a list (in batches of 32), or a dataset of batches.
        path: The folder to write.
        top_k: int. Tokens to keep for each position. Defaults to `64`.
        temperature: float above 0. Divides the logits; losses have to use the same. Defaults to
            `1.0`.
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.

    Returns:
        `Recording`.

    Raises:
        ValueError: If there is no data, an argument is out of range, or the recording at `path` is
            of another teacher, tokenizer or corpus. Nothing is changed then.

    Example:

    ```python
    recording = tfgptopt.distillation.record(teacher, corpus.train, "teacher-says")
    distiller = tfgptopt.Distiller(student, recording, losses=[LogitsKL()])
    ```
    """
    check_built(teacher, "teacher")
    check_verbose(verbose)
    check_temperature(temperature)
    if is_text(data):
        data = as_tokens(data, getattr(teacher, "preprocessor", None), None)
    batches = _batches(data)
    first = next(batches, None)
    if first is None or 0 in first["token_ids"].shape:
        raise ValueError(f"The data to record is empty. Received: {data!r}")
    with tokens_as_input(teacher):
        vocabulary = int(teacher(first, training=False).shape[-1])
    if not isinstance(top_k, int) or not 1 <= top_k <= vocabulary:
        raise ValueError(f"`top_k` must be an int from 1 to {vocabulary}. Received: {top_k!r}")
    header = {
        "format": FORMAT,
        "top_k": top_k,
        "temperature": float(temperature),
        "vocabulary_size": vocabulary,
        "teacher": weights_hash(teacher),
        "tokenizer": tokenizer_hash(tokenizer_of(teacher)),
        "tokens": int(first["token_ids"].shape[1]),
    }
    folder = Path(path)
    whole = _check_same(folder, header)
    if whole:
        _check_corpus(Recording(folder), data)
        return Recording(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PARTIAL).is_file():
        (folder / ROWS).unlink(missing_ok=True)
        _write_json(folder / PARTIAL, header)
    with showing(verbose):
        rows = _write_rows(folder, header, teacher, data)
    _write_json(folder / WHOLE, {**header, "rows": rows})
    (folder / PARTIAL).unlink()
    return Recording(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), "utf-8")
    temporary.replace(path)


def _check_same(folder: Path, header: dict[str, Any]) -> bool:
    """Returns whether there is a whole recording already; raises if it is of something else."""
    found = [name for name in (WHOLE, PARTIAL) if (folder / name).is_file()]
    if not found:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"'{folder}' exists and is no recording. Choose another name.")
        return False
    there = read_json(folder / found[0])
    for name, wanted in header.items():
        if there.get(name) != wanted:
            raise ValueError(
                f"The recording at '{folder}' was made with another {name}: {there.get(name)!r}, "
                f"and now it is {wanted!r}. Choose another path, or remove that folder."
            )
    return found[0] == WHOLE


def _other_corpus(folder: Path) -> ValueError:
    return ValueError(
        f"The recording at '{folder}' was made from another corpus, or the data comes in another "
        "order. Choose another path, or remove that folder."
    )


def _check_corpus(recording: Recording, data: tf.data.Dataset) -> None:
    """Raises unless a recording has exactly the windows of the data."""
    at = 0
    for inputs in _batches(data):
        keys = window_keys(inputs)
        if not np.array_equal(recording.keys[at : at + len(keys)], keys):
            raise _other_corpus(Path(recording.path))
        at += len(keys)
    if at != recording.rows:
        raise _other_corpus(Path(recording.path))


def _write_rows(folder: Path, header: dict[str, Any], teacher: keras.Model, data: Data) -> int:
    """Appends the rows that are missing, and returns how many there are then."""
    layout = row_type(header["tokens"], header["top_k"], header["vocabulary_size"])
    path = folder / ROWS
    done = path.stat().st_size // layout.itemsize if path.is_file() else 0

    @tf.function(reduce_retracing=True, autograph=False)
    def say(inputs: Data) -> Any:
        logits = teacher(inputs, training=False)
        return tf.math.top_k(log_softmax(logits, header["temperature"]), header["top_k"])

    at = 0
    with tokens_as_input(teacher), path.open("r+b" if done else "wb") as stream:
        stream.truncate(done * layout.itemsize)  # A row that was cut off is written again.
        known = np.memmap(path, layout, "r") if done else np.empty(0, layout)
        count = int(data.cardinality())
        batches = track(_batches(data), "Recording the teacher", count if count > 0 else None)
        for inputs in batches:
            keys = window_keys(inputs)
            if inputs["token_ids"].shape[1] != header["tokens"]:
                raise ValueError(
                    f"A window has {inputs['token_ids'].shape[1]} tokens and the first one "
                    f"{header['tokens']}: a recording needs windows of one length."
                )
            before = known["key"][at : at + len(keys)]
            if not np.array_equal(before, keys[: len(before)]):
                raise _other_corpus(folder)
            if len(before) < len(keys):
                stream.seek(0, os.SEEK_END)
                logs, indices = (x.numpy() for x in say(inputs))
                rows = np.zeros(len(keys), layout)
                rows["key"], rows["low"], rows["logs"] = keys, indices & 0xFFFF, logs
                if "high" in (layout.names or ()):
                    rows["high"] = indices >> 16
                stream.write(rows[len(before) :].tobytes())
            at += len(keys)
        stream.flush()
        os.fsync(stream.fileno())
    if at < done:
        raise _other_corpus(folder)
    return at
