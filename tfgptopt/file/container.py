"""Reads what a tfgptopt file says of itself, and makes sure that the file is whole.

A file is a TFLite model, or a LiteRT-LM bundle with one inside. The checksum covers the whole file
and stands behind it, in 16 bytes that neither format knows of. It guards LiteRT against damage,
which can crash it; it is no signature.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ai_edge_litert import schema_py_generated as schema

from tfgptopt.file import notes
from tfgptopt.file.bundle import MAGIC, Place, read_bundle
from tfgptopt.file.metadata import METADATA_NAME, Metadata

_SEAL = b"TFGPTOPT"
_SEAL_BYTES = len(_SEAL) + 8
_BLOCK = 1 << 20
_THREADS = min(4, os.cpu_count() or 1)
# Not `st_ctime`: a link made meanwhile would change it, and the content would be the same.
_IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns")


def file_identity(path: str | Path) -> tuple[int, ...] | None:
    """Returns what tells a file from another in its place, or `None` if there is none."""
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return tuple(getattr(stat, fact) for fact in _IDENTITY)


@dataclass(frozen=True)
class Container:
    """A file that was found whole.

    Attributes:
        metadata: What the file says of itself.
        content_hash: Differs between files of different content.
        stat: Of the file when it was read.
        model: Where the TFLite model is in a bundle, or `None`: the file is the model.
    """

    metadata: Metadata
    content_hash: str
    stat: os.stat_result
    model: Place | None = None

    def check_unchanged(self, path: Path) -> None:
        """Raises a `ValueError` if another file is in the place of the one that was read."""
        now = path.stat()
        if any(getattr(now, fact) != getattr(self.stat, fact) for fact in _IDENTITY):
            raise ValueError(f"'{path}' was replaced while it was being loaded. Load it again.")


def seal(data: bytes | memoryview) -> bytes:
    """Returns the 16 bytes that `tfgptopt.export` writes behind a flatbuffer."""
    blocks = (data[i : i + _BLOCK] for i in range(0, len(data), _BLOCK))
    crcs = b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)
    return _SEAL + zlib.crc32(crcs).to_bytes(8, "little")


def append_seal(path: Path) -> None:
    """Writes the seal of a file behind it."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.write(_SEAL + checksum(file, size).to_bytes(8, "little"))


def checksum(file: BinaryIO, size: int) -> int:
    """Returns the checksum of the first `size` bytes of a file: the CRC-32 of those of its blocks.

    Threads share the blocks, since the time to load is mostly spent here. They read, for a mapped
    file would count as memory of the process.
    """
    count = -(-size // _BLOCK)
    crcs = bytearray(4 * count)

    def work(first: int) -> None:
        buffer = memoryview(bytearray(min(size, _BLOCK)))
        for i in range(first, count, _THREADS):
            block = buffer[: min(_BLOCK, size - i * _BLOCK)]
            read = os.preadv(file.fileno(), [block], i * _BLOCK)
            crcs[4 * i : 4 * i + 4] = zlib.crc32(block[:read]).to_bytes(4, "little")

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, range(_THREADS)))
    return zlib.crc32(crcs)


def read_container(path: str | Path, folder: Path | None = None) -> Container:
    """Reads the metadata of a file, and checks that the file is whole.

    Args:
        path: A `.tflite` or `.litertlm` file written by `tfgptopt.export`.
        folder: Where it is noted which files are whole, or `None` to read the file in any case.

    Returns:
        A `Container`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it is a bundle, and the library that reads those is not installed.
        ValueError: If the file is no TFLite file or bundle, is damaged or was cut off, was not
            written by tfgptopt, or has another version of the format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    with path.open("rb") as file:
        begin = file.read(8)
        if begin != MAGIC and begin[4:] != b"TFL3":
            raise ValueError(
                f"'{path}' is not a TFLite file: it begins with neither TFL3 nor {MAGIC.decode()}."
            )
        stat = os.fstat(file.fileno())
        crc = _verify(path, file, stat, folder)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                bundle = read_bundle(data) if begin == MAGIC else None
                model = Place(0, len(data)) if bundle is None else bundle.model
                entries = {} if model is None else _find(data, model.begin)
            except ImportError:
                raise
            except Exception as error:
                raise ValueError(f"'{path}' is damaged or was cut off ({error!r}).") from None
    if METADATA_NAME not in entries:
        raise ValueError(_of_others(path, bundle is not None))
    metadata = Metadata.from_entries(entries, f"'{path}'")
    if crc is None:
        raise ValueError(
            f"'{path}' is damaged or was cut off: the checksum at its end is missing. "
            "Copy or export it again."
        )
    name = f"{hashlib.sha256(entries[METADATA_NAME]).hexdigest()[:16]}{crc:08x}"
    if bundle is None:
        return Container(metadata, name, stat)
    metadata = replace(metadata, tokenizer=bundle.tokenizer, sentencepiece=bundle.sentencepiece)
    return Container(metadata, name, stat, bundle.model)


def _of_others(path: Path, bundled: bool) -> str:
    """Returns what is said of a file that was not written by tfgptopt."""
    kind, advice = "TFLite file", "Write it"
    if bundled:
        kind, advice = "LiteRT-LM bundle", "LiteRT-LM runs it; write one that runs here, too,"
    return (
        f"'{path}' is a {kind}, but was not written by tfgptopt: it has no metadata named "
        f"'{METADATA_NAME}'. {advice} with `tfgptopt.export(model, path)`."
    )


def read_metadata(path: str | Path) -> Metadata:
    """Returns the metadata of a file.

    Raises:
        FileNotFoundError, ValueError: As `read_container`.
    """
    return read_container(path).metadata


def _verify(path: Path, file: BinaryIO, stat: os.stat_result, folder: Path | None) -> int | None:
    """Returns the checksum of a file, or `None` if the file has none.

    Raises:
        ValueError: If it is wrong.
    """
    file.seek(max(0, stat.st_size - _SEAL_BYTES))
    end = file.read(_SEAL_BYTES)
    if not end.startswith(_SEAL):
        return None
    stored = int.from_bytes(end[len(_SEAL) :], "little")
    if notes.is_noted(stat, stored, folder):
        return stored
    crc = checksum(file, stat.st_size - _SEAL_BYTES)
    if stored != crc:
        raise ValueError(
            f"'{path}' is damaged: its checksum is {crc:08x}, and {stored:08x} was written. "
            "Copy or export it again."
        )
    notes.add_note(stat, crc, folder)
    return crc


def _find(data: mmap.mmap, begin: int) -> dict[str, bytes]:
    """Returns our metadata by name, after touching the ends of every buffer of the model."""
    model = schema.Model.GetRootAs(data, begin)
    for i in range(model.BuffersLength()):
        buffer = model.Buffers(i)
        if buffer.DataLength():
            buffer.Data(buffer.DataLength() - 1)
    found = {}
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        name = entry.Name().decode()
        if name.startswith(METADATA_NAME):
            found[name] = bytes(model.Buffers(entry.Buffer()).DataAsNumpy())
    return found
