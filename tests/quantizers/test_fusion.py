"""Fused kernels compute what the plain functions compute, gradients included, in whichever thread they run."""

import pytest
import torch

from qvit.quantizers.fusion import fused, fusible
from qvit.quantizers.lsq import lsq_quantize
from qvit.spec import HalfStep, Operand, PerChannel, PerHead, PerTensor, QuantSpec

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def test_runs_plain_outside_of_fused():
    calls = []

    @fusible
    def double(x):
        calls.append(torch.compiler.is_compiling())
        return x * 2

    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    with fused(False):
        double(torch.ones(3))
    assert calls == [False, False]


def test_fused_is_restored_after_an_error():
    @fusible
    def compiling(x):
        return x.new_tensor(float(torch.compiler.is_compiling()))

    with pytest.raises(RuntimeError), fused():
        raise RuntimeError
    assert compiling(torch.ones(1)) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spec", "shape", "scale_shape", "offset_shape"),
    [
        (QuantSpec(2, False, PerTensor(), PerChannel(), Operand.INPUT), (3, 17, 23), (1,), (23,)),
        (QuantSpec(3, True, PerHead(), HalfStep(), Operand.QUERY), (2, 3, 17, 7), (3, 1, 1), None),
    ],
    ids=["input", "query"],
)
def test_fused_quantizer_equals_the_plain_one(device, spec, shape, scale_shape, offset_shape):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator)
    scale = torch.rand(scale_shape, generator=generator) * 0.5 + 0.3
    offset = None if offset_shape is None else torch.randn(offset_shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    results = []
    for enabled in (False, True):
        leaves = [t.to(device).clone().requires_grad_() for t in (x, scale, offset) if t is not None]
        with fused(enabled), torch.autocast(device, torch.bfloat16):
            out = lsq_quantize(leaves[0], leaves[1], leaves[2] if offset is not None else None, spec, grad_factor=0.1)
            (out.value.float() * upstream.to(device)).sum().backward()
        results.append((out.codes, out.value, *[leaf.grad for leaf in leaves]))
    plain, compiled = results
    # A value within a rounding error of a threshold may fall on either side of it.
    assert (plain[0] != compiled[0]).float().mean() < 1e-3
    for a, b in zip(plain[1:], compiled[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
