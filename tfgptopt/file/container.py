"""Reads what a tfgptopt file says of itself, and makes sure that the file is whole.

The checksum covers the whole file and stands behind it, in 16 bytes that the flatbuffer does not
know of. It guards LiteRT against damage, which can crash it; it is no signature.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ai_edge_litert import schema_py_generated as schema

from tfgptopt.file import notes
from tfgptopt.file.metadata import METADATA_NAME, Metadata

_SEAL = b"TFGPTOPT"
_SEAL_BYTES = len(_SEAL) + 8
_BLOCK = 1 << 20
_THREADS = min(4, os.cpu_count() or 1)
# Not `st_ctime`: a link made meanwhile would change it, and the content would be the same.
_IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns")


@dataclass(frozen=True)
class Container:
    """A file that was found whole.

    Attributes:
        metadata: What the file says of itself.
        content_hash: Differs between files of different content.
        stat: Of the file when it was read.
    """

    metadata: Metadata
    content_hash: str
    stat: os.stat_result

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
        path: A `.tflite` file written by `tfgptopt.export`.
        folder: Where it is noted which files are whole, or `None` to read the file in any case.

    Returns:
        A `Container`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no TFLite file, is damaged or was cut off, was not written by
            tfgptopt, or has another version of the format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    with path.open("rb") as file:
        if file.read(8)[4:] != b"TFL3":
            raise ValueError(f"'{path}' is not a TFLite file: it does not begin with TFL3.")
        stat = os.fstat(file.fileno())
        crc = _verify(path, file, stat, folder)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                blob = _find(data)
            except Exception as error:
                raise ValueError(f"'{path}' is damaged or was cut off ({error!r}).") from None
    if blob is None:
        raise ValueError(
            f"'{path}' is a TFLite file, but was not written by tfgptopt: it has no metadata named "
            f"'{METADATA_NAME}'. Write it with `tfgptopt.export(model, path)`."
        )
    metadata = Metadata.from_json(blob, f"'{path}'")
    if crc is None:
        raise ValueError(
            f"'{path}' is damaged or was cut off: the checksum at its end is missing. "
            "Copy or export it again."
        )
    name = f"{hashlib.sha256(blob).hexdigest()[:16]}{crc:08x}"
    return Container(metadata, name, stat)


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


def _find(data: mmap.mmap) -> bytes | None:
    """Returns our metadata, after touching the ends of every buffer of the file."""
    model = schema.Model.GetRootAs(data, 0)
    for i in range(model.BuffersLength()):
        buffer = model.Buffers(i)
        if buffer.DataLength():
            buffer.Data(buffer.DataLength() - 1)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == METADATA_NAME.encode():
            return bytes(model.Buffers(entry.Buffer()).DataAsNumpy())
    return None
