"""Reads records: texts, prompts with responses, or chats, from files or from Python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.data.files import paths_of
from tfgptopt.generation.templates import check_messages

# Files whose names say that they hold records; `.json` may as well be a text like any other.
_SUFFIXES = {".jsonl", ".parquet"}
_PAIRS = (("prompt", "response"), ("prompts", "responses"))
_EXPECTED = "'text', 'prompt' and 'response', or 'messages'"


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        where: What an error message calls it.
        kind: `"text"`, `"prompt and response"` or `"messages"`.
        text: Of the first kind.
        messages: Of the others: prompt and response are one of the user and one of the assistant.
    """

    where: str
    kind: str
    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()


def is_records(source: Any) -> bool:
    """Returns whether a source is data of Python rather than names of files."""
    if source is None or isinstance(source, str | Path):
        return False
    if isinstance(source, list | tuple):
        return not all(isinstance(item, str | Path) for item in source)
    return True


def record_files(sources: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns the files of records that sources stand for, none if they stand for text.

    Raises:
        ValueError: If they stand for both.
    """
    found: dict[Path, bool] = {}
    for source in [sources] if isinstance(sources, str | Path) else sources:
        paths = paths_of(source)
        alone = not Path(source).expanduser().is_dir() or {p.suffix for p in paths} == {".json"}
        kinds = _SUFFIXES | ({".json"} if alone else set())
        found |= {path: path.suffix in kinds for path in paths}
    records = [path for path, is_record in found.items() if is_record]
    texts = [path for path, is_record in found.items() if not is_record]
    if records and texts:
        raise ValueError(
            f"'{records[0]}' holds records and '{texts[0]}' is text: give one kind of source."
        )
    return records


def read_files(paths: Iterable[Path]) -> Iterator[Record]:
    """Yields the records of JSON Lines, JSON and Parquet files.

    Raises:
        ValueError: If a file is empty, or a line is no record; it is named with its number.
        ImportError: If a file is Parquet, and pyarrow is missing.
    """
    for path in paths:
        count = 0
        for item, where in _parquet(path) if path.suffix == ".parquet" else _json_lines(path):
            count += 1
            yield _record(item, where)
        if not count:
            raise ValueError(f"'{path}' is empty: it has no records.")


def _json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        if path.suffix == ".json" and stream.read(1) == "[":
            stream.seek(0)
            for i, item in enumerate(_parsed(stream.read(), f"'{path}'")):
                yield item, f"'{path}', record {i + 1}"
            return
        stream.seek(0)
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"'{path}', line {number}"
                yield _parsed(line, where), where


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(
            f"'{path}' is Parquet, and pyarrow is missing: pip install 'tfgptopt[parquet]'."
        ) from None
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for item in batch.to_pylist():
                number += 1
                yield item, f"'{path}', record {number}"


def read_items(source: Any) -> Iterator[Record]:
    """Yields the records of an iterable of dictionaries or texts.

    Args:
        source: A list or generator, a dictionary of columns, a data frame, a `datasets.Dataset`, or
            a `tf.data.Dataset` of texts or dictionaries of texts, in batches or not.

    Raises:
        ValueError: If an item is no record.
    """
    for i, item in enumerate(_items(source)):
        yield _record(item, f"Record {i + 1}")


def _items(source: Any) -> Iterator[Any]:
    if isinstance(source, tf.data.Dataset):
        for element in source.as_numpy_iterator():
            yield from _unbatched(element)
    elif isinstance(source, Mapping):
        yield from _rows_of(source)
    elif hasattr(source, "iter_rows"):  # A frame of polars.
        yield from source.iter_rows(named=True)
    elif hasattr(source, "itertuples") and hasattr(source, "columns"):  # A frame of pandas.
        columns = list(source.columns)
        for values in source.itertuples(index=False, name=None):
            yield dict(zip(columns, values, strict=True))
    elif hasattr(source, "__iter__"):
        yield from source
    else:
        raise ValueError(
            "Expected files, or an iterable of texts or dictionaries. Received: "
            f"{type(source).__name__}"
        )


def _rows_of(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a dictionary of columns.

    Raises:
        ValueError: If the columns are no lists of one length.
    """
    sizes = {
        name: len(values) if hasattr(values, "__len__") else -1 for name, values in columns.items()
    }
    texts = any(isinstance(values, str | bytes) for values in columns.values())
    if (
        texts
        or not set(columns) & {"text", "messages", *sum(_PAIRS, ())}
        or len({*sizes.values()}) > 1
    ):
        raise ValueError(
            f"A dictionary has lists of one length for {_EXPECTED}; of a dictionary of data sets, "
            f"give one. Received lengths: {sizes}"
        )
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _unbatched(element: Any) -> Iterator[Any]:
    """Yields the texts, or dictionaries of texts, of an element of a `tf.data.Dataset`."""
    if isinstance(element, Mapping):
        arrays = {name: np.atleast_1d(values) for name, values in element.items()}
        for values in zip(*arrays.values(), strict=True):
            yield dict(zip(arrays, values, strict=True))
    else:
        yield from np.atleast_1d(element)


def _record(item: Any, where: str) -> Record:
    """Returns an item as a record.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(item, str | bytes):
        return Record(where, "text", _text(item, where, "text"))
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: expected a text or {_EXPECTED}. Received: {item!r:.80}")
    if item.get("messages") is not None:
        messages = check_messages(item["messages"], where)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if not answers:
            raise ValueError(f"{where}: there is no message of the assistant to learn from.")
        if not all(answer.strip() for answer in answers):
            raise ValueError(f"{where}: a message of the assistant is empty.")
        return Record(where, "messages", messages=tuple(messages))
    for names in _PAIRS:
        if set(names) <= set(item):
            prompt, response = (_text(item[name], where, name) for name in names)
            if not response.strip():
                raise ValueError(f"{where}: the {names[1]!r} is empty.")
            pair = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
            return Record(where, "prompt and response", messages=pair)
    if "text" in item:
        return Record(where, "text", _text(item["text"], where, "text"))
    raise ValueError(f"{where}: expected {_EXPECTED}. Received the fields {sorted(item)}.")


def _text(value: Any, where: str, name: str) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} is text. Received: {value!r:.80}")
    return value


def of_one_kind(records: Iterable[Record]) -> Iterator[Record]:
    """Yields records as long as they are of the kind of the first.

    Raises:
        ValueError: If one is of another.
    """
    first: Record | None = None
    for record in records:
        first = first or record
        if record.kind != first.kind:
            raise ValueError(
                f"{record.where} is {record.kind}, and {first.where} is {first.kind}: give "
                "records of one kind."
            )
        yield record
