"""Float matrix products of codes against int64 ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvit.quantizers.exact_matmul import exact_dtype, exact_matmul


@given(
    bits_a=st.integers(2, 8),
    bits_b=st.integers(2, 8),
    length=st.sampled_from([1, 2, 63, 64, 197, 384, 1023, 1536, 3072]),
    signed=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_equals_int64(bits_a: int, bits_b: int, length: int, signed: bool, extreme: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(1 << (bits_a - 1)), (1 << (bits_a - 1)) - 1) if signed else (0, (1 << bits_a) - 1)
    low_b, high_b = -(1 << (bits_b - 1)), (1 << (bits_b - 1)) - 1
    a = torch.randint(low, high + 1, (2, 3, length), generator=generator)
    b = torch.randint(low_b, high_b + 1, (2, length, 5), generator=generator)
    if extreme:
        a, b = torch.full_like(a, max(low, high, key=abs)), torch.full_like(b, low_b)
    max_a, max_b = max(-low, high), -low_b
    for dtype in (torch.float32, torch.int16, torch.bfloat16):
        got = exact_matmul(a.to(dtype), b.to(dtype), max_a, max_b)
        assert got.dtype == exact_dtype(length, max_a, max_b)
        assert torch.equal(got.long(), a @ b)
        assert torch.equal(got, got.round())


def test_the_boundary_between_float32_and_float64() -> None:
    """length * max_a * max_b = 2^24 - 255 * 128 fits float32; one more product reaches past it."""
    length = (1 << 24) // (255 * 128)
    assert length * 255 * 128 < 1 << 24 <= (length + 1) * 255 * 128
    assert exact_dtype(length, 255, 128) is torch.float32
    assert exact_dtype(length + 1, 255, 128) is torch.float64
    assert exact_dtype(1 << 10, 1 << 7, 1 << 7) is torch.float64  # exactly 2^24
    assert exact_dtype((1 << 10) - 1, 1 << 7, 1 << 7) is torch.float32


@pytest.mark.parametrize("length", [513, 514, 515, 1 << 16])
def test_odd_sums_around_and_beyond_2_to_the_24(length: int) -> None:
    """Sums of odd products: float32 would round every second one above 2^24."""
    a = torch.full((1, length), 255)
    b = torch.full((length, 2), -127)
    b[:, 1] = 127
    b[-1, 1] = 126
    got = exact_matmul(a.float(), b.float(), 255, 128)
    assert torch.equal(got.long(), a @ b)
    if length == 1 << 16:  # the test can fail: float32 does not hold this sum
        assert not torch.equal((a.float() @ b.float()).long(), a @ b)


def test_autocast_and_reduced_precision_do_not_reach_inside() -> None:
    a, b = torch.randint(0, 256, (7, 301)).float(), torch.randint(-128, 128, (301, 9)).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = exact_matmul(a, b, 255, 128)
    assert got.dtype == torch.float32
    assert torch.equal(got.long(), a.long() @ b.long())
