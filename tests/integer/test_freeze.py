"""`freeze`: what it refuses, what it rounds, and how small the result is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import qvit
from qvit.errors import InputError, NotCalibratedError, UnsupportedModelError
from qvit.integer.freeze import freeze, round_to_half, rounded_to_half
from qvit.integer.model import IntegerModel
from qvit.layers.linear import QuantLinear
from qvit.layers.points import quantization_points

Factory = Callable[..., Any]


@pytest.fixture
def student(make_student: Factory, small_vit: Factory, perturb: Factory) -> Any:
    return perturb(make_student(small_vit(img_size=32, embed_dim=24, depth=1)))


def test_a_float_model_is_refused(small_vit: Factory) -> None:
    with pytest.raises(UnsupportedModelError, match="not quantized"):
        freeze(small_vit())


def test_an_uncalibrated_model_is_refused(small_vit: Factory) -> None:
    with pytest.raises(NotCalibratedError, match=r"qvit.calibrate"):
        freeze(qvit.quantize(small_vit(), bits=4))


@pytest.mark.parametrize("classes", [[], ["a"] * 6, ["a"] * 8])
def test_a_wrong_number_of_classes_is_refused(student: Any, classes: list[str]) -> None:
    with pytest.raises(InputError, match=f"{len(classes)} class names were given for a model with 7 classes"):
        freeze(student, classes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_refused(student: Any, value: float) -> None:
    with torch.no_grad():
        student.blocks[0].mlp.fc2.weight[0, 0] = value
    with pytest.raises(InputError, match=r"blocks.0.mlp.fc2.weight is not finite"):
        freeze(student)


def test_header(student: Any) -> None:
    model = freeze(student, list("abcdefg"), {"fake_top1": 1.5})
    assert model.classes == tuple("abcdefg")
    assert model.provenance == {"fake_top1": 1.5}
    assert model.architecture == student.qvit.architecture
    assert model.preprocessing == student.qvit.preprocessing
    assert model.specs == {name: q.spec for name, q in quantization_points(student).items()}
    assert freeze(student).classes == ("0", "1", "2", "3", "4", "5", "6")


def test_codes_and_scales_are_the_students(student: Any) -> None:
    model = freeze(student)
    layers = {layer.name: layer for layer in model.linears()}
    for name, module in student.named_modules():
        if isinstance(module, QuantLinear):
            # In float64 and NumPy, independent of the quantizer.
            weight = module.weight.detach().double().numpy()
            scale = module.weight_quantizer.scale.detach().double().numpy()
            spec = module.weight_quantizer.spec
            ratio = weight / scale
            expected = np.clip(np.rint(ratio), spec.qn, spec.qp)
            far = np.abs(ratio - np.floor(ratio) - 0.5) > 1e-5  # from a rounding threshold, where float32 may decide otherwise
            assert far.mean() > 0.99
            assert (layers[name].weight.codes() == expected)[far].all()
            assert (layers[name].weight.scale == module.weight_quantizer.scale.detach().numpy()).all()
            assert (layers[name].input.offset == module.input_quantizer.offset.detach().numpy()).all()


def test_statistical_steps_are_the_float16_values_that_training_used(
    make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    student = perturb(make_student(small_vit(img_size=32, embed_dim=24, depth=1), weight_bits=2, weight_quantizer="statsq"))
    fc1 = student.blocks[0].mlp.fc1
    before = fc1.weight_quantizer(fc1.weight)
    model = freeze(student)
    weight = model.blocks[0].fc1.weight
    assert model.tensors["blocks.0.mlp.fc1.weight_scale"].dtype == np.float16
    assert weight.half_step
    assert (weight.scale == before.scale.numpy()).all()
    assert (weight.codes() == before.codes.detach().numpy()).all()
    assert (weight.values() == before.value.detach().double().numpy()).all()
    assert not model.heads[0].weight.half_step


def test_round_to_half_rounds_vectors_and_keeps_weights(student: Any) -> None:
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    round_to_half(student)
    weights = {f"{name}.weight" for name, m in student.named_modules() if hasattr(m, "weight_quantizer")}
    assert len(weights) == 4 + 2
    moved = 0
    for name, parameter in student.named_parameters():
        if name in weights:
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name].half().float()), name
            moved += int((parameter != before[name]).sum())
    assert moved > 1000
    # A second time, nothing is left to do.
    after = {name: p.detach().clone() for name, p in student.named_parameters()}
    round_to_half(student)
    assert all(torch.equal(p, after[name]) for name, p in student.named_parameters())


def test_what_float16_cannot_hold_stays_float32(student: Any) -> None:
    quantizer = student.blocks[0].attn.q_quantizer
    with torch.no_grad():
        quantizer.scale[0] = 1e-6  # subnormal in float16
        student.norm.bias[0] = 1e5 + 0.1
        student.blocks[0].attn.k_quantizer.scale[0] = -1.0  # as an optimizer may leave it
    model = freeze(student)
    assert model.tensors["blocks.0.attn.q_scale"].dtype == np.float32
    assert model.tensors["norm.bias"].dtype == np.float32
    assert model.tensors["blocks.0.attn.v_scale"].dtype == np.float16
    assert model.blocks[0].attention.q.scale.reshape(-1)[0] == np.float32(1e-6)
    assert model.norm is not None
    assert model.norm.bias[0] == np.float32(1e5 + 0.1)
    assert model.blocks[0].attention.k.scale.reshape(-1)[0] == np.float32(1e-8)


def test_tensors_come_from_any_device_type_and_mode(student: Any) -> None:
    student.train()
    model = freeze(student)
    assert isinstance(model, IntegerModel)
    assert student.training


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_file_sizes(bits: int, make_student: Factory, tmp_path: Path) -> None:
    width, depth = 96, 2
    options = {"img_size": 32, "embed_dim": width, "depth": depth, "num_heads": 3, "num_classes": 10}
    vit = timm.create_model("deit_tiny_patch16_224", **options).eval()
    size = freeze(make_student(vit, weight_bits=bits, act_bits=bits)).save(tmp_path / "m.qvit")
    inner, edges = depth * 12 * width * width, 3 * 16 * 16 * width + 10 * width
    packed = inner * bits // 8 + edges
    vectors = 2 * sum(p.numel() for n, p in vit.named_parameters() if p.dim() == 1 or "pos" in n or "token" in n)
    # What a float file takes for the same vectors, and 16 bits for each scale and offset beside them.
    assert packed + vectors < size < packed + vectors + 2 * depth * 30 * width + 12_000


def test_a_student_is_rounded_for_a_while_or_for_good(student: Any) -> None:
    def state() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    before = state()
    with rounded_to_half(student):
        within = state()
        round_to_half(student)
        assert same(state(), within)
    assert same(state(), before)
    assert not same(within, before)
    with pytest.raises(KeyError), rounded_to_half(student, keep=True):
        raise KeyError
    assert same(state(), before)
    with rounded_to_half(student, keep=True):
        pass
    assert same(state(), within)
