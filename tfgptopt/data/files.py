"""Finds text files, splits them, and reads them piece by piece."""

from __future__ import annotations

import codecs
import glob
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Small enough that a tokenizer has pieces for each of its threads.
_PIECE = 1 << 17
_LONGEST_NAME = 1000
# What the "surrogateescape" handler makes of a byte that is no UTF-8.
_ESCAPED = re.compile("[\udc80-\udcff]")
_NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class TextFile:
    """A file, or a range of its bytes.

    Attributes:
        path: The file.
        start, stop: First byte, and the byte behind the last.
    """

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


class BadBytes:
    """Counts the bytes that were no UTF-8 while text is read."""

    def __init__(self) -> None:
        self.count = 0


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def paths_of(source: str | Path) -> list[Path]:
    """Returns the files that a file, folder or glob stands for, hidden and empty ones of a folder
    left out.

    Raises:
        ValueError: If it is no name of a file.
    """
    if "\n" in str(source) or len(str(source)) > _LONGEST_NAME:
        raise ValueError(
            f"A text is no name of a file: {str(source)[:40]!r}... Give texts as dictionaries, "
            "[{'text': ...}]."
        )
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if p.is_file())
        visible = (
            p for p in inside if not any(n.startswith(".") for n in p.relative_to(path).parts)
        )
        return [p for p in visible if p.stat().st_size]
    # `Path.glob` cannot expand an absolute pattern.
    matches = (Path(match) for match in sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    return [p for p in matches if p.is_file()]


def _expand(source: str | Path) -> list[Path]:
    """Returns the text files that a file, folder or glob stands for."""
    paths = paths_of(source)
    if Path(source).expanduser().is_file() and _is_binary(paths[0]):
        raise ValueError(f"'{paths[0]}' is not text: it has zero bytes.")
    return [p for p in paths if not _is_binary(p)]


def find_files(sources: str | Path | Sequence[str | Path]) -> list[TextFile]:
    """Finds text files.

    Args:
        sources: Files, folders (searched to any depth, hidden and binary files left out) or
            globs such as `"docs/**/*.md"`.

    Returns:
        List of `TextFile`, each once, in a stable order.

    Raises:
        FileNotFoundError: If a source stands for no text file.
        ValueError: If a named file is binary, or all are empty.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    found: dict[Path, Path] = {}
    for source in sources:
        paths = _expand(source)
        if not paths:
            raise FileNotFoundError(f"'{source}' is no text file, and no folder or glob with any.")
        for path in paths:
            found.setdefault(path.resolve(), path)
    files = [TextFile(path, 0, path.stat().st_size) for path in found.values()]
    if not any(file.size for file in files):
        raise ValueError(f"The text is empty: {', '.join(str(f.path) for f in files[:3])}")
    return [file for file in files if file.size]


def standard_library() -> list[TextFile]:
    """Returns the source of Python's standard library, a corpus that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (
        p for p in sorted(root.rglob("*.py")) if not _NOT_CORPUS & set(p.relative_to(root).parts)
    )
    return [TextFile(p, 0, p.stat().st_size) for p in paths if p.stat().st_size]


def check_share(validation_share: float) -> None:
    """Raises a `ValueError` unless a share for validation is one."""
    if not 0.0 < validation_share <= 1.0:
        raise ValueError(f"`validation_share` must be in (0, 1]. Received: {validation_share!r}")


def split_files(
    files: Sequence[TextFile], validation_share: float
) -> tuple[list[TextFile], list[TextFile]]:
    """Splits files into training and validation, the same way every time.

    No file is in both. A single file is cut in two at a line end, its last part for validation.

    Args:
        files: The files.
        validation_share: float in `(0, 1]`, the share of bytes for validation.

    Returns:
        `(training, validation)`, both non-empty unless the share is 1.

    Raises:
        ValueError: If `validation_share` is out of range.
    """
    check_share(validation_share)
    if validation_share == 1.0:
        return [], list(files)
    if len(files) == 1:
        return _cut(files[0], validation_share)

    # In the order of a hash, which no name or folder structure can bias.
    ordered = sorted(files, key=lambda f: hashlib.sha256(f.path.as_posix().encode()).digest())
    wanted = validation_share * sum(file.size for file in files)
    validation: list[TextFile] = []
    while len(validation) < len(ordered) - 1 and sum(f.size for f in validation) < wanted:
        validation.append(ordered[len(validation)])
    chosen = set(validation)
    return [f for f in files if f not in chosen], [f for f in files if f in chosen]


def _cut(file: TextFile, validation_share: float) -> tuple[list[TextFile], list[TextFile]]:
    middle = file.start + max(1, int(file.size * (1.0 - validation_share)))
    with file.path.open("rb") as stream:
        stream.seek(middle)
        behind_line = middle + len(stream.readline())
    if behind_line < file.stop:
        middle = behind_line
    first = TextFile(file.path, file.start, middle)
    return [first], [TextFile(file.path, middle, file.stop)]


def read_pieces(file: TextFile, bad_bytes: BadBytes) -> Iterator[str]:
    """Yields the text of a file in pieces of about 128 KB that end with a line.

    Bytes that are no UTF-8 are replaced, and counted.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with file.path.open("rb") as stream:
        stream.seek(file.start)
        left, rest = file.size, ""
        while left > 0:
            raw = stream.read(min(_PIECE, left))
            left -= len(raw)
            if not raw:
                left = 0
            text, bad = _ESCAPED.subn("\ufffd", decoder.decode(raw, final=left == 0))
            bad_bytes.count += bad
            text = rest + text
            cut = text.rfind("\n") + 1 if left else len(text)
            cut = cut or len(text)
            rest = text[cut:]
            if text[:cut]:
                yield text[:cut]


def total_size(files: Iterable[TextFile]) -> int:
    """Returns the number of bytes of files."""
    return sum(file.size for file in files)
