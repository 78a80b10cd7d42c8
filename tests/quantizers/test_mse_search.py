"""The calibration search against a dense brute-force search over scale and offset."""

from __future__ import annotations

import pytest
import torch

from qvit.quantizers.lsq import lsq_quantize
from qvit.quantizers.mse_search import mse_optimal
from qvit.spec import Dims, HalfStep, Operand, PerChannel, PerGroup, PerHead, PerTensor, PerToken, QuantSpec


def search(x: torch.Tensor, spec: QuantSpec, dims: Dims) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, offset_shape = spec.scale_shape(dims), spec.offset_shape(dims)
    scale, offset = mse_optimal(x, spec, shape, offset_shape)
    assert scale.shape == shape
    assert scale.dtype == torch.float32
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    if offset_shape is None:
        assert offset is None
    else:
        assert offset.shape == offset_shape
        assert torch.isfinite(offset).all()
    return scale, offset


def error(x: torch.Tensor, spec: QuantSpec, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """Squared error of every element."""
    return (lsq_quantize(x, scale, offset, spec).value - x).square()


def rounding_error(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    codes = ((x - offset) / scale).round().clamp(spec.qn, spec.qp)
    return (codes * scale + offset - x).square()


def brute_scales(x: torch.Tensor, spec: QuantSpec, steps: int = 600) -> torch.Tensor:
    spread = (x.amax() - x.amin()).clamp_min(x.abs().amax()).item()
    return torch.logspace(0, -2.5, steps, dtype=torch.float64) * spread / (spec.qp - spec.qn) * 2


def brute_error(x: torch.Tensor, spec: QuantSpec) -> float:
    """The least squared error of the values [S] that share one scale and have no learned offset."""
    x = x.flatten().double()
    scale = brute_scales(x, spec)[:, None]
    offset = scale / 2 if isinstance(spec.offset, HalfStep) else torch.zeros_like(scale)
    return rounding_error(x[None], scale, offset, spec).sum(1).min().item()


def brute_error_offset(x: torch.Tensor, spec: QuantSpec) -> float:
    """The same with an offset for each column of x [S, K], tried on a dense grid for every scale."""
    x = x.double()
    best = float("inf")
    for scale in brute_scales(x, spec, 90):
        low, high = x.amin(0) - scale * spec.qp, x.amax(0) - scale * spec.qn
        tries = low + (high - low) * torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        errors = rounding_error(x[None], scale, tries[:, None], spec).sum(1)
        best = min(best, errors.min(0).values.sum().item())
    return best


def values(kind: str, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    if kind == "gelu":
        return torch.nn.functional.gelu(x)
    if kind == "outliers":
        return torch.where(torch.rand(shape) < 0.01, 30 * x, x)
    if kind == "softmax":
        return (3 * x).softmax(-1)
    if kind == "shifted":
        return 0.2 * x + 5
    return x


def slack(kind: str) -> float:
    """How much worse than brute force a search over scale and offset may be; outliers make narrow minima far apart."""
    return 1.5 if kind == "outliers" else 1.04


KINDS = ["normal", "gelu", "outliers", "softmax", "shifted"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "gelu", "outliers", "softmax"])
@pytest.mark.parametrize("signed", [True, False])
def test_per_tensor_scale(bits: int, kind: str, signed: bool) -> None:
    x, spec = values(kind, 30, 17), QuantSpec(bits, signed)
    got = error(x, spec, *search(x, spec, Dims(17, 30))).sum().item()
    assert got <= 1.02 * brute_error(x, spec) + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "outliers", "gelu"])
def test_half_step(bits: int, kind: str) -> None:
    x, spec = values(kind, 4, 3, 20, 7), QuantSpec(bits, True, PerHead(), HalfStep(), Operand.QUERY)
    scale, offset = search(x, spec, Dims(7, 20, 3))
    got = error(x, spec, scale, offset).sum((0, 2, 3))
    for head in range(3):
        assert got[head].item() <= 1.02 * brute_error(x[:, head], spec) + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_offset_per_tensor(bits: int, kind: str) -> None:
    x, spec = values(kind, 90, 9), QuantSpec(bits, False, PerTensor(), PerTensor())
    got = error(x, spec, *search(x, spec, Dims(9, 90))).sum().item()
    assert got <= slack(kind) * brute_error_offset(x.reshape(-1, 1), spec) + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_scale_per_tensor_and_offset_per_channel(bits: int, kind: str, signed: bool) -> None:
    """The default of a linear input: channels of different means (and, not equalised, of different widths) share a step."""
    x = values(kind, 200, 5) * torch.linspace(0.7, 1.4, 5) + torch.randn(5)
    spec = QuantSpec(bits, signed, PerTensor(), PerChannel())
    got = error(x, spec, *search(x, spec, Dims(5))).sum().item()
    assert got <= slack(kind) * brute_error_offset(x, spec) + 1e-6


