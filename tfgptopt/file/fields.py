"""An object of JSON, read field by field, with errors that name the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

# Plain data, as JSON has it: settings of libraries that nothing here looks into.
Plain = dict[str, object]
_Value = TypeVar("_Value")


class Fields:
    """An object of the JSON, whose fields are checked as they are read.

    Args:
        data: The object.
        where: Its name in the metadata, with a dot behind it; empty for the whole.
        origin: What an error message calls the file.
    """

    def __init__(self, data: object, where: str, origin: str) -> None:
        if not isinstance(data, dict):
            name = where.rstrip(".") or "metadata"
            raise ValueError(f"{origin} is damaged: its {name} is no object.")
        self._data = data
        self._where = where
        self._origin = origin

    def get(self, name: str) -> object:
        """Returns a field, or `None` where it is missing."""
        return self._data.get(name)

    def _there(self, name: str) -> object:
        """Returns a field.

        Raises:
            ValueError: If it is missing.
        """
        if name not in self._data:
            raise ValueError(f"{self._origin} is damaged: its metadata lacks {self._where}{name}.")
        return self._data[name]

    def wrong(self, name: str, expected: str) -> ValueError:
        """Returns the error of a field that cannot be."""
        value = repr(self._data.get(name))[:80]
        return ValueError(
            f"{self._origin} is damaged: {self._where}{name} in its metadata is {value}, and "
            f"should be {expected}."
        )

    def section(self, name: str) -> Fields:
        """Returns a field that has fields."""
        return Fields(self._there(name), f"{self._where}{name}.", self._origin)

    def one(self, name: str, kind: type[_Value]) -> _Value:
        """Returns a field of a type.

        Raises:
            ValueError: If it is missing or of another type.
        """
        value = self._there(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(name, f"of type {kind.__name__}")
        return value

    def integer(self, name: str, least: int = 0) -> int:
        """Returns an integer that is not too small.

        Raises:
            ValueError: If it is missing, too small or no integer.
        """
        value = self.one(name, int)
        if value < least:
            raise self.wrong(name, f"at least {least}")
        return value

    def maybe(self, name: str, read: Callable[[str], _Value]) -> _Value | None:
        """Returns a field that may be null."""
        return None if self._there(name) is None else read(name)

    def plain(self, name: str) -> Plain:
        """Returns an object as it is."""
        return dict(self.section(name)._data)

    def names_to(self, kind: type[_Value]) -> dict[str, _Value]:
        """Returns all fields, which are of one type."""
        return {name: self.one(name, kind) for name in self._data}

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns a list of integers, which is empty where the field is missing.

        Raises:
            ValueError: If it is something else.
        """
        return self._all(name, int, "a list of integers")

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns a list of texts, which is empty where the field is missing.

        Raises:
            ValueError: If it is something else.
        """
        return self._all(name, str, "a list of texts")

    def _all(self, name: str, kind: type[_Value], expected: str) -> tuple[_Value, ...]:
        found = self.get(name)
        if found is None:
            return ()
        # By type: in Python, true and false are integers.
        if not isinstance(found, list) or not all(type(one) is kind for one in found):
            raise self.wrong(name, expected)
        return tuple(found)
