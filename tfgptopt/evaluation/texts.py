"""Held-out text by domains, and the windows that a tokenizer makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfgptopt.data.files import BadBytes, TextFile, find_files, read_pieces
from tfgptopt.generation.tokenizing import TextTokenizer

_BATCH = 4


@dataclass(frozen=True)
class Windows:
    """How text is cut into what a model sees at once.

    Attributes:
        length: Tokens that a model reads at once, the start token included.
        stride: How many of a window's tokens are predicted; those before them are context. `None`
            for all (packed windows: fast, the first tokens of each have little before them); a
            smaller number for a sliding window, whose perplexity is lower and dearer.
        start_token: Whether each window begins with the start token of families that have one.
    """

    length: int = 128
    stride: int | None = None
    start_token: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 2:
            raise ValueError(f"`length` must be an int >= 2. Received: {self.length!r}")
        if self.stride is not None and not 1 <= self.stride < self.length:
            raise ValueError(
                f"`stride` must be in [1, {self.length - 1}], below the length of a window, or "
                f"None. Received: {self.stride!r}"
            )

    def describe(self) -> str:
        """Returns what it means, in words."""
        kind = "packed" if self.stride is None else f"sliding by {self.stride}"
        return f"windows of {self.length} tokens, {kind}"


@dataclass(frozen=True)
class Texts:
    """Held-out texts.

    Attributes:
        domains: Names of domains to their texts.
    """

    domains: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not any(text.strip() for texts in self.domains.values() for text in texts):
            raise ValueError("The text is empty: there is nothing to measure.")

    @property
    def size(self) -> int:
        """Bytes of all texts."""
        return sum(len(text.encode()) for texts in self.domains.values() for text in texts)


@dataclass(frozen=True, eq=False)
class Windowed:
    """Text as one tokenizer has it.

    Attributes:
        batches: Of `({"token_ids", "padding_mask"}, labels, sample_weight)`.
        sizes: Bytes of text that each window's predicted tokens are, float64 `(windows,)`.
        domains: Domain of each window.
    """

    batches: tf.data.Dataset
    sizes: np.ndarray | None = None
    domains: tuple[str, ...] = ()

    def same_as(self, other: Windowed) -> bool:
        """Returns whether another one has the same tokens."""
        if self.batches is other.batches:
            return True
        mine, its = (one.batches.as_numpy_iterator() for one in (self, other))
        pairs = itertools.zip_longest(mine, its)
        return all(
            a is not None
            and b is not None
            and np.array_equal(a[0]["token_ids"], b[0]["token_ids"])
            and np.array_equal(a[1], b[1])
            for a, b in pairs
        )


def read_texts(sources: str | Path | Sequence[str | Path]) -> Texts:
    """Reads text files; where they lie in several folders, each folder is a domain.

    Args:
        sources: Files, folders or globs, as `find_files` takes them. A domain is the folder of a
            file beneath the one that was given, and `"."` for files that lie in it.

    Returns:
        `Texts`.

    Raises:
        FileNotFoundError: If a source stands for no text file.
        ValueError: If a named file is binary, or all are empty.

    Example:

    ```python
    from tfgptopt.evaluation.texts import read_texts

    texts = read_texts("notes")
    print(list(texts.domains), texts.size)
    ```
    """
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    found: dict[str, list[str]] = {}
    for source in listed:
        root = Path(source).expanduser().resolve()
        for file in find_files(source):
            text = "".join(read_pieces(file, BadBytes()))
            if text.strip():
                found.setdefault(_domain(file, root), []).append(text)
    return Texts({name: tuple(texts) for name, texts in sorted(found.items())})


def _domain(file: TextFile, root: Path) -> str:
    """Returns the name of the folder of a file, as seen from what was given."""
    parent = file.path.resolve().parent
    if root.is_dir():
        return parent.relative_to(root).as_posix()
    return "." if root.is_file() else parent.name


def windows_of(
    texts: Texts, tokenizer: TextTokenizer, start: int | None, windows: Windows
) -> Windowed:
    """Returns the windows of texts; a text begins a window of its own.

    Args:
        texts: The texts.
        tokenizer: Makes ids of them.
        start: Id of the start token, or `None`.
        windows: How they are cut.

    Raises:
        ValueError: If no text has two tokens.
    """
    begins = start if windows.start_token else None
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    sizes: list[float] = []
    domains: list[str] = []
    for domain, members in texts.domains.items():
        for text in members:
            ids = np.asarray(tokenizer.encode(text, False), np.int32)
            cut = _cut(ids, begins, windows)
            rows += cut
            domains += [domain] * len(cut)
            sizes += _sizes(text, ids, cut, tokenizer, begins)
    if not rows:
        raise ValueError("No text has two tokens, so that nothing can be predicted.")
    inputs, labels, weights = (np.stack(part) for part in zip(*rows, strict=True))
    mask = np.ones_like(inputs)
    data = ({"token_ids": inputs, "padding_mask": mask}, labels, weights)
    batches = tf.data.Dataset.from_tensor_slices(data).batch(_BATCH)
    return Windowed(batches, np.asarray(sizes), tuple(domains))


def _cut(
    ids: np.ndarray, start: int | None, windows: Windows
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns `(inputs, labels, weights)` of each window; each token is predicted once."""
    # Without a start token nothing predicts the first token.
    origin = 1 if start is None else 0
    target = origin
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while target < len(ids):
        step = windows.stride if windows.stride and found else windows.length
        end = min(target + step, len(ids))
        first = target if windows.stride is None else max(origin, end - windows.length)
        labels = ids[first:end]
        before = ids[first - 1] if start is None else start
        weights = np.zeros(windows.length, np.float32)
        weights[target - first : end - first] = 1.0
        pad = (0, windows.length - len(labels))
        read = np.concatenate([[before], labels[:-1]]).astype(np.int32)
        found.append((np.pad(read, pad), np.pad(labels, pad), weights))
        target = end
    return found


def _sizes(
    text: str,
    ids: np.ndarray,
    cut: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    tokenizer: TextTokenizer,
    start: int | None,
) -> list[float]:
    """Returns the bytes of each window's predicted tokens; together they are those of the text.

    Tokens of a part of a character have no text of their own: shares are as good as it gets.
    """
    own = [
        len(tokenizer.decode(labels[weights > 0].tolist()).encode()) for _, labels, weights in cut
    ]
    total = len(text.encode())
    if start is None and len(ids):  # The first token is not predicted.
        total -= len(tokenizer.decode(ids[:1].tolist()).encode())
    scale = total / max(sum(own), 1)
    return [size * scale for size in own]