def test_two_bits_and_rare_outliers_put_a_level_on_the_bulk() -> None:
    x, spec = values("outliers", 400, 5)[:, :1], QuantSpec(2, False, PerTensor(), PerTensor())
    got = error(x, spec, *search(x, spec, Dims(1, 400))).sum().item()
    assert got <= 1.05 * brute_error_offset(x, spec)


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_scale_and_offset_per_channel_of_v(kind: str) -> None:
    x = values(kind, 9, 2, 31, 3) * torch.tensor([0.1, 1.0, 10.0]) + torch.tensor([3.0, 0.0, -20.0])
    spec = QuantSpec(3, True, PerChannel(), PerChannel(), Operand.VALUE)
    got = error(x, spec, *search(x, spec, Dims(3, 31, 2))).sum((0, 2))
    for head in range(2):
        for channel in range(3):
            brute = brute_error_offset(x[:, head, :, channel].reshape(-1, 1), spec)
            assert got[head, channel].item() <= slack(kind) * brute + 1e-6


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_per_output_channel(bits: int) -> None:
    weight = values("outliers", 12, 60) * torch.logspace(-2, 2, 12)[:, None]
    spec = QuantSpec(bits, True, PerChannel(), None, Operand.WEIGHT)
    got = error(weight, spec, *search(weight, spec, Dims(60, 12))).sum(1)
    for row in range(12):
        assert got[row].item() <= 1.02 * brute_error(weight[row], spec) + 1e-9


@pytest.mark.parametrize("operand", [Operand.WEIGHT, Operand.INPUT])
def test_groups(operand: Operand) -> None:
    x = values("normal", 5, 128) * torch.cat([torch.ones(64), 20 * torch.ones(64)])
    spec = QuantSpec(3, True, PerGroup(64), None, operand)
    scale, offset = search(x, spec, Dims(128, 5))
    got = error(x, spec, scale, offset)
    for group in range(2):
        columns = slice(64 * group, 64 * (group + 1))
        for rows in [slice(r, r + 1) for r in range(5)] if operand is Operand.WEIGHT else [slice(None)]:
            assert got[rows, columns].sum().item() <= 1.02 * brute_error(x[rows, columns], spec)


@pytest.mark.parametrize(
    ("spec", "shape", "dims"),
    [
        (QuantSpec(3, False, PerToken(), None), (40, 5, 9), Dims(9, 5)),
        (QuantSpec(3, False, PerToken(), None, Operand.MAP), (60, 2, 5, 5), Dims(5, 5, 2)),
        (QuantSpec(3, True, PerToken(), HalfStep(), Operand.QUERY), (40, 2, 5, 9), Dims(9, 5, 2)),
    ],
)
def test_per_token(spec: QuantSpec, shape: tuple[int, ...], dims: Dims) -> None:
    x = values("softmax" if spec.operand is Operand.MAP else "gelu", *shape) * torch.linspace(1, 6, 5)[:, None]
    got = error(x, spec, *search(x, spec, dims))
    token = got.dim() - 2
    others = [d for d in range(got.dim()) if d != token and not (d == 1 and got.dim() == 4)]
    got = got.sum(others).reshape(-1)
    slices = x.transpose(0, 1) if x.dim() == 3 else x.permute(1, 2, 0, 3).flatten(0, 1)
    for one, sample in zip(got, slices, strict=True):
        assert one.item() <= 1.03 * brute_error(sample, spec) + 1e-6


