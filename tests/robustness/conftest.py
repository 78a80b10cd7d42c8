"""Models that the engine is attacked with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import qvit
from qvit.engines import Runner, create_engine
from qvit.integer.model import IntegerModel


@pytest.fixture(scope="session")
def models(
    make_student: Callable[..., nn.Module], small_vit: Callable[..., Any], small_swin: Callable[..., Any], perturb: Any
) -> dict[str, IntegerModel]:
    """Small models of several widths, granularities and architectures."""
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 1, "num_classes": 5}

    averaged = {"global_pool": "avg", "class_token": False, "pos_embed": "none"}

    def frozen(name: str = "deit_tiny_patch16_224", options: dict[str, Any] | None = None, **spec: Any) -> IntegerModel:
        return qvit.freeze(perturb(make_student(small_vit(name, **tiny | (options or {})), **spec)))

    return {
        "w4a4": frozen(weight_bits=4, act_bits=4),
        "w2a2": frozen(weight_bits=2, act_bits=2),
        "w3a8": frozen(weight_bits=3, act_bits=8),
        "distilled": frozen("deit_tiny_distilled_patch16_224", weight_bits=3, act_bits=3),
        "average": frozen("vit_tiny_patch16_224", averaged, weight_bits=4, act_bits=4),
        "swin": qvit.freeze(perturb(make_student(small_swin(img_size=16, patch_size=2), weight_bits=4, act_bits=3))),
    }


@pytest.fixture(scope="session")
def runners(models: dict[str, IntegerModel]) -> dict[str, Runner]:
    """The CPU engine of each."""
    return {name: Runner(model, create_engine(model, "cpu", threads=2)) for name, model in models.items()}


@pytest.fixture
def pixels() -> np.ndarray:
    """Three images for any of the models."""
    return np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """Where the file of a case lies; what a crash leaves behind there is what caused it."""
    return tmp_path / "case.qvit"
