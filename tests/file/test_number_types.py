import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfgptopt.file.number_types import (
    INT2,
    INT4,
    INT8,
    NumberType,
    number_type,
    register_number_type,
)
from tfgptopt.quantization.rounding import Grid

NUMBERS = {"int2": INT2, "int4": INT4, "int8": INT8, "int6": NumberType("int6", 6)}


@settings(deadline=None)
@given(st.sampled_from(sorted(NUMBERS)), st.data())
def test_packing_can_be_undone(name, data):
    number = NUMBERS[name]
    values = data.draw(st.lists(st.integers(*number.limits), min_size=1, max_size=33))
    integers = np.asarray(values, np.int8)
    packed = number.pack(integers)
    assert packed.size == -(-len(values) // number.per_byte)
    assert (number.unpack(packed.view(np.uint8), integers.shape) == integers).all()
    # Written out: the first integer stands in the lowest bits.
    for place, value in enumerate(values[: number.per_byte]):
        field = int(packed.view(np.uint8)[0]) >> (number.bits * place) & (2**number.bits - 1)
        assert (field - value) % 2 ** min(number.bits, 8) == 0 or number.per_byte == 1


def test_bytes_of_int4_and_int2():
    assert INT4.pack(np.asarray([1, -1, 7], np.int8)).tolist() == [0xF1, 0x07]
    assert INT2.pack(np.asarray([1, 0, -1, -2, 1], np.int8)).tolist() == [0b10110001, 1]


def test_what_is_not_known_is_named():
    for bits in (3, 16, None, "int8"):
        with pytest.raises(ValueError, match=f"no number type of {bits!r} bits, only of 2"):
            number_type(bits)
    with pytest.raises(ValueError, match="no number type of 3 bits"):
        Grid(3, (0,))
    with pytest.raises(ValueError, match="Integers of type int4 go from -8 to 7"):
        INT4.pack(np.asarray([8], np.int8))
    with pytest.raises(ValueError, match="cannot hold integers of type int6"):
        NUMBERS["int6"].as_tensor_type()
    with pytest.raises(ValueError, match="from 2 to 8"):
        NumberType("int9", 9)


def test_a_number_of_bits_is_taken_once():
    assert register_number_type(INT4) is INT4
    for taken in (NumberType("mine", 4), NumberType("int4", 5)):
        with pytest.raises(ValueError, match="int4, of 4 bits, is in the table already"):
            register_number_type(taken)
