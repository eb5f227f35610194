"""Writes records as windows, some of them for validation."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

import keras_hub
import numpy as np

from tfgptopt.data.chats import ChatEncoder, template_for
from tfgptopt.data.encoding import encode_texts, special_id
from tfgptopt.data.records import Record, of_one_kind
from tfgptopt.data.windows import WindowWriter, check_enough
from tfgptopt.generation.templates import KNOWN, ChatTemplate

_AT_ONCE = 64


def write_records(
    records: Iterable[Record],
    tokenizer: keras_hub.tokenizers.Tokenizer,
    template: ChatTemplate | None,
    training: WindowWriter,
    validation: WindowWriter,
    validation_share: float,
) -> tuple[int, int]:
    """Writes records: text is packed, and everything else has a window of its own.

    Args:
        records: The records, of one kind.
        tokenizer: Of KerasHub.
        template: Writes messages out; `None` for that of the tokenizer's family.
        training, validation: Where to write. The first record goes to the first, the second to the
            other, and a hash of its number decides about every other.
        validation_share: float in `(0, 1]`. Share of records for validation; with 1 all are.

    Returns:
        How many records went to each.

    Raises:
        ValueError: If a record is none, of another kind than the first, or refused by the template.
    """
    counts = [0, 0]
    for record, rows in _encoded(of_one_kind(records), tokenizer, template):
        packed = record.kind == "text"
        # What has no answer within a window is dropped, and takes no one's place for validation.
        useful = packed or any(training.learns(row) for row in rows)
        part = _part(sum(counts), validation_share) if useful else 0
        counts[part] += useful
        writer = (training, validation)[part]
        for row in rows:
            writer.pack(row) if packed else writer.row(row)
    return counts[0], counts[1]


def _part(i: int, validation_share: float) -> int:
    """Returns 1 if a record is for validation, which the second is in any case, and else 0."""
    if i < 2 and validation_share < 1.0:
        return i
    digest = hashlib.sha256(str(i).encode()).digest()
    return int(int.from_bytes(digest[:8], "big") < validation_share * 2**64)


def _encoded(
    records: Iterator[Record],
    tokenizer: keras_hub.tokenizers.Tokenizer,
    template: ChatTemplate | None,
) -> Iterator[tuple[Record, Iterable[np.ndarray]]]:
    """Yields records with their tokens."""
    first = next(records, None)
    if first is None:
        return
    records = itertools.chain([first], records)
    if first.kind == "text":
        end = special_id(tokenizer, "end")
        closing = np.asarray([] if end is None else [end], np.int32)
        while some := list(itertools.islice(records, _AT_ONCE)):
            found = encode_texts(tokenizer, [record.text for record in some])
            for record, ids in zip(some, found, strict=True):
                yield record, [ids, closing]
        return
    if template is None and first.kind == "messages":
        template = template_for(tokenizer)
        if template is None:
            raise ValueError(
                f"There are chats, and no known template for a {type(tokenizer).__name__}. Give "
                f"`chat_template`: one of {', '.join(KNOWN)}, Jinja, or a `ChatTemplate`."
            )
    encoder = ChatEncoder(tokenizer, template)
    for record in records:
        try:
            yield record, list(encoder.rows(record.messages))
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None


def check_records(
    counts: tuple[int, int],
    writers: tuple[WindowWriter, WindowWriter],
    validation_share: float,
    sequence_length: int,
    origin: str,
) -> None:
    """Checks that there is something to learn from, and to validate with.

    Raises:
        ValueError: If there are too few records, or none fits.
    """
    dropped = sum(writer.dropped_rows for writer in writers)
    if not sum(counts) and dropped:
        raise ValueError(
            f"None of the {dropped} conversations has an answer within {sequence_length + 1} "
            f"tokens. Choose a longer window ({origin})."
        )
    needed = writers[1:] if validation_share == 1.0 else writers
    if sum(counts) < len(needed):
        wanted = "at least two are needed, one of them for validation"
        raise ValueError(
            f"There are {sum(counts)} records with something to learn, and "
            f"{wanted if len(needed) > 1 else 'one is needed'} ({origin})."
        )
    for writer in needed:
        if not writer.rows:
            check_enough(writer, sequence_length, origin)
