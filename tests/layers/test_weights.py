"""The list of a model's quantized weights, and how far they are from changing their codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qvit.layers.points import quantization_points
from qvit.layers.weights import distance_to_threshold, quantized_weights
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.statsq import StatsQuantizer
from qvit.spec import Dims, HalfStep, Operand, PerChannel, PerGroup, QuantSpec


@pytest.mark.parametrize("kind", ["lsq", "statsq"])
def test_every_weight_is_listed_once(kind: str, make_student: Callable[..., nn.Module]) -> None:
    student = make_student(weight_bits=2, weight_quantizer=kind)
    weights = quantized_weights(student)
    points = quantization_points(student)
    assert [f"{w.name}.weight" for w in weights] == [name for name in points if name.endswith(".weight")]
    for w in weights:
        assert w.parameter is student.get_parameter(f"{w.name}.weight")
        assert w.bits == points[f"{w.name}.weight"].spec.bits
        assert (w.scale is None) == (kind == "statsq" and w.name.startswith("blocks"))
        quantized = w.quantized()
        assert quantized.value.shape == w.effective().shape
        assert not quantized.value.requires_grad
    patch = weights[0]
    assert patch.effective().shape == (48, 3 * 16 * 16)
    torch.testing.assert_close(
        patch.effective()[0, -1].item(), (patch.parameter[0, -1, -1, -1] / student.qvit.preprocessing.std[-1]).item()
    )


def test_a_float_model_has_none(small_vit: Callable[..., nn.Module]) -> None:
    assert quantized_weights(small_vit()) == []


def lsq(spec: QuantSpec, scale: torch.Tensor, dims: Dims) -> LSQQuantizer:
    quantizer = LSQQuantizer(spec, dims)
    quantizer.set_parameters(scale)
    return quantizer


def test_distances_by_hand() -> None:
    # Steps of 2, codes -2 .. 1, thresholds at -3, -1 and 1.
    quantizer = lsq(QuantSpec(2, True, PerChannel(), None, Operand.WEIGHT), torch.tensor([2.0]), Dims(7, 1))
    weight = torch.tensor([[-9.0, -3.0, -2.0, 0.0, 0.9, 1.1, 5.0]])
    distance = distance_to_threshold(weight, quantizer(weight))
    torch.testing.assert_close(distance, torch.tensor([[3.0, 0.0, 0.5, 0.5, 0.05, 0.05, 2.0]]))
    # At odd half steps: levels at -3, -1, 1, 3, thresholds at -2, 0 and 2.
    quantizer = lsq(QuantSpec(2, True, PerChannel(), HalfStep(), Operand.WEIGHT), torch.tensor([2.0]), Dims(7, 1))
    weight = torch.tensor([[-9.0, -2.0, -1.0, 0.0, 0.2, 1.9, 5.0]])
    distance = distance_to_threshold(weight, quantizer(weight))
    torch.testing.assert_close(distance, torch.tensor([[3.5, 0.0, 0.5, 0.0, 0.1, 0.05, 1.5]]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["lsq", "groups", "statsq"])
def test_crossing_the_distance_is_what_changes_a_code(bits: int, kind: str) -> None:
    m, k = 5, 128
    weight = torch.randn(m, k)
    if kind == "statsq":
        quantizer = StatsQuantizer(QuantSpec(bits, True, PerChannel(), HalfStep(), Operand.WEIGHT), Dims(k, m))
    else:
        spec = QuantSpec(bits, True, PerGroup(64) if kind == "groups" else PerChannel(), None, Operand.WEIGHT)
        quantizer = lsq(spec, torch.rand(spec.scale_shape(Dims(k, m))) / bits + 0.1, Dims(k, m))
    got = quantizer(weight)
    step = got.scale.repeat_interleave(64, -1) if kind == "groups" else got.scale
    distance = distance_to_threshold(weight, got)
    offset = 0.5 if kind == "statsq" else 0.0

    def codes(w: torch.Tensor) -> torch.Tensor:
        return (w / step - offset).round().clamp(got.spec.qn, got.spec.qp)

    assert torch.equal(codes(weight), got.codes)
    near, beyond = (distance - 1e-3).clamp_min(0) * step, (distance + 1e-3) * step
    for sign in (-1, 1):
        assert torch.equal(codes(weight + sign * near), got.codes)
    assert ((codes(weight + beyond) != got.codes) | (codes(weight - beyond) != got.codes)).all()
