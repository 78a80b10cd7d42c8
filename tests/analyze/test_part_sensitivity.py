"""Which points are quantized in each measurement, and what the model computes then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qvit.analyze.part_sensitivity import PARTS, evaluations, layer_of, part_of, part_sensitivity
from qvit.layers.points import float_mode, quantization_points

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2}


@pytest.mark.parametrize(
    ("point", "part", "layer"),
    [
        ("patch_embed.proj.weight", "edges", "patch_embed.proj"),
        ("patch_embed.proj.input", "edges", "patch_embed.proj"),
        ("blocks.10.attn.qkv.weight", "attention_weights", "blocks.10"),
        ("blocks.10.attn.proj.input", "attention_inputs", "blocks.10"),
        ("blocks.1.attn.q", "attention_activations", "blocks.1"),
        ("blocks.1.attn.map", "attention_activations", "blocks.1"),
        ("blocks.1.mlp.fc2.weight", "mlp", "blocks.1"),
        ("layers.2.blocks.0.mlp.fc1.input", "mlp", "layers.2.blocks.0"),
        ("layers.1.downsample.reduction.weight", "between", "layers.1.downsample.reduction"),
        ("head.weight", "edges", "head"),
    ],
)
def test_where_a_point_belongs(point: str, part: str, layer: str) -> None:
    assert (part_of(point), layer_of(point)) == (part, layer)


def test_every_part_and_layer_alone(make_student: Callable[..., nn.Module], small_vit: Callable[..., nn.Module]) -> None:
    student = make_student(small_vit(**SIZES), weight_bits=2, act_bits=2)
    seen: list[frozenset[str]] = []

    def top1() -> float:
        seen.append(frozenset(name for name, q in quantization_points(student).items() if q.enabled))
        return float(len(seen))

    measured = part_sensitivity(student, top1)
    everything = frozenset(quantization_points(student))
    assert (measured.none, measured.all) == (1, 2)
    assert seen[:2] == [frozenset(), everything]
    parts, layers = seen[2:7], seen[7:]
    # Parts are disjoint and make up the whole; so do layers.
    for groups in (parts, layers):
        assert frozenset().union(*groups) == everything
        assert sum(map(len, groups)) == len(everything)
    assert list(measured.parts) == [part for part in PARTS if part != "between"]
    assert list(measured.layers) == ["patch_embed.proj", "blocks.0", "blocks.1", "head"]
    assert parts[1] == {f"blocks.{i}.attn.{name}.weight" for i in (0, 1) for name in ("qkv", "proj")}
    assert parts[3] == {f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("q", "k", "v", "map")}
    assert len(seen) == evaluations(student)
    assert all(q.enabled for q in quantization_points(student).values())


def test_attention_weights_alone_are_quantized(
    make_student: Callable[..., nn.Module], small_vit: Callable[..., nn.Module]
) -> None:
    """Weights rounded by hand in the float model give the same logits as the part alone."""
    student: Any = make_student(small_vit(**SIZES), weight_bits=2, act_bits=2)
    images = torch.randn(3, 3, 8, 8)
    logits: list[torch.Tensor] = []

    def top1() -> float:
        with torch.no_grad():
            logits.append(student(images))
        return 0.0

    part_sensitivity(student, top1)
    rounded = logits[2 + list(PARTS).index("attention_weights")]
    with torch.no_grad(), float_mode(student):
        assert torch.equal(logits[0], student(images))
        for block in student.blocks:
            for layer in (block.attn.qkv, block.attn.proj):
                scale = layer.weight_quantizer.scale
                layer.weight.copy_((layer.weight / scale).round().clamp(-2, 1) * scale)
        expected = student(images)
    torch.testing.assert_close(rounded, expected, rtol=1e-4, atol=1e-5)
    assert F.mse_loss(rounded, logits[0]) > 1e-6
