"""Checkpoints as folders: written beside and renamed, checked before they are trusted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfgptopt.file.container import checksum
from tfgptopt.file.locking import try_lock
from tfgptopt.file.replacing import flush, remove_left_behind, replacing

_PREFIX, _MANIFEST, _LOCK = "step-", "manifest.json", ".lock"
_FORMAT = 1
# Descriptors of the locks that this process holds, by process (a fork has its own) and folder.
_held: dict[tuple[int, Path], int] = {}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: Its folder.
        step: Batches that were trained on.
        facts: What was written with it, as plain data.
    """

    path: Path
    step: int
    facts: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one training, of which the newest are kept.

    Args:
        path: The folder.
        keep: int >= 1. How many to keep.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path.absolute(), keep

    @property
    def _key(self) -> tuple[int, Path]:
        return os.getpid(), self.path.resolve()

    @property
    def was_used_here(self) -> bool:
        """Whether this process has the folder already, such as from a `fit` that failed."""
        return self._key in _held

    def open(self) -> None:
        """Makes the folder, takes it for this process, and removes what a killed one left.

        Raises:
            ValueError: If another process writes to it, or it cannot be written to.
        """
        if self.was_used_here:
            return
        lock = self.path / _LOCK
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with lock.open("a"):
                descriptor = try_lock(lock)
        except OSError as error:
            raise ValueError(f"Cannot write checkpoints to '{self.path}': {error}") from None
        if descriptor is None:
            raise ValueError(
                f"Another training writes checkpoints to '{self.path}'. Wait for it, end it, or "
                "give this one a folder of its own."
            )
        _held[self._key] = descriptor
        remove_left_behind(self.path)

    def close(self) -> None:
        """Leaves the folder to other processes."""
        descriptor = _held.pop(self._key, None)
        if descriptor is not None:
            os.close(descriptor)

    def check_room(self, count: int) -> None:
        """Raises early if a checkpoint of some bytes has no room beside those that are kept.

        Raises:
            ValueError: If it has none.
        """
        free = shutil.disk_usage(self.path).free
        missing = max(self.keep + 1 - len(list(self._paths())), 1)
        if free < missing * count:
            raise ValueError(
                f"'{self.path}' has {free / 1e6:.0f} MB left, and {missing} checkpoints take "
                f"{missing * count / 1e6:.0f} MB. Make room, lower `keep`, or choose another disk."
            )

    def _path_of(self, step: int) -> Path:
        return self.path / f"{_PREFIX}{step:010d}"

    def _paths(self) -> Iterator[Path]:
        """Yields the folders of checkpoints, the newest first."""
        found = [path for path in self.path.glob(f"{_PREFIX}*") if path.is_dir()]
        yield from sorted(found, key=lambda path: path.name, reverse=True)

    def write(self, step: int, fill: Callable[[Path], None], facts: dict[str, Any]) -> None:
        """Writes a checkpoint, reads it back for its checksums, and removes the oldest.

        Args:
            step: Batches that were trained on.
            fill: Writes files into an empty folder.
            facts: Plain data to keep with it.

        Raises:
            OSError: If it cannot be written. Those that were there are as they were.
        """
        target = self._path_of(step)
        with replacing(target) as temporary:
            temporary.mkdir()
            fill(temporary)
            files = {file.name: _sealed(file) for file in sorted(temporary.iterdir())}
            manifest = {"format": _FORMAT, "step": step, "files": files, "facts": facts}
            path = temporary / _MANIFEST
            path.write_text(json.dumps(manifest), "utf-8")
            _sealed(path)
        flush(self.path)
        for old in list(self._paths())[self.keep :]:
            # Without its manifest it is none: half a checkpoint is never taken for one.
            with contextlib.suppress(OSError):
                (old / _MANIFEST).unlink()
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> SavedCheckpoint | None:
        """Returns the newest checkpoint that is whole, or `None` if there is none at all.

        Raises:
            ValueError: If there are some, and all are damaged.
        """
        damaged: list[str] = []
        for path in self._paths():
            try:
                found = _read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append(f"{path.name} ({error})")
                continue
            if damaged:
                warnings.warn(
                    f"Damaged checkpoints in '{self.path}': {', '.join(damaged)}. The training "
                    f"goes on from {path.name}.",
                    stacklevel=2,
                )
            return found
        if damaged:
            raise ValueError(
                f"All checkpoints in '{self.path}' are damaged: {', '.join(damaged)}. To begin "
                "anew, give another folder, or remove this one."
            )
        return None

    def at(self, step: int) -> SavedCheckpoint:
        """Returns the checkpoint of a step, which another worker chose.

        Raises:
            ValueError: If it cannot be read here.
        """
        try:
            return _read(self._path_of(step))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The first worker goes on from step {step}, and this one cannot read that "
                f"checkpoint in '{self.path}': {error}. Give a folder that all workers share."
            ) from None

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _sealed(path: Path) -> dict[str, int]:
    """Returns size and checksum of a file as it is on the disk."""
    flush(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return {"size": size, "checksum": checksum(file, size)}


def _read(path: Path) -> SavedCheckpoint:
    """Returns a checkpoint that is whole.

    Raises:
        ValueError: If it is not.
    """
    manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
    if manifest["format"] != _FORMAT:
        raise ValueError(f"it has format {manifest['format']}, and this version reads {_FORMAT}")
    for name, expected in manifest["files"].items():
        with (path / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if {"size": size, "checksum": checksum(file, size)} != expected:
                raise ValueError(f"{name} is not what was written")
    return SavedCheckpoint(path, int(manifest["step"]), manifest["facts"])
