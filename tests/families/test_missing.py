"""The words of a refusal: all that a model would need, once each, or nothing."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from qvit.families.missing import lacks


def named(*classes: str) -> nn.Module:
    """A model with modules of classes of these names."""
    return nn.Sequential(*(type(name, (nn.Module,), {})() for name in classes))


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        ((), ""),
        (("Linear", "Conv2d"), ""),
        (("RmsNorm", "RmsNorm"), "qvit has no integer operations for RMSNorm"),
        (("GluMlp", "SwiGLU", "RmsNorm"), "qvit has no integer operations for gated MLPs and RMSNorm"),
        (
            ("HybridEmbed", "DiffParallelScalingBlock"),
            "qvit has no integer operations for convolutional stems, attention and MLP side by side and differential attention",
        ),
    ],
)
def test_sentences(classes: tuple[str, ...], sentence: str) -> None:
    assert lacks(named(*classes)) == sentence


def test_of_timm() -> None:
    with torch.device("meta"):
        eva = timm.create_model("vit_small_plus_patch16_dinov3", depth=1)
        resnet = timm.create_model("resnet18")
    assert lacks(eva) == "qvit has no integer operations for rotary position embeddings and gated MLPs"
    assert lacks(resnet) == ""
