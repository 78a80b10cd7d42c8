"""Products on codes against float64 products of the dequantized values, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from qvit.layers.code_matmul import code_linear, code_scores, code_values, folded_bias
from qvit.quantizers.lsq import LSQQuantizer, Quantized
from qvit.spec import Dims, HalfStep, Operand, PerChannel, PerGroup, PerHead, PerTensor, PerToken, QuantSpec


def quantized(x: torch.Tensor, spec: QuantSpec, dims: Dims) -> Quantized:
    """x through a quantizer with random scales and offsets; its value is a leaf, so that gradients stop there."""
    quantizer = LSQQuantizer(spec, dims)
    span = (x.amax() - x.amin()) / (spec.qp - spec.qn)
    scale = span * (0.5 + torch.rand(spec.scale_shape(dims)))
    offset_shape = spec.offset_shape(dims)
    quantizer.set_parameters(scale, None if offset_shape is None else torch.randn(offset_shape))
    with torch.no_grad():
        got = quantizer(x)
    return got._replace(value=got.value.clone().requires_grad_())


def exact_value(q: Quantized) -> torch.Tensor:
    """What codes, scale and offset stand for, in float64."""
    scale = q.scale.double()
    if isinstance(q.spec.scale, PerGroup):
        scale = torch.cat(
            [scale[..., g : g + 1].expand(*scale.shape[:-1], q.spec.scale.size) for g in range(scale.shape[-1])], -1
        )
    offset = scale / 2 if isinstance(q.spec.offset, HalfStep) else 0.0 if q.offset is None else q.offset.double()
    return q.codes.double() * scale + offset


def close(got: torch.Tensor, want: torch.Tensor, digits: float = 2e-6) -> None:
    """Within ``digits`` of the largest magnitude."""
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= digits * want.abs().max().clamp_min(1e-6)


def check_gradients(out: torch.Tensor, leaves: list[torch.Tensor], plain, arguments: list[torch.Tensor]) -> None:
    """The gradients of ``out`` are those of ``plain`` at ``arguments`` in float64."""
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, upstream)
    doubles = [a.detach().double().requires_grad_() for a in arguments]
    want = torch.autograd.grad(plain(*doubles), doubles, upstream.double())
    for g, w in zip(got, want, strict=True):
        close(g, w)


WEIGHTS = [PerTensor(), PerChannel(), PerGroup(64), PerGroup(128)]
INPUTS = list(itertools.product([PerTensor(), PerToken(), PerGroup(64), PerGroup(128)], [None, PerTensor(), PerChannel()]))
LINEAR = [
    (w, x, offset)
    for w, (x, offset) in itertools.product(WEIGHTS, INPUTS)
    if not (isinstance(w, PerGroup) and isinstance(x, PerGroup) and w != x)
]


@pytest.mark.parametrize(("weight", "scale", "offset"), LINEAR)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(weight, scale, offset, has_bias: bool) -> None:
    for bits, signed, (batch, n, k, m) in [(2, False, (2, 5, 128, 7)), (4, True, (1, 1, 256, 3)), (8, False, (3, 17, 128, 1))]:
        x = quantized(torch.randn(batch, n, k), QuantSpec(bits, signed, scale, offset, Operand.INPUT), Dims(k, n))
        w = quantized(torch.randn(m, k), QuantSpec(bits, True, weight, None, Operand.WEIGHT), Dims(k, m))
        bias = torch.randn(m, requires_grad=True) if has_bias else None
        y = code_linear(x, w, bias)
        want = exact_value(x) @ exact_value(w).t() + (bias.detach().double() if has_bias else 0)
        assert y.dtype == torch.float32
        close(y, want)
        leaves = [x.value, w.value] + ([bias] if has_bias else [])

        def plain(a, b, c=0):  # type: ignore[no-untyped-def]
            return a @ b.t() + c

        check_gradients(y, leaves, plain, leaves)


@pytest.mark.parametrize("scale", [PerTensor(), PerChannel()])
@pytest.mark.parametrize(("x_scale", "offset"), INPUTS)
def test_linear_with_weights_at_odd_half_steps(scale, x_scale, offset) -> None:
    for bits in (2, 4, 8):
        x = quantized(torch.randn(2, 5, 128), QuantSpec(bits, False, x_scale, offset), Dims(128, 5))
        w = quantized(torch.randn(7, 128), QuantSpec(bits, True, scale, HalfStep(), Operand.WEIGHT), Dims(128, 7))
        bias = torch.randn(7, requires_grad=True)
        y = code_linear(x, w, bias)
        close(y, exact_value(x) @ exact_value(w).t() + bias.double(), 1e-5)
        check_gradients(y, [x.value, w.value], lambda a, b: a @ b.t(), [x.value, w.value])


@pytest.mark.parametrize("offset", [None, PerTensor(), PerChannel()])
def test_linear_without_tokens(offset) -> None:
    """As in a classification head: [B, K]."""
    x = quantized(torch.randn(3, 50), QuantSpec(8, False, PerTensor(), offset), Dims(50))
    w = quantized(torch.randn(10, 50), QuantSpec(8, True, PerChannel(), None, Operand.WEIGHT), Dims(50, 10))
    y = code_linear(x, w, None)
    close(y, exact_value(x) @ exact_value(w).t())
    check_gradients(y, [x.value, w.value], lambda a, b: a @ b.t(), [x.value, w.value])


def test_linear_sums_are_exact_beyond_float32() -> None:
    """K so long that float32 sums of 8-bit codes would round: the integers still come out."""
    k = 4096
    spec, wspec = QuantSpec(8, False), QuantSpec(8, True, PerTensor(), None, Operand.WEIGHT)
    one = torch.ones(1)
    x_codes, w_codes = torch.full((1, 1, k), 255.0), torch.full((2, k), 127.0)
    w_codes[1, 0] = 126.0
    y = code_linear(Quantized(x_codes, x_codes, one, None, spec), Quantized(w_codes, w_codes, one, None, wspec), None)
    sums = (x_codes.double() @ w_codes.double().t()).float()  # one rounding, at the end
    assert torch.equal(y, sums)
    assert y[0, 0, 0] != y[0, 0, 1]
    half = QuantSpec(8, True, PerTensor(), HalfStep(), Operand.WEIGHT)
    y = code_linear(Quantized(x_codes, x_codes, one, None, spec), Quantized(w_codes, w_codes, one, one / 2, half), None)
    assert torch.equal(y, (x_codes.double() @ (w_codes.double() + 0.5).t()).float())


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("offset", [PerTensor(), PerChannel()])
def test_folded_bias(weight, offset) -> None:
    x = quantized(torch.randn(2, 5, 128), QuantSpec(4, False, PerTensor(), offset), Dims(128, 5))
    w = quantized(torch.randn(7, 128), QuantSpec(4, True, weight, None, Operand.WEIGHT), Dims(128, 7))
    bias = torch.randn(7)
    want = [
        bias[m].item() + sum(exact_value(w)[m, k].item() * x.offset.expand(128)[k].item() for k in range(128)) for m in range(7)
    ]
    torch.testing.assert_close(folded_bias(w, x.offset, bias), torch.tensor(want), rtol=1e-6, atol=1e-6)
    if not isinstance(weight, PerGroup):
        w = quantized(torch.randn(7, 128), QuantSpec(4, True, weight, HalfStep(), Operand.WEIGHT), Dims(128, 7))
        want = exact_value(w) @ x.offset.double().expand(128) + bias.double()
        torch.testing.assert_close(folded_bias(w, x.offset, bias), want.float(), rtol=1e-6, atol=1e-6)
    assert folded_bias(w, None, bias) is bias
    assert folded_bias(w, None, None) is None


def row_free(scores: torch.Tensor) -> torch.Tensor:
    """Scores [.., N, N] without what softmax cancels: the mean of each row."""
    return scores - scores.mean(-1, keepdim=True)


Q_SPECS = list(itertools.product([PerTensor(), PerHead(), PerToken()], [None, HalfStep(), PerHead(), PerChannel()]))
K_SPECS = [(s, o) for s, o in Q_SPECS if not (isinstance(s, PerToken) and isinstance(o, HalfStep))]


@pytest.mark.parametrize(("q_scale", "q_offset"), Q_SPECS)
@pytest.mark.parametrize(("k_scale", "k_offset"), K_SPECS)
def test_scores(q_scale, q_offset, k_scale, k_offset) -> None:
    b, h, n, d = 2, 3, 11, 7
    factor = d**-0.5
    for bits, signed in [(2, True), (4, False)]:
        q = quantized(torch.randn(b, h, n, d), QuantSpec(bits, signed, q_scale, q_offset, Operand.QUERY), Dims(d, n, h))
        k = quantized(torch.randn(b, h, n, d), QuantSpec(bits, signed, k_scale, k_offset, Operand.KEY), Dims(d, n, h))
        scores = code_scores(q, k, factor)
        want = exact_value(q) @ exact_value(k).transpose(-2, -1) * factor
        assert scores.dtype == torch.float32
        close(row_free(scores), row_free(want), 1e-5)
        torch.testing.assert_close(scores.softmax(-1).double(), want.softmax(-1), rtol=1e-4, atol=1e-6)
        check_gradients(scores, [q.value, k.value], lambda a, c: a @ c.transpose(-2, -1) * factor, [q.value, k.value])


P_SCALES = [PerTensor(), PerHead(), PerToken()]
V_SPECS = list(itertools.product([PerTensor(), PerHead(), PerChannel()], [None, HalfStep(), PerHead(), PerChannel()]))


@pytest.mark.parametrize("p_scale", P_SCALES)
@pytest.mark.parametrize(("v_scale", "v_offset"), V_SPECS)
def test_values(p_scale, v_scale, v_offset) -> None:
    b, h, n, d = 2, 3, 13, 5
    for bits, signed in [(2, True), (4, False)]:
        softmax = (2 * torch.randn(b, h, n, n)).softmax(-1)
        p = quantized(softmax, QuantSpec(bits, False, p_scale, None, Operand.MAP), Dims(n, n, h))
        v = quantized(torch.randn(b, h, n, d), QuantSpec(bits, signed, v_scale, v_offset, Operand.VALUE), Dims(d, n, h))
        out = code_values(p, v)
        close(out, exact_value(p) @ exact_value(v))
        check_gradients(out, [p.value, v.value], torch.matmul, [p.value, v.value])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 197, 64), (1, 6, 3, 33)])
def test_attention_of_odd_shapes(shape: tuple[int, ...]) -> None:
    b, h, n, d = shape
    half = QuantSpec(3, True, PerHead(), HalfStep(), Operand.QUERY)
    q, k = quantized(torch.randn(shape), half, Dims(d, n, h)), quantized(torch.randn(shape), half, Dims(d, n, h))
    close(row_free(code_scores(q, k, d**-0.5)), row_free(exact_value(q) @ exact_value(k).transpose(-2, -1) * d**-0.5), 1e-5)
    p = quantized(torch.rand(b, h, n, n), QuantSpec(3, False, PerHead(), None, Operand.MAP), Dims(n, n, h))
    v = quantized(torch.randn(shape), QuantSpec(3, True, PerChannel(), PerChannel(), Operand.VALUE), Dims(d, n, h))
    close(code_values(p, v), exact_value(p) @ exact_value(v))


def test_bfloat16_autocast_rounds_only_sums_and_results() -> None:
    quantizers = (
        LSQQuantizer(QuantSpec(4, False, PerTensor(), PerChannel()), Dims(96, 9)),
        LSQQuantizer(QuantSpec(4, True, PerChannel(), None, Operand.WEIGHT), Dims(96, 20)),
    )
    quantizers[0].set_parameters(torch.tensor([0.2]), torch.randn(96) / 5 - 1)
    quantizers[1].set_parameters(torch.rand(20) / 10 + 0.1)
    x, weight, bias = torch.randn(4, 9, 96), torch.randn(20, 96), torch.randn(20)
    plain = code_linear(quantizers[0](x), quantizers[1](weight), bias)
    leaf = weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast = code_linear(quantizers[0](x), quantizers[1](leaf), bias)
    assert cast.dtype == torch.bfloat16
    assert (cast.float() - plain).abs().max() <= 0.01 * plain.abs().max()
    cast.float().square().mean().backward()
    assert leaf.grad.dtype == torch.float32
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad.abs().max() > 0
    q = LSQQuantizer(QuantSpec(4, True, PerHead(), HalfStep(), Operand.QUERY), Dims(8, 9, 2))
    q.set_parameters(torch.tensor([0.2, 0.3]))
    x = torch.randn(4, 2, 9, 8)
    exact = code_scores(q(x), q(x), 8**-0.5)
    with torch.autocast("cpu", torch.bfloat16):
        scores = code_scores(q(x), q(x), 8**-0.5)
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() <= 0.01 * exact.abs().max()
