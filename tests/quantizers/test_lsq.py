"""LSQ and LSQ+: values, codes and gradients against the formulas of the method, written out in NumPy float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvit.errors import NotCalibratedError
from qvit.quantizers.lsq import LSQQuantizer, lsq_quantize
from qvit.spec import Dims, HalfStep, Operand, PerChannel, PerGroup, PerHead, PerTensor, PerToken, QuantSpec

B, H, N, D, K, M = 2, 3, 5, 7, 128, 6
EXTENT = {
    Operand.INPUT: ((B, N, K), Dims(K, N)),
    Operand.WEIGHT: ((M, K), Dims(K, M)),
    Operand.QUERY: ((B, H, N, D), Dims(D, N, H)),
    Operand.KEY: ((B, H, N, D), Dims(D, N, H)),
    Operand.VALUE: ((B, H, N, D), Dims(D, N, H)),
    Operand.MAP: ((B, H, N, N), Dims(N, N, H)),
}
SPECS = [
    (Operand.INPUT, PerTensor(), None),
    (Operand.INPUT, PerTensor(), PerTensor()),
    (Operand.INPUT, PerTensor(), PerChannel()),
    (Operand.INPUT, PerToken(), None),
    (Operand.INPUT, PerToken(), PerChannel()),
    (Operand.INPUT, PerToken(), PerTensor()),
    (Operand.INPUT, PerGroup(64), None),
    (Operand.INPUT, PerGroup(64), PerChannel()),
    (Operand.INPUT, PerGroup(128), PerTensor()),
    (Operand.WEIGHT, PerTensor(), None),
    (Operand.WEIGHT, PerChannel(), None),
    (Operand.WEIGHT, PerGroup(64), None),
    (Operand.WEIGHT, PerGroup(128), None),
    (Operand.QUERY, PerTensor(), HalfStep()),
    (Operand.QUERY, PerHead(), HalfStep()),
    (Operand.QUERY, PerHead(), PerChannel()),
    (Operand.QUERY, PerToken(), HalfStep()),
    (Operand.QUERY, PerToken(), PerHead()),
    (Operand.KEY, PerHead(), PerHead()),
    (Operand.KEY, PerToken(), None),
    (Operand.VALUE, PerChannel(), PerChannel()),
    (Operand.VALUE, PerChannel(), HalfStep()),
    (Operand.VALUE, PerHead(), PerChannel()),
    (Operand.VALUE, PerTensor(), PerHead()),
    (Operand.MAP, PerHead(), None),
    (Operand.MAP, PerToken(), None),
    (Operand.MAP, PerTensor(), None),
]


def sharing(granularity: object, operand: Operand, shape: tuple[int, ...]) -> np.ndarray:
    """For each element of a tensor, the number (row-major) of the scale or offset that it shares."""
    index = np.indices(shape)
    if isinstance(granularity, PerTensor):
        return np.zeros(shape, dtype=int)
    if operand is Operand.WEIGHT:
        if isinstance(granularity, PerGroup):
            return index[0] * (shape[1] // granularity.size) + index[1] // granularity.size
        return index[0]
    if operand is Operand.INPUT:
        if isinstance(granularity, PerGroup):
            return index[2] // granularity.size
        return index[1] if isinstance(granularity, PerToken) else index[2]
    if isinstance(granularity, PerHead):
        return index[1]
    return index[1] * shape[2] + index[2] if isinstance(granularity, PerToken) else index[1] * shape[3] + index[3]


def method(x, scale, offset, spec: QuantSpec, shape, upstream) -> dict[str, np.ndarray]:
    """Section 1 of the method, one element at a time, in float64; ``scale`` and ``offset`` are flat."""
    qn, qp = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if spec.signed else (0, 2**spec.bits - 1)
    which_scale = sharing(spec.scale, spec.operand, shape)
    half = isinstance(spec.offset, HalfStep)
    which_offset = None if spec.offset is None or half else sharing(spec.offset, spec.operand, shape)
    out = {name: np.zeros(shape) for name in ("value", "codes", "x")}
    out["scale"] = np.zeros(len(scale))
    out["offset"] = np.zeros(1 if offset is None else len(offset))
    for at in np.ndindex(*shape):
        s = float(scale[which_scale[at]])
        beta = s / 2 if half else 0.0 if which_offset is None else float(offset[which_offset[at]])
        v = (float(x[at]) - beta) / s
        c = min(max(round(v), qn), qp)  # Python rounds halves to even
        inside = qn <= v <= qp
        g = float(upstream[at])
        out["codes"][at] = c
        out["value"][at] = s * c + beta
        out["x"][at] = g if inside else 0.0
        by_scale = c - v if inside else float(c)
        by_offset = 0.0 if inside else 1.0
        # A half-step offset is half of the scale, so what reaches it reaches the scale by half.
        out["scale"][which_scale[at]] += g * (by_scale + (by_offset / 2 if half else 0.0))
        if which_offset is not None:
            out["offset"][which_offset[at]] += g * by_offset
    return out


def sample(spec: QuantSpec, shape: tuple[int, ...], rng: np.random.Generator, exact: bool = False):
    """Flat scale and offset, and x in float32 of which no element is within 0.02 of a rounding or clipping threshold.

    ``exact``: scales are powers of two and x in their quarters, so that every threshold is hit exactly.
    """
    which_scale = sharing(spec.scale, spec.operand, shape)
    count = which_scale.max() + 1
    scale = 2.0 ** rng.integers(-4, 2, count) if exact else np.exp(rng.normal(-1.5, 0.5, count))
    scale = scale.astype(np.float32)
    s = scale[which_scale].astype(np.float64)
    offset, beta = None, np.zeros(shape)
    if isinstance(spec.offset, HalfStep):
        beta = s / 2
    elif spec.offset is not None:
        which_offset = sharing(spec.offset, spec.operand, shape)
        offset = rng.normal(0, 1, which_offset.max() + 1)
        offset = (np.round(offset * 4) / 4 if exact else offset).astype(np.float32)
        beta = offset[which_offset].astype(np.float64)
    low, high = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if spec.signed else (0, 2**spec.bits - 1)
    if exact:
        v = rng.integers(4 * low - 8, 4 * high + 9, shape) / 4
    else:
        v = rng.integers(low - 3, high + 4, shape) + rng.choice([-1, 1], shape) * rng.uniform(0.02, 0.48, shape)
    return scale, offset, (s * v + beta).astype(np.float32)


def check(spec: QuantSpec, exact: bool, seed: int) -> None:
    shape, dims = EXTENT[spec.operand]
    rng = np.random.default_rng(seed)
    scale, offset, x = sample(spec, shape, rng, exact)
    upstream = rng.normal(size=shape).astype(np.float32)
    want = method(x, scale, offset, spec, shape, upstream)

    quantizer = LSQQuantizer(spec, dims)
    assert quantizer.scale.numel() == len(scale)
    quantizer.set_parameters(torch.from_numpy(scale), None if offset is None else torch.from_numpy(offset))
    leaf = torch.from_numpy(x).requires_grad_()
    got = quantizer(leaf)
    got.value.backward(torch.from_numpy(upstream))

    assert got.codes.dtype == torch.float32
    assert not got.codes.requires_grad
    assert np.array_equal(got.codes.numpy(), want["codes"])
    np.testing.assert_allclose(got.value.detach().numpy(), want["value"], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(leaf.grad.numpy(), want["x"].astype(np.float32))
    # LSQ's g, from the number of values (of one image) that share a scale.
    elements = math.prod(shape) if spec.operand is Operand.WEIGHT else math.prod(shape[1:])
    qp = 2 ** (spec.bits - 1) - 1 if spec.signed else 2**spec.bits - 1
    g = 1 / math.sqrt(elements / len(scale) * qp)
    magnitude = np.abs(want["scale"]).max() + 1
    np.testing.assert_allclose(quantizer.scale.grad.numpy().ravel(), want["scale"] * g, rtol=1e-4, atol=2e-5 * magnitude * g)
    if offset is not None:
        np.testing.assert_allclose(quantizer.offset.grad.numpy().ravel(), want["offset"], rtol=1e-4, atol=1e-4)
    else:
        assert quantizer.offset is None
    # the scale and offset handed on to the integer products
    assert np.array_equal(got.scale.numpy().ravel(), scale)
    assert not got.scale.requires_grad
    if isinstance(spec.offset, HalfStep):
        assert torch.equal(got.offset, got.scale / 2)
    elif offset is None:
        assert got.offset is None


def signs(operand: Operand) -> list[bool]:
    return {Operand.WEIGHT: [True], Operand.MAP: [False]}.get(operand, [True, False])


@pytest.mark.parametrize(("operand", "scale", "offset"), SPECS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_granularity(operand: Operand, scale, offset, bits: int) -> None:
    for signed in signs(operand):
        check(QuantSpec(bits, signed, scale, offset, operand), exact=False, seed=bits)


@given(st.sampled_from(SPECS), st.integers(2, 8), st.booleans(), st.integers(0, 1 << 30))
def test_values_exactly_on_rounding_and_clipping_thresholds(choice, bits: int, signed: bool, seed: int) -> None:
    operand, scale, offset = choice
    if signed not in signs(operand):
        signed = not signed
    check(QuantSpec(bits, signed, scale, offset, operand), exact=True, seed=seed)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_clip_edges_are_inside(bits: int, signed: bool) -> None:
    """(x - beta) / s == Qn and == Qp pass the gradient; one float32 step further out they do not."""
    spec = QuantSpec(bits, signed)
    low, high = float(spec.qn), float(spec.qp)
    beyond = [np.nextafter(np.float32(low), np.float32(-1e9)), np.nextafter(np.float32(high), np.float32(1e9))]
    x = torch.tensor([low, high, *beyond], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    got = lsq_quantize(x, scale, None, spec)
    got.value.sum().backward()
    assert got.codes.tolist() == [low, high, low, high]
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert scale.grad.item() == low + high  # nothing from the edges, Qn and Qp from beyond


def test_gradients_against_autograd_of_the_straight_through_formula() -> None:
    """The same formulas from automatic differentiation, with round's gradient set to one."""
    spec = QuantSpec(3, True, PerHead(), PerChannel(), Operand.QUERY)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(3, 1, 1, dtype=torch.float64) / 3 + 0.1).requires_grad_()
    offset = (torch.randn(3, 1, 7, dtype=torch.float64) / 5).requires_grad_()
    upstream = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    v = ((x - offset) / scale).clamp(-4, 3)
    simulated = (v + (v.round() - v).detach()) * scale + offset
    want = torch.autograd.grad(simulated, (x, scale, offset), upstream)
    got = torch.autograd.grad(lsq_quantize(x, scale, offset, spec).value, (x, scale, offset), upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [None, PerChannel()])
