"""Integer matrix products in PyTorch that are fast on every device and never round.

PyTorch has no fast int32 matmul. Integers up to 2^24 (float32) or 2^53 (float64) are exact in floating point, though, so a
float GEMM over codes gives the int32 sums bit for bit as long as no partial sum can pass that bound, which follows from the
code ranges and the length of the sum alone.
"""

from __future__ import annotations

import torch

_FLOAT32_EXACT = 1 << 24
_FLOAT64_EXACT = 1 << 53


def exact_dtype(length: int, max_a: int, max_b: int) -> torch.dtype:
    """The cheapest float type in which a sum of ``length`` products of codes ``|a| <= max_a``, ``|b| <= max_b`` is exact."""
    bound = length * max_a * max_b
    if bound < _FLOAT32_EXACT:
        return torch.float32
    assert bound < _FLOAT64_EXACT
    return torch.float64


def exact_matmul(a: torch.Tensor, b: torch.Tensor, max_a: int, max_b: int) -> torch.Tensor:
    """``a @ b`` of integer codes, exact.

    Args:
        a: codes [.., N, K], any dtype that holds them.
        b: codes [.., K, M].
        max_a, max_b: the largest magnitudes that the codes can have.

    Returns:
        The sums [.., N, M] in float32, or in float64 where float32 could not hold them (`exact_dtype`).
    """
    dtype = exact_dtype(a.shape[-1], max_a, max_b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a.to(dtype), b.to(dtype))
