"""Traces: a float model's against timm's own attention, a student's and an integer file's against each other."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from qvit.analyze.trace import Grid, IntegerTracer, ModelTracer, tracer_of
from qvit.errors import TrainingError, UnsupportedModelError
from qvit.integer.freeze import freeze
from qvit.integer.model import IntegerModel
from qvit.layers.points import float_mode, record_codes
from qvit.spec import Dims, HalfStep, Operand, PerHead, QuantSpec

SIZES: dict[str, Any] = {"img_size": 12, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2}


@pytest.mark.parametrize("fused", [True, False])
def test_a_float_model_s_attention_reproduces_its_output(small_vit: Callable[..., nn.Module], fused: bool) -> None:
    model: Any = small_vit("deit_tiny_distilled_patch16_224", **SIZES)
    for block in model.blocks:
        block.attn.fused_attn = fused
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    values: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(
            lambda _m, _i, out: values.append(out.unflatten(-1, (3, 3, 8))[:, :, 2].transpose(1, 2))
        )
        block.attn.proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with ModelTracer(model) as tracer:
        traces = tracer(torch.randn(2, 3, 12, 12))
    assert len(traces) == 2
    for trace, out, v in zip(traces, seen, values, strict=True):
        assert trace.attention is not None
        assert trace.attention.shape == (2, 3, 11, 11)  # 9 patches, class and distillation token
        torch.testing.assert_close((trace.attention @ v).transpose(1, 2).flatten(2), out, rtol=1e-4, atol=1e-5)
        assert not trace.rectified
        assert not trace.codes
        assert torch.equal(trace.raw["q"], trace.inputs["q"])


@pytest.mark.parametrize("rectify", [True, False])
def test_a_student_and_its_integers_show_the_same(
    make_student: Callable[..., nn.Module],
    small_vit: Callable[..., nn.Module],
    perturb: Callable[[nn.Module], nn.Module],
    rectify: bool,
) -> None:
    student: Any = perturb(make_student(small_vit(**SIZES), weight_bits=3, act_bits=3, rectify=rectify))
    frozen = freeze(student)
    images = torch.randn(2, 3, 12, 12)
    tracer, integers = tracer_of(student), tracer_of(frozen)
    assert isinstance(integers, IntegerTracer)
    with record_codes(student) as codes:
        own = tracer(images)
    theirs = integers(images)
    for block, (a, b) in enumerate(zip(own, theirs, strict=True)):
        assert a.rectified == b.rectified == rectify
        attention = student.blocks[block].attn
        for name in ("q", "k"):
            assert torch.equal(a.raw[name], b.raw[name])
            assert torch.equal(a.inputs[name], b.inputs[name])
            with torch.no_grad():
                assert torch.equal(a.inputs[name], getattr(attention, f"rectify_{name}")(a.raw[name]))
            assert torch.equal(a.codes[name].short(), codes[f"blocks.{block}.attn.{name}"])
            assert torch.equal(a.codes[name].short(), b.codes[name].short())
            assert a.grids[name] == b.grids[name]
        assert a.attention is not None
        torch.testing.assert_close(a.attention, b.attention)
        scale = attention.map_quantizer.scale.detach()
        torch.testing.assert_close(a.attention, codes[f"blocks.{block}.attn.map"] * scale)


def test_closing_leaves_the_model_as_it_was(
    make_student: Callable[..., nn.Module], small_vit: Callable[..., nn.Module]
) -> None:
    student: Any = make_student(small_vit(**SIZES))
    with ModelTracer(student) as tracer:
        tracer(torch.randn(1, 3, 12, 12))
    assert all(block.attn.tap is None for block in student.blocks)
    assert not any(module._forward_hooks for module in student.modules())
    with ModelTracer(student) as tracer, float_mode(student):
        traces = tracer(torch.randn(1, 3, 12, 12))
    # Without quantization there are no codes, and attention is the softmax itself.
    assert not traces[0].codes
    assert traces[0].attention is not None
    torch.testing.assert_close(traces[0].attention.sum(-1), torch.ones(1, 3, 10))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(TrainingError, match="ResNet"):
        tracer_of(timm.create_model("resnet18"))


def test_a_frozen_model_of_another_family_is_refused(frozen: IntegerModel) -> None:
    other = dataclasses.replace(frozen, architecture=types.SimpleNamespace(name="swin_tiny"))
    with pytest.raises(UnsupportedModelError, match="frozen swin_tiny cannot be shown"):
        tracer_of(other)


def test_a_fitted_grid_has_the_least_error_among_steps() -> None:
    spec = QuantSpec(2, True, PerHead(), HalfStep(), Operand.QUERY)
    x = torch.randn(3, 2, 17, 4) * torch.tensor([0.5, 3.0])[:, None, None]
    shape = spec.scale_shape(Dims(channels=4, rows=17, heads=2))
    codes = Grid(spec, shape, None).fitted_to(x)(x)
    assert set(codes.unique().tolist()) == {-2, -1, 0, 1}

    def error(scale: torch.Tensor) -> torch.Tensor:
        own = ((x - scale / 2) / scale).round().clamp(-2, 1)
        return ((own + 0.5) * scale - x).square().mean((0, 2, 3))

    # What the codes stand for with the best step for them, against a fine series of steps.
    levels = codes + 0.5
    scale = (levels * x).sum((0, 2, 3)) / levels.square().sum((0, 2, 3))
    fitted = (levels * scale[:, None, None] - x).square().mean((0, 2, 3))
    tried = torch.stack([error(torch.full((2, 1, 1), step)) for step in torch.linspace(0.05, 6, 200).tolist()])
    assert (fitted <= tried.amin(0) * 1.001).all()
