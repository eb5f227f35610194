"""The integers that a file can hold, in one table: how many bits, how they are packed, and what
TFLite calls them. Whoever meets a number of bits asks here, and an unknown one is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
from ai_edge_litert import schema_py_generated as schema

# The versions of FULLY_CONNECTED that compute with int4 and int8, with int2, and with int4 in
# blocks; LiteRT has no product of int2 in blocks with inputs that are rounded.
_PRODUCT, _PRODUCT_OF_INT2, _PRODUCT_OF_BLOCKS = 9, 14, 13


class _Arithmetic(Protocol):
    """What numpy and TensorFlow have in common, as far as unpacking needs it."""

    def __floordiv__(self, other: int, /) -> Self: ...
    def __and__(self, other: int, /) -> Self: ...
    def __xor__(self, other: int, /) -> Self: ...
    def __sub__(self, other: int, /) -> Self: ...


_Array = TypeVar("_Array", bound=_Arithmetic)


@dataclass(frozen=True)
class NumberType:
    """Signed integers of a number of bits. `register_number_type` adds one to the table.

    Those whose bits divide 8 are packed, several to a byte, the first in the lowest bits, as LiteRT
    reads them; any others take a byte each.

    Args:
        name: What it is called, such as `"int4"`.
        bits: int, from 2 to 8.
        tensor_type: `TensorType` of the TFLite schema, or `None` if TFLite cannot hold it. One that
            takes a byte can be held as `INT8`. Defaults to `None`.
        product_version: int. Least version of `FULLY_CONNECTED` that computes with it. Defaults to
            `9`.
        blocks_version: int. The same with scales of blocks, or `None` if LiteRT cannot. Defaults
            to `None`.

    Raises:
        ValueError: If `bits` is out of range.
    """

    name: str
    bits: int
    tensor_type: int | None = None
    product_version: int = _PRODUCT
    blocks_version: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"`bits` must be an int from 2 to 8. Received: bits={self.bits!r}")

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer: -8 and 7 for 4 bits."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def limit(self) -> int:
        """The largest integer of a symmetric grid: 127 for 8 bits, 7 for 4."""
        return self.limits[1]

    @property
    def per_byte(self) -> int:
        """How many share a byte."""
        return 8 // self.bits if 8 % self.bits == 0 else 1

    def pack(self, integers: np.ndarray) -> np.ndarray:
        """Returns integers as a file holds them.

        Args:
            integers: int8 array.

        Returns:
            The array itself where each takes a byte, as they stand in memory; else a uint8 vector.

        Raises:
            ValueError: If an integer is out of range.
        """
        low, high = self.limits
        if self.bits < 8 and integers.size and (integers.min() < low or integers.max() > high):
            raise ValueError(
                f"Integers of type {self.name} go from {low} to {high}. Received: from "
                f"{integers.min()} to {integers.max()}"
            )
        if self.per_byte == 1:
            return np.ascontiguousarray(integers)
        flat = integers.reshape(-1).astype(np.uint8) & np.uint8(2**self.bits - 1)
        missing = -flat.size % self.per_byte
        if missing:
            flat = np.append(flat, np.zeros(missing, np.uint8))
        packed = flat[0 :: self.per_byte].copy()
        for place in range(1, self.per_byte):
            packed |= flat[place :: self.per_byte] << np.uint8(self.bits * place)
        return packed

    def places(self, packed: _Array) -> list[_Array]:
        """Returns the integers that stand in each place of a byte, as arrays of all bytes.

        Args:
            packed: An int32 array of numpy or tensor of TensorFlow, with bytes from 0 to 255.
        """
        mask, sign = 2**self.bits - 1, 2 ** (self.bits - 1)
        shifted = (packed // 2 ** (self.bits * place) for place in range(self.per_byte))
        return [((one & mask) ^ sign) - sign for one in shifted]

    def unpack(self, packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Returns what `pack` made as an int8 array of a shape."""
        if self.per_byte == 1:
            return packed.view(np.int8).reshape(shape)
        places = self.places(packed.astype(np.int32))
        flat = np.stack(places, axis=-1).reshape(-1)[: int(np.prod(shape))]
        return flat.astype(np.int8).reshape(shape)

    def as_tensor_type(self) -> int:
        """Returns what the TFLite schema calls it.

        Raises:
            ValueError: If TFLite cannot hold it.
        """
        if self.tensor_type is None:
            raise ValueError(
                f"A TFLite file cannot hold integers of type {self.name}. Export a SavedModel "
                "instead: give a folder as path."
            )
        return self.tensor_type


_by_bits: dict[int, NumberType] = {}


def register_number_type(number: NumberType) -> NumberType:
    """Adds a number type to the table, so that weights can be rounded to it and exported.

    Args:
        number: The number type.

    Returns:
        It.

    Raises:
        ValueError: If another one has its number of bits, or its name.

    Example:

    ```python
    INT6 = register_number_type(NumberType("int6", 6, schema.TensorType.INT8))
    ```
    """
    for known in _by_bits.values():
        if known != number and (known.bits == number.bits or known.name == number.name):
            raise ValueError(
                f"{known.name}, of {known.bits} bits, is in the table already. Received: {number!r}"
            )
    return _by_bits.setdefault(number.bits, number)


def number_type(bits: int) -> NumberType:
    """Returns the number type of a number of bits.

    Raises:
        ValueError: If there is none.
    """
    try:
        return _by_bits[bits]
    except (KeyError, TypeError):
        known = ", ".join(f"{bits} ({_by_bits[bits].name})" for bits in sorted(_by_bits))
        raise ValueError(
            f"There is no number type of {bits!r} bits, only of {known}. Add one with "
            "`register_number_type`."
        ) from None


INT2 = register_number_type(NumberType("int2", 2, schema.TensorType.INT2, _PRODUCT_OF_INT2))
INT4 = register_number_type(
    NumberType("int4", 4, schema.TensorType.INT4, _PRODUCT, _PRODUCT_OF_BLOCKS)
)
INT8 = register_number_type(NumberType("int8", 8, schema.TensorType.INT8))
