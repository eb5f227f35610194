"""What a calibration found so far, step by step, in a folder that the same one goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from tfgptopt.file.locking import try_lock
from tfgptopt.file.replacing import flush, remove_left_behind, replacing

Arrays = dict[str, np.ndarray]

_MANIFEST, _LOCK, _RUN = "calibration.json", ".lock", "run"
_FORMAT = 1
_STEP = re.compile(r"[a-z]+-\d{5}\.npz")


class Journal:
    """Knows nothing and keeps nothing: that of a calibration without a folder."""

    def known(self, stage: str) -> int:
        """Returns how many steps of a stage, from the first on, were found before."""
        return 0

    def read(self, stage: str, number: int) -> Arrays:
        """Returns what a step found that is known."""
        raise KeyError(f"{stage} {number}")

    def write(self, stage: str, number: int, arrays: Arrays) -> None:
        """Keeps what a step found."""


class FolderJournal(Journal):
    """Keeps each step as a file, written beside and renamed, with checksums of its arrays.

    Args:
        folder: The folder. Files of other names are left alone.
        identity: What has to be the same for a calibration to go on: names to words.

    Raises:
        ValueError: If the folder cannot be written to, is in use, or is of another calibration.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder.absolute()
        words = json.dumps(dict(identity), sort_keys=True)
        self._run = np.frombuffer(hashlib.sha256(words.encode()).digest(), np.uint8)
        self._known: dict[str, int] = {}
        self._fails = False
        lock = self.folder / _LOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock.open("a"):
                descriptor = try_lock(lock)
        except OSError as error:
            raise ValueError(f"Cannot write checkpoints to '{folder}': {error}") from None
        if descriptor is None:
            raise ValueError(
                f"Another calibration writes checkpoints to '{folder}'. Wait for it, end it, or "
                "give this one a folder of its own."
            )
        self._descriptor = descriptor
        try:
            remove_left_behind(self.folder)
            self._begin(dict(identity))
        except BaseException:
            self.close()
            raise

    def _begin(self, identity: dict[str, str]) -> None:
        """Writes what the folder is of, or raises if it is of something else."""
        manifest = self.folder / _MANIFEST
        if not manifest.exists():
            if self._steps():
                raise ValueError(
                    f"'{self.folder}' has steps of a calibration, and no {_MANIFEST} that says of "
                    "which. To begin anew, give another folder, or remove this one."
                )
            facts = json.dumps({"format": _FORMAT, "identity": identity}, indent=1)
            _put(manifest, lambda path: path.write_bytes(facts.encode()))
            return
        try:
            found = json.loads(manifest.read_text("utf-8"))
            form, saved = found["format"], dict(found["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{manifest}' is damaged ({error!r}), so nobody knows what it is of. To begin "
                "anew, give another folder, or remove this one."
            ) from None
        what = next((name for name in identity if saved.get(name) != identity[name]), None)
        if form != _FORMAT or what is not None:
            said = (f"format {form}, and this version reads {_FORMAT}" if what is None else
                    f"another {what}: {saved.get(what)}. Received: {identity[what]}")  # fmt: skip
            raise ValueError(
                f"The checkpoints in '{self.folder}' are of {said}. Give the same as before to go "
                "on; to begin anew, give another folder, or remove this one."
            )

    def _steps(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _STEP.fullmatch(path.name)]

    @property
    def has_steps(self) -> bool:
        """Whether something was found."""
        return bool(self._steps())

    def _path(self, stage: str, number: int) -> Path:
        return self.folder / f"{stage}-{number:05d}.npz"

    def check_room(self, count: int) -> None:
        """Raises early if so many bytes have no room.

        Raises:
            ValueError: If they have none.
        """
        free = shutil.disk_usage(self.folder).free
        count -= sum(path.stat().st_size for path in self._steps())
        if free < count:
            raise ValueError(
                f"'{self.folder}' has {free / 1e6:.0f} MB left, and what is found takes "
                f"{count / 1e6:.0f} MB. Make room, or choose another disk."
            )

    def known(self, stage: str) -> int:
        """Returns how many steps of a stage, from the first on, are whole.

        Steps behind one that is damaged are made again.
        """
        if stage not in self._known:
            number, paths = 0, {path.name for path in self._steps()}
            while self._path(stage, number + 1).name in paths and self._is_whole(stage, number + 1):
                number += 1
            self._known[stage] = number
        return self._known[stage]

    def _is_whole(self, stage: str, number: int) -> bool:
        path = self._path(stage, number)
        try:
            self.read(stage, number)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(
                f"'{path}' is damaged ({error}). The calibration goes on in front of it.",
                stacklevel=2,
            )
            return False
        return True

    def read(self, stage: str, number: int) -> Arrays:
        """Returns what a step found.

        Raises:
            OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: If it is not what was
                written.
        """
        # Arrays are read to their ends, where zipfile compares their checksums.
        with np.load(self._path(stage, number), allow_pickle=False) as found:
            arrays = dict(found)
        if not np.array_equal(arrays.pop(_RUN), self._run):
            raise ValueError("it is of another calibration")
        return arrays

    def write(self, stage: str, number: int, arrays: Arrays) -> None:
        """Writes what a step found. Where that fails, a warning says so, and it is the last try."""
        if self._fails:
            return

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **{_RUN: self._run}, **arrays)  # type: ignore[arg-type]

        try:
            _put(self._path(stage, number), write)
        except (OSError, ValueError) as error:
            self._fails = True
            warnings.warn(
                f"What was found could not be written to '{self.folder}' ({error}). The "
                "calibration goes on; if it is stopped, what comes from here on is lost.",
                stacklevel=2,
            )

    def close(self) -> None:
        """Leaves the folder to others, and removes it if nothing was found."""
        if not self._steps():
            for name in (_MANIFEST, _LOCK):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        os.close(self._descriptor)


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file, whole and on the disk, or not at all."""
    with replacing(path) as temporary:
        write(temporary)
        flush(temporary)
    flush(path.parent)


@contextlib.contextmanager
def journal_in(
    folder: str | Path | None, identity: Mapping[str, str], room: int
) -> Iterator[Journal]:
    """Yields the journal of a folder, and says of an error where to go on.

    Args:
        folder: The folder. `None`: nothing is kept.
        identity: As of `FolderJournal`.
        room: How many bytes all steps take.

    Raises:
        ValueError: As `FolderJournal`, or if there is no room.
    """
    if folder is None:
        yield Journal()
        return
    journal = FolderJournal(Path(folder), identity)
    with contextlib.closing(journal):
        journal.check_room(room)
        try:
            yield journal
        except BaseException as error:
            if journal.has_steps and not isinstance(error, ValueError):
                error.add_note(
                    f"What was found until then is in '{folder}': the same call goes on from there."
                )
            raise