def test_bfloat16_autocast_keeps_codes_exact(bits: int, offset) -> None:
    quantizer = LSQQuantizer(QuantSpec(bits, False, PerTensor(), offset), Dims(64, 9))
    quantizer.set_parameters(torch.tensor([0.0137]), None if offset is None else torch.randn(64) / 10)
    x = torch.randn(4, 9, 64)
    plain = quantizer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(x)
    assert cast.codes.dtype == cast.value.dtype == torch.bfloat16
    assert torch.equal(cast.codes.float(), plain.codes)
    assert torch.equal(cast.value, plain.value.bfloat16())
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        quantizer(leaf).value.sum().backward()
    assert leaf.grad.dtype == torch.float32
    assert quantizer.scale.grad.dtype == torch.float32


def test_bfloat16_inputs_are_quantized_in_float32() -> None:
    quantizer = LSQQuantizer(QuantSpec(8, True), Dims(64, 9))
    quantizer.set_parameters(torch.tensor([0.0137]))
    x = torch.randn(4, 9, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = quantizer(x)
    assert torch.equal(got.codes.float(), (x.float() / torch.tensor(0.0137)).round().clamp(-128, 127))


def test_codes_and_scale_give_the_value_bit_for_bit() -> None:
    quantizer = LSQQuantizer(QuantSpec(4, True, PerChannel(), PerChannel(), Operand.VALUE), Dims(7, 5, 3))
    quantizer.set_parameters(torch.rand(3, 1, 7) + 0.1, torch.randn(3, 1, 7))
    got = quantizer(torch.randn(2, 3, 5, 7))
    assert torch.equal(got.value, got.codes * got.scale + got.offset)


def test_quantizing_twice_changes_nothing() -> None:
    quantizer = LSQQuantizer(QuantSpec(4, True, PerHead(), HalfStep(), Operand.QUERY), Dims(7, 5, 3))
    quantizer.set_parameters(torch.rand(3, 1, 1) + 0.1)
    once = quantizer(torch.randn(2, 3, 5, 7))
    again = quantizer(once.value)
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.value, again.value)


