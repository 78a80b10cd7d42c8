"""What a GPU can do at most, measured: the ceilings that kernels are held against."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from qvit.bench.on_device import milliseconds


@dataclass(frozen=True)
class Ceilings:
    """Of one device.

    Attributes:
        gb_per_s: 10^9 bytes that a copy reads and writes in a second.
        bf16_tflops: 10^12 operations of a bfloat16 matrix product; a multiplication and an addition are two.
        int8_tops: of an int8 one with int32 sums (``torch._int_mm``).
    """

    gb_per_s: float
    bf16_tflops: float
    int8_tops: float

    def to_row(self) -> dict[str, float]:
        """The fields of a result file's row."""
        return asdict(self)


def measure_ceilings(device: torch.device, side: int = 8192, copied: int = 1 << 30) -> Ceilings:
    """Measures them, in about a second on a GPU.

    Args:
        device: where.
        side: of the square matrices.
        copied: bytes that are copied; many times the caches.
    """
    return Ceilings(
        gb_per_s=2e-6 * copied / _copying(device, copied),
        bf16_tflops=2e-9 * side**3 / _multiplying_floats(device, side),
        int8_tops=2e-9 * side**3 / _multiplying_codes(device, side),
    )


def _copying(device: torch.device, copied: int) -> float:
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), device)


def _multiplying_floats(device: torch.device, side: int) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return milliseconds(lambda: a @ b, device)


def _multiplying_codes(device: torch.device, side: int) -> float:
    """The second operand lies column by column: the layout of a linear layer's weight, and the fast one."""
    a, b = (torch.randint(-8, 8, (side, side), device=device, dtype=torch.int8) for _ in range(2))
    return milliseconds(lambda: torch._int_mm(a, b.t()), device)
