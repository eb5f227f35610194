"""Remembers which files were found whole, so that they are not read again until they change.

A note is an empty file in the folder of packed weights. Its name is a hash of the file's checksum,
and of what changes when the file is written or replaced: device, inode, size and times. Several are
compared, since file systems differ in which they keep.

Reference: git tells in the same way which files of a work tree it need not read again,
https://git-scm.com/docs/racy-git.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

PREFIX = "whole-"

# A file may change again within one tick of its clock, which is 10 ms at most (2 s on FAT).
_SETTLED_SECONDS = 2.0


def is_noted(stat: os.stat_result, crc: int, folder: Path | None) -> bool:
    """Returns whether a file was found to have this checksum, and has not changed since."""
    if folder is None:
        return False
    note = _note(stat, crc, folder)
    with contextlib.suppress(OSError):
        os.utime(note)  # It was used: the oldest go first.
    return note.exists()


def add_note(stat: os.stat_result, crc: int, folder: Path | None) -> None:
    """Notes that a file has this checksum, unless it was written a moment ago.

    Args:
        stat: Of the file, taken before it was read.
        crc: Its checksum.
        folder: Where notes are; if there is none, or it cannot be written, nothing is noted.
    """
    if folder is None or time.time() - stat.st_ctime < _SETTLED_SECONDS:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _note(stat, crc, folder).touch()


def last_use(stat: os.stat_result, crc: int, folder: Path) -> float:
    """Returns when a file was last used, in seconds since the epoch."""
    with contextlib.suppress(OSError):
        return _note(stat, crc, folder).stat().st_mtime
    return stat.st_mtime


def _note(stat: os.stat_result, crc: int, folder: Path) -> Path:
    facts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, crc)
    return folder / f"{PREFIX}{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"