@pytest.mark.parametrize("rows", [5, None])
def test_grad_factor_counts_the_values_of_a_scale(rows: int | None) -> None:
    quantizer = LSQQuantizer(QuantSpec(4), Dims(64, rows))
    assert quantizer.grad_factor == pytest.approx(1 / math.sqrt(64 * (rows or 1) * 15))
    per_channel = LSQQuantizer(QuantSpec(2, True, PerChannel(), None, Operand.WEIGHT), Dims(64, 10))
    assert per_channel.grad_factor == pytest.approx(1 / math.sqrt(64 * 1))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30])
def test_a_scale_that_an_optimizer_ruined_stays_positive(value: float) -> None:
    quantizer = LSQQuantizer(QuantSpec(4, True), Dims(8, 3))
    quantizer.set_parameters(torch.tensor([value]))
    assert (quantizer.effective_scale() > 0).all()
    got = quantizer(torch.randn(1, 3, 8))
    assert torch.isfinite(got.value).all()
    assert got.codes.abs().max() <= 8


def test_uncalibrated_refuses_to_run() -> None:
    quantizer = LSQQuantizer(QuantSpec(4), Dims(8, 3))
    with pytest.raises(NotCalibratedError, match=r"qvit\.calibrate"):
        quantizer(torch.randn(1, 3, 8))
    quantizer.mark_calibrated()
    quantizer(torch.randn(1, 3, 8))


