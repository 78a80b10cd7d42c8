"""Names of quantization points, float mode, recorded codes."""

from __future__ import annotations

import pytest
import torch

from qvit.layers.points import float_mode, quantization_points, quantizing_only, record_codes

PER_BLOCK = [
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.map",
    *(f"{layer}.{what}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for what in ("input", "weight")),
]


def test_names(make_student, small_vit) -> None:
    names = set(quantization_points(make_student()))
    edges = {"patch_embed.proj.input", "patch_embed.proj.weight", "head.input", "head.weight"}
    assert names == edges | {f"blocks.{i}.{point}" for i in range(2) for point in PER_BLOCK}
    distilled = set(quantization_points(make_student(small_vit("deit_tiny_distilled_patch16_224"))))
    assert distilled == names | {"head_dist.input", "head_dist.weight"}
    assert quantization_points(small_vit()) == {}


def test_float_mode_switches_off_and_back(make_student) -> None:
    student = make_student(weight_bits=2, act_bits=2)
    images = torch.randn(2, 3, 48, 48)
    quantized = student(images)
    with float_mode(student):
        in_float = student(images)
        assert not any(q.enabled for q in quantization_points(student).values())
    assert not torch.allclose(quantized, in_float, atol=1e-3)
    assert torch.equal(student(images), quantized)


def test_float_modes_nest(make_student) -> None:
    student = make_student()
    with float_mode(student):
        with float_mode(student):
            assert not any(q.enabled for q in quantization_points(student).values())
        assert not any(q.enabled for q in quantization_points(student).values())
    assert all(q.enabled for q in quantization_points(student).values())


def test_float_mode_restores_after_an_error_and_keeps_what_was_off(make_student) -> None:
    student = make_student()
    points = quantization_points(student)
    points["head.input"].enabled = False
    with pytest.raises(ZeroDivisionError), float_mode(student):
        raise ZeroDivisionError
    assert [name for name, q in points.items() if not q.enabled] == ["head.input"]


def test_named_points_alone_are_quantized(make_student) -> None:
    student = make_student(weight_bits=2, act_bits=2)
    images = torch.randn(2, 3, 48, 48)
    points = quantization_points(student)
    everything = student(images)
    with quantizing_only(student, {"head.input", "head.weight"}):
        assert [name for name, q in points.items() if q.enabled] == ["head.weight", "head.input"]
        alone = student(images)
    with quantizing_only(student, points):
        assert torch.equal(student(images), everything)
    with float_mode(student):
        in_float = student(images)
    assert not torch.allclose(alone, in_float, atol=1e-3)
    assert not torch.allclose(alone, everything, atol=1e-3)
    assert all(q.enabled for q in points.values())


def test_record_codes_gives_whole_numbers_in_range_for_every_activation(make_student) -> None:
    student = make_student(weight_bits=3, act_bits=2)
    images = torch.randn(2, 3, 48, 48)
    with record_codes(student) as codes:
        logits = student(images)
        assert set(codes) == {name for name in quantization_points(student) if not name.endswith(".weight")}
        first = {name: c.clone() for name, c in codes.items()}
        student(torch.randn(2, 3, 48, 48))
        assert not torch.equal(codes["blocks.0.attn.q"], first["blocks.0.attn.q"])  # the last forward's
    for name, c in first.items():
        spec = quantization_points(student)[name].spec
        assert c.dtype == torch.int16
        assert c.amin() >= spec.qn
        assert c.amax() <= spec.qp
        assert c.unique().numel() > 1, name
    assert first["blocks.1.attn.map"].shape == (2, 3, 10, 10)
    assert first["blocks.1.mlp.fc2.input"].shape == (2, 10, 192)
    assert first["head.input"].shape == (2, 48)
    # afterwards nothing is recorded and nothing is changed
    codes.clear()
    assert torch.equal(student(images), logits)
    assert not codes
