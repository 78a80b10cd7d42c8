"""Packing against a bit stream that is written out in Python, and against bytes worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvit.errors import FileFormatError
from qvit.integer.packing import pack, packed_size, unpack


@st.composite
def _codes(draw: st.DrawFn) -> tuple[np.ndarray, int, bool]:
    bits, signed = draw(st.integers(2, 8)), draw(st.booleans())
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    values = draw(st.lists(st.integers(low, high), max_size=200))
    return np.asarray(values, dtype=np.int16), bits, signed


def _stream(codes: np.ndarray, bits: int) -> bytes:
    """The documented layout, as one large integer."""
    number = sum((int(code) & ((1 << bits) - 1)) << (bits * i) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@given(_codes())
def test_round_trip_and_layout(case: tuple[np.ndarray, int, bool]) -> None:
    codes, bits, signed = case
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == _stream(codes, bits)
    back = unpack(packed, len(codes), bits, signed)
    assert back.dtype == (np.int8 if signed else np.uint8)
    assert back.tolist() == codes.tolist()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_every_length_up_to_200(bits: int, signed: bool) -> None:
    rng = np.random.default_rng(bits)
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    codes = rng.integers(low, high, 200).astype(np.int16)
    for length in range(201):
        packed = pack(codes[:length], bits)
        assert packed.shape == (packed_size(length, bits),) == (-(-length * bits // 8),)
        assert (unpack(packed, length, bits, signed) == codes[:length]).all()


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [0, 1, 2, 3, 1], [0b11100100, 0b00000001]),
        (2, [-2, -1, 0, 1], [0b01001110]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]),
        (3, [-4, 3, -1], [0b11011100, 0b00000001]),
        (4, [0x1, 0xF, 0x8], [0xF1, 0x08]),
        (4, [-8, 7], [0x78]),
        (5, [0b10001, 0b01110], [0b11010001, 0b00000001]),
        (8, [0, 127, 255], [0, 127, 255]),
        (8, [-128, -1], [0x80, 0xFF]),
    ],
)
def test_drawn_bytes(bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack(np.asarray(codes), bits).tolist() == expected


def test_pack_flattens_in_c_order() -> None:
    codes = np.arange(6).reshape(2, 3)
    assert (pack(codes, 4) == pack(codes.reshape(-1), 4)).all()
    assert (pack(codes.T, 4) == pack(np.asarray([0, 3, 1, 4, 2, 5]), 4)).all()


@pytest.mark.parametrize(("bits", "code"), [(2, 4), (2, -3), (4, 16), (4, -9), (8, 256), (8, -129)])
def test_codes_that_do_not_fit_are_refused(bits: int, code: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.asarray([0, code]), bits)


@pytest.mark.parametrize(
    "packed", [np.zeros(2, np.uint8), np.zeros(4, np.uint8), np.zeros(3, np.int8), np.zeros((3, 1), np.uint8)]
)
def test_wrong_size_or_type_is_refused(packed: np.ndarray) -> None:
    with pytest.raises(FileFormatError, match="8 codes of 3 bits take 3 bytes"):
        unpack(packed, 8, 3, signed=True)


def test_unpacked_eight_bit_codes_can_be_written_to() -> None:
    packed = pack(np.asarray([1, 2]), 8)
    unpack(packed, 2, 8, signed=False)[0] = 9
    assert packed.tolist() == [1, 2]
