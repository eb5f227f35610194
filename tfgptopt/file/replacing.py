"""Writes files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tfgptopt.file.locking import locked, try_lock

# In the names of folders that hold what is being written, so that no other folder is ever removed.
_MARK = ".tfgptopt-"
# To the system calls that exchange two names at once, "as seen from here" and "exchange".
_HERE, _EXCHANGE = -100, 2


def check_target(path: str | Path, overwrite: bool) -> Path:
    """Returns a path that can be written to.

    Raises:
        FileExistsError: If it exists and `overwrite` is false.
        ValueError: If it cannot be written, with the reason.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"'{target}' exists already. Choose another name, or overwrite it "
            "(`overwrite=True`, on the command line --force)."
        )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"Cannot write '{target}': '{parent}' is not a writable folder.")
    return target


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`, renamed to it at the end, removed on an error.

    What a process that was killed left of writing the same target is removed too. A folder takes
    the place of another one in a single step where the system can do that (Linux, macOS).

    Args:
        target: What is to be written. Folders above it are made, and removed on an error.

    Raises:
        ValueError: If it cannot be written.
    """
    parent = target.absolute().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    descriptor: int | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with locked(parent):
            remove_left_behind(parent, target.name)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}{_MARK}", dir=parent))
            with contextlib.suppress(OSError):
                descriptor = try_lock(folder)
    except OSError as error:
        raise ValueError(f"Cannot write '{target}': {error}") from None
    temporary = folder / target.name
    try:
        yield temporary
        with locked(parent):
            _put_in_place(temporary, target, folder)
        made = []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def remove_left_behind(parent: Path, name: str = "") -> None:
    """Removes what processes that were killed left in a folder.

    Args:
        parent: The folder.
        name: str. Of what they wrote. Defaults to all.
    """
    for folder in parent.glob(f".*{_MARK}*"):
        ours = folder.name.rpartition(_MARK)[0] == f".{name}" if name else True
        if not ours or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):  # Without locks nobody knows whether it is in use.
            descriptor = try_lock(folder)
            if descriptor is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def flush(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path, folder: Path) -> None:
    """Renames what was written to its target; what was there before ends up in `folder`."""
    if target.is_dir() and not target.is_symlink():
        if _exchanged(temporary, target):
            return
        target.rename(folder / "replaced")
    temporary.replace(target)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names in a single step, and returns whether the system could."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, _EXCHANGE)
        else:
            failed = library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    except AttributeError:  # An older system.
        return False
    return not failed
