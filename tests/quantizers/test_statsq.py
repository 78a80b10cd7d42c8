"""StatsQ: steps, codes, values and gradients against the formula of the method, one weight at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qvit.errors import SpecError
from qvit.quantizers.statsq import StatsQuantizer, statistical_step
from qvit.spec import Dims, HalfStep, Operand, PerChannel, PerTensor, QuantSpec


def quantizer(bits: int, shape: tuple[int, int], scale: object = PerChannel()) -> StatsQuantizer:
    return StatsQuantizer(QuantSpec(bits, True, scale, HalfStep(), Operand.WEIGHT), Dims(shape[1], shape[0]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [PerChannel(), PerTensor()])
@pytest.mark.parametrize("shape", [(7, 13), (1, 1), (33, 5)])
def test_the_formula_of_the_method(bits: int, scale: object, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).requires_grad_()
    got = quantizer(bits, shape, scale)(weight)
    n = 2 ** (bits - 1)
    values = weight.detach().double().numpy()
    for m in range(shape[0]):
        s = 2 * np.abs(values if isinstance(scale, PerTensor) else values[m]).mean()
        step = float(np.float16(s / n))
        assert float(got.scale.reshape(-1)[m if isinstance(scale, PerChannel) else 0]) == step
        for k in range(shape[1]):
            ratio = values[m, k] / step - 0.5
            code = min(max(math.floor(ratio + 0.5), -n), n - 1)
            if abs(ratio - math.floor(ratio) - 0.5) > 1e-5:  # elsewhere float32 may fall to the other side
                assert got.codes[m, k].item() == code
            assert got.value[m, k].item() == pytest.approx(step * (got.codes[m, k].item() + 0.5), rel=1e-6)
    assert got.codes.min() >= -n
    assert got.codes.max() <= n - 1
    assert not got.codes.requires_grad


def test_the_step_is_one_that_float16_holds_and_never_leaves_its_range() -> None:
    weight = torch.stack([torch.zeros(8), torch.full((8,), 1e-7), torch.randn(8), torch.full((8,), 3e8)])
    step = statistical_step(weight, quantizer(2, (4, 8)).spec)
    assert torch.equal(step, step.half().float())
    assert step[0].item() == step[1].item() == 2.0**-14
    assert step[3].item() == 65504.0
    got = quantizer(2, (4, 8))(weight)
    assert got.value.isfinite().all()
    assert got.codes[3].unique().tolist() == [1.0]


def test_gradients_pass_straight_through_everywhere() -> None:
    weight = torch.linspace(-3, 3, 40).pow(3).reshape(2, 20).requires_grad_()
    got = quantizer(2, (2, 20))(weight)
    assert (got.codes == -2).any()
    assert (weight.detach().abs() > 2 * got.scale).any(), "nothing was clamped"
    upstream = torch.randn(2, 20)
    got.value.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_the_step_follows_the_weights() -> None:
    q, weight = quantizer(3, (4, 16)), torch.randn(4, 16)
    assert torch.equal(q(weight).codes, q(2 * weight).codes)
    assert torch.equal(2 * q(weight).scale, q(2 * weight).scale)
    assert not list(q.parameters())
    assert not q.state_dict()


def test_bfloat16_autocast_keeps_codes_exact_and_gradients_float32() -> None:
    q, weight = quantizer(8, (4, 64)), torch.randn(4, 64, requires_grad=True)
    plain = q(weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = q(weight)
    assert cast.value.dtype == cast.codes.dtype == torch.bfloat16
    assert torch.equal(cast.codes.float(), plain.codes)
    odd = 2 * cast.codes + 1
    assert torch.equal(odd.float(), 2 * plain.codes + 1)
    cast.value.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(2, True, PerChannel(), None, Operand.WEIGHT), QuantSpec(2, True, PerTensor(), HalfStep(), Operand.QUERY)],
)
def test_other_specs_are_refused(spec: QuantSpec) -> None:
    with pytest.raises(SpecError, match="odd half steps"):
        StatsQuantizer(spec, Dims(8, 4))
