"""Keeps the weights as XNNPACK packs them in a per-user folder, so that a file loads at once.

An entry is one file, whose name says what it was made from and what its checksum is. It is built
where no one sees it and renamed, so that processes that start together do no harm. It is used only
if it was found whole and has not changed since: LiteRT neither notices a changed model nor survives
a damaged entry.

The models of bundles are entries, too: LiteRT maps a model from the beginning of a file only.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, TypeVar

from tfgptopt.file import notes
from tfgptopt.file.bundle import Place
from tfgptopt.file.container import Container, checksum

Model = TypeVar("Model")

ENVIRONMENT = "TFGPTOPT_WEIGHT_CACHE"
MEMORY, EACH_ITS_OWN = ":memory", ""

_WEIGHTS, _MODEL = ".xnnpack", ".tfgptopt"
_MOST_BYTES = 4 << 30
_BUILDING = "building-"
_ABANDONED_SECONDS = 3600.0
_UNUSED_NOTE_SECONDS = 90 * 86400.0
_PIECE = 1 << 20


def cache_folder(choice: bool | str | Path) -> Path | None:
    """Returns the folder of the entries, or `None` for no folder.

    Args:
        choice: A folder, `False` for none, or `True` for the one that the environment variable
            `TFGPTOPT_WEIGHT_CACHE` names ("off" is none), by default the user's cache folder.
    """
    if not isinstance(choice, bool):
        return Path(choice)
    named = os.environ.get(ENVIRONMENT, "")
    if not choice or named.lower() == "off":
        return None
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path("~/Library/Caches/tfgptopt").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tfgptopt"


def load(compiled: Callable[[str], Model], content_hash: str, folder: Path | None) -> Model:
    """Loads a model with its packed weights from the folder, and puts them there if need be.

    A folder that cannot be used is no error: the weights are then packed in memory, as without.

    Args:
        compiled: Loads the model with a path of packed weights, which LiteRT writes if there is
            no such file, with `":memory"`, or with `""`, where each signature has its own copy.
        content_hash: Of the model's file.
        folder: Where the entries are, or `None`.
    """
    name = f"{content_hash}-{_machine()}"
    entry = None if folder is None else _valid_entry(folder, name, _WEIGHTS)
    if entry is not None:
        return compiled(str(entry))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < _MOST_BYTES:
        # It holds for files in memory too, nobody knows how much LiteRT will write, and LiteRT
        # aborts the process where it cannot.
        return compiled(EACH_ITS_OWN)
    if folder is None:
        return compiled(MEMORY)
    with _scratch() as path:
        model = compiled(MEMORY if path is None else path)
        if path is not None:
            with contextlib.suppress(OSError), Path(path).open("rb") as packed:
                _store(partial(shutil.copyfileobj, packed, length=_PIECE), folder, name, _WEIGHTS)
    return model


@contextlib.contextmanager
def model_file(path: Path, container: Container, folder: Path | None) -> Iterator[Path]:
    """Yields a path that LiteRT can load: of a bundle, its model in a file of its own.

    Args:
        path: The file.
        container: What it says of itself.
        folder: Where the entries are, or `None`: the model is then in a file for this once.

    Raises:
        OSError: If there is no room for the model.
    """
    place = container.model
    if place is None:
        yield path
        return

    def write(target: BinaryIO) -> None:
        _copy_part(path, place, target)
        container.check_unchanged(path)

    entry = None
    if folder is not None:
        entry = _valid_entry(folder, container.content_hash, _MODEL)
        with contextlib.suppress(OSError):
            entry = entry or _store(write, folder, container.content_hash, _MODEL)
    if entry is not None:
        yield entry
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.tflite"
        with file.open("wb") as target:
            write(target)
        yield file


def _copy_part(path: Path, place: Place, target: BinaryIO) -> None:
    with path.open("rb") as source:
        source.seek(place.begin)
        left = place.end - place.begin
        while left and (piece := source.read(min(left, _PIECE))):
            target.write(piece)
            left -= len(piece)


def _machine() -> str:
    """Returns a hash of what decides how weights are packed: the runtime and the CPU."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        cpu = next((x for x in lines if x.startswith(("flags", "Features"))), cpu)
    facts = [metadata.version("ai-edge-litert"), sys.platform, platform.machine(), cpu]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _valid_entry(folder: Path, name: str, suffix: str) -> Path | None:
    """Returns the entry of a name if it is whole; a damaged one is removed."""
    paths: list[Path] = []
    with contextlib.suppress(OSError):
        paths = sorted(folder.glob(f"{name}-*{suffix}"))
    for path in paths:
        with contextlib.suppress(OSError):
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if notes.is_noted(stat, _crc(path), folder):
                    return path
                crc = checksum(file, stat.st_size)
            if crc == _crc(path):
                notes.add_note(stat, crc, folder)
                return path
            path.unlink()
    return None


def _crc(entry: Path) -> int:
    """Returns the checksum that an entry should have."""
    try:
        return int(entry.stem.rpartition("-")[2], 16)
    except ValueError:
        return -1  # Not an entry of ours: no file has this one.


@contextlib.contextmanager
def _scratch() -> Iterator[str | None]:
    """Yields a path that LiteRT can write to without fail, or `None`.

    LiteRT aborts the process if it cannot write, as on a full disk. On Linux it therefore writes to
    memory, which it needs for the weights anyway; we copy from there, and may fail.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tfgptopt weights")
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.TemporaryDirectory() as folder:
        roomy = shutil.disk_usage(folder).free > _MOST_BYTES
        yield f"{folder}/weights" if roomy else None


def _store(write: Callable[[BinaryIO], None], folder: Path, name: str, suffix: str) -> Path:
    """Writes an entry into the folder under its final name, which it returns."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary_name = tempfile.mkstemp(dir=folder, prefix=_BUILDING)
    temporary = Path(temporary_name)
    try:
        with os.fdopen(descriptor, "w+b") as target:
            write(target)
            target.flush()
            crc = checksum(target, target.tell())
        entry = temporary.replace(folder / f"{name}-{crc:08x}{suffix}")
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _remove_old(folder)
    return entry


def _remove_old(folder: Path) -> None:
    """Removes the entries not used for longest, beyond 4 GiB, and what was left behind."""
    now, total = time.time(), 0
    entries = []
    for path in filter(Path.is_file, folder.iterdir()):
        stat = path.stat()
        if path.suffix in (_WEIGHTS, _MODEL):
            entries.append((notes.last_use(stat, _crc(path), folder), stat.st_size, path))
        elif now - stat.st_mtime > _left_behind_after(path.name):
            path.unlink()
    for _, size, path in sorted(entries, reverse=True):
        total += size
        if total > _MOST_BYTES and total > size:
            path.unlink()


def _left_behind_after(name: str) -> float:
    """Returns the age in seconds at which a file that is no entry is of no use."""
    if name.startswith(notes.PREFIX):
        return _UNUSED_NOTE_SECONDS
    return _ABANDONED_SECONDS if name.startswith(_BUILDING) else math.inf