def test_state_dict_keeps_parameters_and_the_calibrated_flag() -> None:
    spec = QuantSpec(4, False, PerTensor(), PerChannel())
    one, two = LSQQuantizer(spec, Dims(8, 3)), LSQQuantizer(spec, Dims(8, 3))
    one.set_parameters(torch.tensor([0.25]), torch.randn(8))
    x = torch.randn(1, 3, 8)
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert set(state) == {"scale", "offset", "calibrated"}
    assert state["calibrated"].item() is True
    two.load_state_dict(state)
    assert torch.equal(two(x).value, one(x).value)
    assert torch.equal(copy.deepcopy(one)(x).value, one(x).value)
    # and back: an uncalibrated state makes the quantizer refuse again
    one.load_state_dict(LSQQuantizer(spec, Dims(8, 3)).state_dict())
    with pytest.raises(NotCalibratedError):
        one(x)


def test_set_parameters_takes_any_layout_of_the_right_size_and_no_other() -> None:
    quantizer = LSQQuantizer(QuantSpec(4, True, PerHead(), HalfStep(), Operand.QUERY), Dims(7, 5, 3))
    quantizer.set_parameters(torch.tensor([1.0, 2.0, 3.0]))
    assert quantizer.scale.shape == (3, 1, 1)
    assert quantizer.scale.flatten().tolist() == [1, 2, 3]
    assert quantizer.scale.requires_grad
    with pytest.raises(RuntimeError):
        quantizer.set_parameters(torch.ones(4))


def test_empty_batch() -> None:
    quantizer = LSQQuantizer(QuantSpec(4), Dims(8, 3))
    quantizer.set_parameters(torch.tensor([0.5]))
    assert quantizer(torch.randn(0, 3, 8)).codes.shape == (0, 3, 8)


def test_a_scale_that_became_negative_comes_back():
    spec = QuantSpec(4, False, PerTensor(), None, Operand.INPUT)
    quantizer = LSQQuantizer(spec, Dims(channels=8, rows=5))
    quantizer.set_parameters(torch.tensor([-0.1]))
    x = torch.rand(3, 5, 8)
    before = (quantizer(x).value - x).square().sum()
    before.backward()
    assert quantizer.scale.grad < 0  # descent makes the scale larger
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(30):
        loss = (quantizer(x).value - x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert quantizer.scale > 0
    assert loss < 0.05 * before
