"""A LayerNorm and the codes behind it: both affine parts in one, and margins that cover float32's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.norm import NormConstants
from qvit.integer.model import IntegerModel
from qvit.integer.ops import LayerNorm, Quantizer
from qvit.quantizers import exact_float
from qvit.spec import ModelSpec, PerChannel, QuantSpec

TO = Constants(torch.device("cpu"))
F32 = np.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"overrides": {"blocks.*.input": {"signed": True}}}])
def test_margins_of_norms_cover_float32s_errors(
    bits: int, changes: dict[str, Any], freeze: Callable[..., IntegerModel]
) -> None:
    """Of the value in codes, and of its place in their range; rows with a large mean, whose moments lose digits, too."""
    (block,) = freeze(spec=ModelSpec.of_bits(bits, **changes)).blocks
    norm, quantizer = block.norm1, block.qkv.input
    found = NormConstants.of(norm, quantizer, TO)
    assert found.gain is not None
    assert found.shift is not None
    assert found.place_gain is not None
    assert found.place_shift is not None
    width = len(norm.weight)
    x = torch.randn(400, width) * torch.rand(400, 1).add(0.1) + torch.linspace(-8, 8, 400)[:, None]
    exact = _codes_of(x, norm, quantizer)
    spec = quantizer.spec
    near = (exact > spec.qn - 1) & (exact < spec.qp + 1)  # others are clamped
    assert near.sum() > 10_000
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    inverse = torch.rsqrt(variance + norm.eps)
    error = ((x - mean) * inverse * found.gain + found.shift).double() - exact
    allowed = found.margin * (1 + 0.25 * mean.abs() * inverse)  # as `src/norm_row.cuh` has it
    assert bool((error.abs() <= allowed)[near].all())
    assert found.margin < 1e-3
    # The other way, of `src/few_norm.cuh`: both moments in one pass.
    square = (x * x).mean(1, keepdim=True)
    inverse = torch.rsqrt(square - mean * mean + norm.eps)
    place = found.place_gain * ((x - mean) * inverse) + found.place_shift
    codes = place.double() * (spec.qp - spec.qn) + spec.qn
    a, slope = found.place_margins
    allowed = a + slope * (square / (square - mean * mean)).double()
    assert bool(((codes - exact).abs() <= allowed)[near].all())
    assert float(allowed.median()) < 0.05


def _codes_of(x: torch.Tensor, norm: LayerNorm, quantizer: Quantizer) -> torch.Tensor:
    """What the reference engine rounds, in float64 from the LayerNorm's float32 on."""
    y = exact_float.layer_norm(x, torch.from_numpy(norm.weight), torch.from_numpy(norm.bias), norm.eps).double()
    offset = 0.0 if quantizer.offset is None else torch.from_numpy(quantizer.offset).double()
    return (y - offset) / torch.from_numpy(quantizer.scale).double()


def test_affine_parts_in_one() -> None:
    norm = LayerNorm(np.array([1, -2], F32), np.array([0.5, 0], F32), 1e-6)
    spec = QuantSpec(4, True, offset=PerChannel())
    found = NormConstants.of(norm, Quantizer(spec, np.array([0.25], F32), np.array([1, -1], F32)), TO)
    assert found.gain is not None
    assert found.gain.tolist() == [4, -8]
    assert found.shift is not None
    assert found.shift.tolist() == [-2, 4]
    assert found.place_gain is not None
    assert found.place_gain.tolist() == [F32(4 / 15), F32(-8 / 15)]
    assert found.place_shift is not None
    assert found.place_shift.tolist() == [F32(6 / 15), F32(12 / 15)]  # of -8 .. 7
    assert found.codes is not None
    assert found.codes.offset[:2].tolist() == [1, -1]
    assert found.eps == 1e-6
    assert (found.weight.tolist(), found.bias.tolist()) == ([1, -2], [0.5, 0])


def test_a_norm_that_gives_floats() -> None:
    found = NormConstants.of(LayerNorm(np.ones(2, F32), np.zeros(2, F32), 1e-5), None, TO)
    assert (found.gain, found.shift, found.codes, found.place_gain, found.place_shift) == (None,) * 5
    assert (found.eps, found.margin, found.place_margins) == (1e-5, 0.0, (0.0, 0.0))