@pytest.mark.parametrize(
    ("operand", "scale", "offset"),
    [
        (Operand.INPUT, PerToken(), PerChannel()),
        (Operand.INPUT, PerToken(), PerTensor()),
        (Operand.INPUT, PerGroup(64), PerChannel()),
        (Operand.INPUT, PerGroup(64), PerTensor()),
        (Operand.QUERY, PerToken(), PerChannel()),
        (Operand.QUERY, PerToken(), PerHead()),
        (Operand.QUERY, PerHead(), PerHead()),
        (Operand.KEY, PerTensor(), PerChannel()),
        (Operand.VALUE, PerHead(), PerChannel()),
        (Operand.VALUE, PerTensor(), PerHead()),
        (Operand.VALUE, PerChannel(), PerHead()),
    ],
)
@pytest.mark.parametrize("bits", [2, 4])
def test_other_pairs_of_granularities_beat_the_range_of_the_values(operand: Operand, scale, offset, bits: int) -> None:
    """Scales and offsets that tie each other: no brute force, but never worse than spanning each scale's own range."""
    shape, dims = ((8, 5, 128), Dims(128, 5)) if operand is Operand.INPUT else ((8, 3, 5, 7), Dims(7, 5, 3))
    spec = QuantSpec(bits, True, scale, offset, operand)
    x = values("outliers", *shape) + 0.5 * torch.randn(shape[-1])
    got = error(x, spec, *search(x, spec, dims)).sum().item()
    spans = (x.amax() - x.amin()) / (spec.qp - spec.qn)
    naive = error(
        x,
        spec,
        torch.full(spec.scale_shape(dims), spans.item()),
        torch.full(spec.offset_shape(dims), (x.amin() - spans * spec.qn).item()),
    )
    assert got <= naive.sum().item()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-12, 1e6])
@pytest.mark.parametrize(
    ("spec", "dims"),
    [
        (QuantSpec(4), Dims(8, 5)),
        (QuantSpec(2, True), Dims(8, 5)),
        (QuantSpec(4, False, PerTensor(), PerChannel()), Dims(8, 5)),
        (QuantSpec(4, False, PerTensor(), PerTensor()), Dims(8, 5)),
        (QuantSpec(4, True, PerToken(), PerChannel()), Dims(8, 5)),
    ],
)
def test_constant_inputs(value: float, spec: QuantSpec, dims: Dims) -> None:
    x = torch.full((6, 5, 8), value)
    scale, offset = search(x, spec, dims)
    got = error(x, spec, scale, offset).sqrt().max().item()
    if offset is not None or (value >= 0 or spec.signed):
        assert got <= 1e-5 * abs(value) + 1e-7
    else:
        assert got == pytest.approx(abs(value))  # unsigned codes cannot say -3.5


def test_constant_inputs_of_q_k_v_and_map() -> None:
    for operand, signed, scale, offset in [
        (Operand.QUERY, True, PerHead(), HalfStep()),
        (Operand.VALUE, True, PerChannel(), PerChannel()),
        (Operand.MAP, False, PerHead(), None),
    ]:
        for value in (0.0, 0.2):
            spec = QuantSpec(2, signed, scale, offset, operand)
            x = torch.full((4, 3, 5, 5), value)
            assert error(x, spec, *search(x, spec, Dims(5, 5, 3))).max() <= 1e-6


def test_dead_channels_and_dead_rows_do_not_disturb_the_others() -> None:
    weight = torch.randn(6, 30)
    weight[2] = 0
    spec = QuantSpec(3, True, PerChannel(), None, Operand.WEIGHT)
    scale, _ = search(weight, spec, Dims(30, 6))
    alive = [0, 1, 3, 4, 5]
    alone, _ = search(weight[alive], spec, Dims(30, 5))
    assert torch.equal(scale[alive], alone)
    x = torch.randn(200, 6) + 3
    x[:, 4] = 0
    spec = QuantSpec(3, False, PerTensor(), PerChannel())
    got = error(x, spec, *search(x, spec, Dims(6))).sum(0)
    assert got[4] <= 1e-9
    assert got.sum().item() <= 1.05 * brute_error_offset(x, spec)


def test_one_sample_and_half_precision() -> None:
    spec = QuantSpec(4, False, PerTensor(), PerChannel())
    x = torch.randn(1, 8).bfloat16()
    assert error(x.float(), spec, *search(x, spec, Dims(8))).max() < 1e-4


def test_leaves_the_sample_and_the_graph_alone() -> None:
    x = torch.randn(20, 8, requires_grad=True)
    before = x.detach().clone()
    scale, offset = search(x, QuantSpec(3, False, PerTensor(), PerChannel()), Dims(8))
    assert not scale.requires_grad
    assert not offset.requires_grad
    assert torch.equal(x, before)
