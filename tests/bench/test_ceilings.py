"""The measured ceilings are rates in the units that they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qvit.bench.ceilings
from qvit.bench.ceilings import measure_ceilings


def test_units(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[object] = []

    def in_two_milliseconds(call: Callable[[], object], device: torch.device) -> float:
        results.append(call())
        return 2.0

    monkeypatch.setattr(qvit.bench.ceilings, "milliseconds", in_two_milliseconds)
    ceilings = measure_ceilings(torch.device("cpu"), side=64, copied=4000)
    assert ceilings.gb_per_s == pytest.approx(2 * 4000 / 2e-3 / 1e9)
    assert ceilings.bf16_tflops == ceilings.int8_tops == pytest.approx(2 * 64**3 / 2e-3 / 1e12)
    copy, floats, codes = results
    assert isinstance(copy, torch.Tensor)
    assert isinstance(floats, torch.Tensor)
    assert isinstance(codes, torch.Tensor)
    assert (copy.sum(dtype=torch.int64), copy.element_size()) == (4000, 1)
    assert (floats.dtype, floats.shape) == (torch.bfloat16, (64, 64))
    assert (codes.dtype, codes.shape) == (torch.int32, (64, 64))


def test_measured_here() -> None:
    row = measure_ceilings(torch.device("cpu"), side=32, copied=1 << 16).to_row()
    assert set(row) == {"gb_per_s", "bf16_tflops", "int8_tops"}
    assert min(row.values()) > 0
