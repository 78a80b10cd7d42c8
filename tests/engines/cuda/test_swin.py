"""The CUDA engine on Swin Transformers, against the reference engine: on a GPU where there is one, else in emulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, constants
from qvit.engines.cuda.device import Gpu
from qvit.engines.reference import ReferenceEngine
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from tests.engines.cases import SWIN_GRANULARITIES

Factory = Callable[..., Any]

# Heads of 32 channels, as in every Swin of timm. Two windows of 4 x 4 tokens, shifted in the second block; then one window.
SMALL: dict[str, Any] = {"embed_dim": 32, "num_heads": (1, 2), "img_size": (16, 32), "depths": (2, 1), "mlp_ratio": 1}
GEOMETRIES: dict[str, dict[str, Any]] = {
    # The seam in both directions; more heads than blocks of attention: several windows a block.
    "four windows": {"img_size": 32, "embed_dim": 64, "num_heads": (2, 4), "depths": (2, 1)},
    "window as large as the map": {"img_size": 16, "depths": (2,), "num_heads": (1,)},
    "odd windows": {"img_size": 40, "window_size": 5, "depths": (2,), "num_heads": (1,)},
    "windows of Swin-T": {"img_size": 28, "patch_size": 2, "window_size": 7, "depths": (2,), "num_heads": (1,)},
    "oblong windows, heads of 64": {"window_size": (2, 4), "embed_dim": 64, "depths": (2,), "num_heads": (1,)},
    "three stages": {"img_size": 32, "patch_size": 2, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "qkv_bias": False},
}


def _gpu(hopper: bool) -> Any:
    """A GPU, or an emulated one."""
    if not torch.cuda.is_available():
        from tests.engines.cuda.emulator import Emulated

        return Emulated(hopper)
    gpu = Gpu()
    if hopper and not gpu.hopper:
        pytest.skip("the GPU is no Hopper")
    gpu.hopper = hopper
    return gpu


@pytest.fixture(scope="module")
def gpu() -> Any:
    """With the kernels that every GPU runs."""
    return _gpu(hopper=False)


def _check(model: IntegerModel, gpu: Any, count: int = 3) -> None:
    """Every code and every logit is the reference engine's."""
    pixels = torch.randint(0, 256, (count, *model.preprocessing.input_size), dtype=torch.uint8)
    images = torch.from_numpy(model.preprocessing.normalise(pixels.numpy()))
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(model).forward(images, wanted)
    engine = CudaEngine(model, gpu)
    assert torch.equal(engine.forward(images, codes).cpu(), logits)
    assert wanted.keys() == codes.keys()
    for name, code in wanted.items():
        assert torch.equal(codes[name].cpu(), code), name
        assert code.unique().numel() > 1, name  # all the same would agree whatever the engine does
    for same in (pixels, images):
        assert torch.equal(engine.forward(same).cpu(), logits)
    assert torch.equal(engine.forward(pixels[:1]).cpu(), logits[:1])
    assert logits.std() > 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width(bits: int, gpu: Any, make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    _check(qvit.freeze(perturb(make_student(small_swin(**SMALL), weight_bits=bits, act_bits=bits))), gpu, 1)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(name: str, gpu: Any, make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    options = SMALL | GEOMETRIES[name]
    _check(qvit.freeze(perturb(make_student(small_swin(**options), weight_bits=3, act_bits=2))), gpu, 3)
