"""Shared fixtures: seeds, small models, calibrated students, real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU, Triton's kernels run under its interpreter; read when Triton is imported, which timm may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Of the processes that tests start; this one's are set below.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
from hypothesis import HealthCheck, settings
from torch import nn

import qvit.convert
from qvit.integer.freeze import freeze
from qvit.integer.model import IntegerModel
from qvit.layers.linear import QuantLinear
from qvit.layers.patch_embed import QuantPatchProjection
from qvit.layers.points import float_mode, quantization_points
from qvit.quantizers.lsq import LSQQuantizer
from qvit.spec import ModelSpec

torch.set_num_threads(1)  # models are small: a second thread waits more than it computes, and badly on a busy machine
settings.register_profile(
    "qvit",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("qvit")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU, under Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: the environment variable QVIT_DATA, by default ``../shared/data``."""
    folder = Path(os.environ.get("QVIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set QVIT_DATA")
    return folder


def _randomise(model: nn.Module, spread: float = 0.3) -> nn.Module:
    """Gives every parameter, LayerNorm and bias included, values that a trained model might have; in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() >= 2 and "token" not in name and "embed" not in name.split(".")[-1]:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith(("weight", "gamma")):
                parameter.copy_(1 + spread * noise)
            else:
                parameter.copy_(spread * noise)
    return model


def _small_vit(name: str = "deit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A float timm model with a few small blocks and random, not degenerate, parameters; in evaluation mode."""
    defaults: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 48, "num_classes": 7}
    return _randomise(timm.create_model(name, **(defaults | options))).eval()


def _small_swin(name: str = "swin_tiny_patch4_window7_224", **options: Any) -> nn.Module:
    """A float Swin Transformer of two small stages, with shifted and unshifted windows and random parameters.

    By default 8 x 8 tokens in 4 windows, in a shifted and an unshifted block, then 4 x 4 tokens in one window.
    """
    defaults: dict[str, Any] = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "window_size": 4}
    given = {"num_classes": 5} | defaults | options
    try:
        model = timm.create_model(name, **given)
    except TypeError:
        if isinstance(given["window_size"], int):
            raise
        pytest.skip(f"timm {timm.__version__} has no oblong windows")
    return _randomise(model).eval()


def _set_plausible_scales(student: nn.Module, images: torch.Tensor) -> nn.Module:
    """Gives every quantizer the scale (and offset) that spans the values it sees on ``images``; in place.

    Independent of `qvit.calibrate`, so that the tests of the layers do not rest on it. IRM stays at its initial values.
    """
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = inputs[0].detach()

        return hook

    points = {name: q for name, q in quantization_points(student).items() if isinstance(q, LSQQuantizer)}
    for name, module in student.named_modules():
        if isinstance(module, QuantLinear):
            handles.append(module.register_forward_pre_hook(keep(f"{name}.input")))
            seen[f"{name}.weight"] = module.weight.detach()
        elif isinstance(module, QuantPatchProjection):
            seen[f"{name}.weight"] = module.effective_weight().detach()
        elif hasattr(module, "rectify_q"):

            def attention_hook(module: Any, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                q, k, v = (t.detach() for t in module.rectified(inputs[0]))
                seen.update({f"{name}.q": q, f"{name}.k": k, f"{name}.v": v})
                seen[f"{name}.map"] = (q @ k.transpose(-2, -1) * module.scale).softmax(-1)

            handles.append(module.register_forward_pre_hook(attention_hook))
    with torch.no_grad(), float_mode(student):
        student(images)
    for handle in handles:
        handle.remove()
    for name, quantizer in points.items():
        spec, x = quantizer.spec, seen[name]
        low, high = x.amin().item(), x.amax().item()
        if spec.offset is None:
            reach = max(high / spec.qp, low / spec.qn if spec.qn else 0.0)
            scale, offset = reach, None
        else:
            scale = (high - low) / (spec.qp - spec.qn)
            offset = None if quantizer.offset is None else torch.full_like(quantizer.offset, low - scale * spec.qn)
        quantizer.set_parameters(torch.full_like(quantizer.scale, max(scale, 1e-4)), offset)
    return student


@pytest.fixture(scope="session")
def small_vit() -> Callable[..., nn.Module]:
    """``small_vit(name, **options of timm.create_model)``: a small float model with parameters that are not degenerate."""
    return _small_vit


@pytest.fixture(scope="session")
def small_swin() -> Callable[..., nn.Module]:
    """``small_swin(name, **options of timm.create_model)``: a small float Swin Transformer, not degenerate."""
    return _small_swin


@pytest.fixture(scope="session")
def set_plausible_scales() -> Callable[..., nn.Module]:
    """``set_plausible_scales(student, images)``: calibration for tests that must not rest on `qvit.calibrate`."""
    return _set_plausible_scales


@pytest.fixture(scope="session")
def make_student() -> Callable[..., nn.Module]:
    """``make_student(model=None, **fields of ModelSpec)``: a small student whose quantizers are calibrated."""

    def make(model: nn.Module | None = None, spec: ModelSpec | None = None, **fields: Any) -> nn.Module:
        model = _small_vit() if model is None else model
        student = qvit.convert.quantize(model, spec=spec or ModelSpec(**fields)).eval()
        info = student.qvit.architecture
        return _set_plausible_scales(student, torch.randn(4, info.in_chans, *info.img_size))

    return make


def _perturb(student: nn.Module) -> nn.Module:
    """Moves every parameter of a calibrated student away from where calibration left it, as training would; in place."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("_quantizer.scale"):
                parameter.mul_(torch.exp(0.2 * noise))
            else:
                parameter.add_(0.05 * noise * parameter.abs().mean().clamp_min(0.1))
    return student


@pytest.fixture(scope="session")
def perturb() -> Callable[[nn.Module], nn.Module]:
    """``perturb(student)``: every parameter moved at random, so that none sits at a default."""
    return _perturb


@pytest.fixture(scope="session")
def frozen(make_student: Callable[..., nn.Module], small_vit: Callable[..., nn.Module]) -> IntegerModel:
    """A frozen model of two tiny blocks at mixed widths, 10 classes, greyscale images of 8 x 8 pixels (the digits' size)."""
    torch.manual_seed(1)
    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 12, "num_heads": 3, "depth": 2}
    student = _perturb(make_student(small_vit("vit_tiny_patch16_224", **options), overrides={"*.fc1": 3, "*.fc2": 2}))
    return freeze(student, [f"digit {i}" for i in range(10)], {"fake_top1": 12.5, "data": "digits"})


@pytest.fixture(scope="session")
def frozen_swin(make_student: Callable[..., nn.Module]) -> IntegerModel:
    """A frozen Swin Transformer of two tiny stages (`_small_swin`) at mixed widths, 5 classes, 32 x 32 pixels."""
    torch.manual_seed(1)
    student = _perturb(make_student(_small_swin(), overrides={"*.fc1": 3, "*.fc2": 2}))
    return freeze(student, list("abcde"), {"fake_top1": 12.5, "data": "noise"})


@pytest.fixture
def frozen_file(frozen: IntegerModel, tmp_path: Path) -> Path:
    """`frozen` as a file in a folder of its own."""
    path = tmp_path / "model.qvit"
    frozen.save(path)
    return path
