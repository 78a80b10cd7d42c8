"""Dense packing of b-bit codes into bytes, 2 <= b <= 8; no code is padded, 3 bits really take 3.

Code i occupies bits [b i, b i + b) of one little-endian bit stream; bit j of the stream is bit j mod 8 of byte j div 8. Signed
codes are stored in two's complement of b bits. The last byte is filled up with zeros.

    b = 2    byte 0: d d c c b b a a           (most significant bit left; a is code 0, b code 1, ..)
    b = 3    byte 0: c c b b b a a a           byte 1: f e e e d d d c        byte 2: h h h g g g f f
    b = 4    byte 0: b b b b a a a a
    b = 8    byte 0: a a a a a a a a
"""

from __future__ import annotations

import math

import numpy as np

from qvit.errors import FileFormatError


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes, integers of any shape, in C order -> uint8 [packed_size].

    Raises:
        ValueError: a code does not fit into ``bits`` bits, signed or unsigned.
    """
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.int16)
    if flat.size and (flat.min() < -(1 << (bits - 1)) or flat.max() >= 1 << bits):
        raise ValueError(f"codes from {flat.min()} to {flat.max()} do not fit into {bits} bits")
    unsigned = (flat & ((1 << bits) - 1)).astype(np.uint8)
    planes = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack(packed: np.ndarray, count: int, bits: int, signed: bool) -> np.ndarray:
    """uint8 [packed_size] -> the ``count`` codes, int8 if signed, else uint8.

    Raises:
        FileFormatError: ``packed`` is not of the size that the count calls for.
    """
    if packed.dtype != np.uint8 or packed.shape != (packed_size(count, bits),):
        raise FileFormatError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, not {packed.dtype}{list(packed.shape)}: "
            "the file is damaged."
        )
    if bits == 8:
        return packed.view(np.int8) if signed else packed.copy()
    together = 8 // math.gcd(bits, 8)  # codes that fill whole bytes
    size = together * bits // 8
    groups = np.zeros((-(-packed.size // size), 1 if size == 1 else 8), np.uint8)
    whole = packed.size // size
    groups[:whole, :size] = packed[: whole * size].reshape(whole, size)
    groups[whole:, : packed.size - whole * size] = packed[whole * size :]
    numbers = groups.view(np.uint8 if size == 1 else "<u8")[:, 0]
    codes = np.empty((len(numbers), together), np.uint8)
    for i in range(together):
        codes[:, i] = numbers >> (bits * i)  # and what is above: the next lines take it away
    flat = codes.reshape(-1)[:count]
    if not signed:
        return flat & np.uint8((1 << bits) - 1)
    # Moves the sign bit to the top and back, which repeats it.
    flat <<= 8 - bits
    return flat.view(np.int8) >> (8 - bits)
