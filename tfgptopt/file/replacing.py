"""Writes files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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

    Args:
        target: What is to be written. Folders above it are made, and removed on an error.

    Raises:
        ValueError: If it cannot be written.
    """
    parent = target.absolute().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise ValueError(f"Cannot write '{target}': {error}") from None
    temporary = folder / target.name
    try:
        yield temporary
        if target.is_dir() and not target.is_symlink():
            target.rename(folder / "replaced")
        temporary.replace(target)
        made = []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
