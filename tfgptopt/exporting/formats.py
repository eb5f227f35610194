"""What a format is, and which one a path's name stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

import keras


class Format(Protocol):
    """A format, as settings that are checked when they are made. A frozen dataclass serves.

    Attributes:
        suffix: What the names of its files end with, such as `".tflite"`; empty for a folder.
    """

    @property
    def suffix(self) -> str: ...

    def write(self, model: keras.Model, target: Path) -> None:
        """Writes a built model, which is not changed, to a path where nothing is.

        Raises:
            ValueError: If the model cannot be exported.
        """


_Class = TypeVar("_Class", bound=type[Format])
_by_suffix: dict[str, type[Format]] = {}


def register_format(cls: _Class) -> _Class:
    """Makes `export` take a format for the paths whose names end with its suffix.

    It can stand above a class. A format that is given to `export` as an object needs none of this.

    Args:
        cls: A class with `suffix` and `write`, made without arguments where a user gives no
            settings.

    Returns:
        The class.

    Raises:
        ValueError: If it is no format, or another one has the suffix.

    Example:

    ```python
    @register_format
    @dataclasses.dataclass(frozen=True)
    class WeightsOnly:
        suffix: ClassVar[str] = ".npz"

        def write(self, model, target):
            with target.open("wb") as file:
                numpy.savez(file, *model.get_weights())

    tfgptopt.export(model, "weights.npz")
    ```
    """
    suffix = getattr(cls, "suffix", None)
    if not isinstance(suffix, str) or not callable(getattr(cls, "write", None)):
        raise ValueError(
            f"A format is a class with a `suffix`, such as '.tflite', and `write(model, target)`. "
            f"Received: {cls!r}"
        )
    if suffix and not suffix.startswith("."):
        raise ValueError(f"A suffix begins with a dot, or is empty. Received: {suffix!r}")
    taken = _by_suffix.setdefault(suffix, cls)
    if taken is not cls:
        raise ValueError(f"Names that end with {suffix!r} are those of {taken.__name__}.")
    return cls


def _suffix_of(path: Path) -> str:
    """Returns the longest suffix of a format that a name ends with."""
    return max((suffix for suffix in _by_suffix if path.name.endswith(suffix)), key=len)


def format_of(path: Path, settings: Mapping[str, object] = MappingProxyType({})) -> Format:
    """Returns the format that a name stands for.

    Args:
        path: The path.
        settings: Settings by name. Defaults to none.

    Raises:
        ValueError: If the format has not such a setting, or it is out of range.
    """
    cls = _by_suffix[_suffix_of(path)]
    known: list[str] = [field.name for field in fields(cls)] if is_dataclass(cls) else []
    for name in settings:
        if name not in known:
            has = f"only {', '.join(known)}" if known else "none"
            raise ValueError(
                f"'{path}' stands for {cls.__name__}, which has no setting `{name}`, {has}."
            )
    return cls(**settings)


def check_format(format: Format, path: Path) -> None:
    """Raises where a path has the name of another format.

    Raises:
        ValueError: If it has, or `format` is no format.
    """
    if isinstance(format, type) or not (hasattr(format, "write") and hasattr(format, "suffix")):
        raise ValueError(
            f"`format` must be settings such as `TFLite()` or `SavedModel()`. Received: {format!r}"
        )
    meant = _suffix_of(path)
    if not path.name.endswith(format.suffix) or (meant and not format.suffix):
        wanted = f"ends with '{format.suffix}'" if format.suffix else "is that of a folder"
        raise ValueError(
            f"The name of a {type(format).__name__} {wanted}. Received: '{path}', which stands for "
            f"{_by_suffix[meant].__name__}."
        )
