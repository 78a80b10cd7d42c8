"""The compiled engine against the reference engine: every code at every activation point, and the logits, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import qvit
from qvit.engines.cpu import CpuEngine, _native
from qvit.engines.cpu.build import tap_shapes
from qvit.engines.reference import ReferenceEngine
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.layers.points import quantization_points
from qvit.preprocessing import Preprocessing
from qvit.spec import ModelSpec
from tests.engines.cases import ARCHITECTURES, GRANULARITIES, SMALL

Factory = Callable[..., Any]


def _pixels(model: IntegerModel, count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *model.preprocessing.input_size), dtype=np.uint8)


def _assert_same(model: IntegerModel, count: int = 3, varied: bool = True) -> None:
    """varied: no point's codes are all the same, which would agree whatever the engine does."""
    pixels = _pixels(model, count)
    images = model.preprocessing.normalise(pixels)
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, np.ndarray] = {}
    logits = ReferenceEngine(model).forward(torch.from_numpy(images), wanted).numpy()
    engine = CpuEngine(model, threads=2)
    shown = engine.forward(images, codes)
    assert codes.keys() == wanted.keys()
    for name, code in wanted.items():
        assert codes[name].dtype == np.int16
        assert codes[name].shape == code.shape, name
        assert not varied or code.unique().numel() > 1, name
        differ = int((codes[name] != code.numpy()).sum())
        assert differ == 0, f"{differ} of {code.numel()} codes differ at {name}"
    assert np.array_equal(shown, logits)
    # Without showing codes the last block computes pooled tokens alone; and pixels are what images are made from.
    assert np.array_equal(engine.run(images), logits)
    assert np.array_equal(engine.run(pixels), logits)
    assert logits.std() > 1e-3


@pytest.fixture
def student(make_student: Factory, small_vit: Factory, perturb: Factory) -> Factory:
    """``student(name, options of the architecture, **fields of ModelSpec)``: frozen."""

    def make(name: str = "deit_tiny_patch16_224", options: dict[str, Any] | None = None, **fields: Any) -> IntegerModel:
        return qvit.freeze(perturb(make_student(small_vit(name, **SMALL | (options or {})), **fields)))

    return make


# Heads of 64 channels, the width that has its own code, over 37 tokens; MLP and classes of odd sizes.
_WIDE: dict[str, Any] = {
    "embed_dim": 128,
    "num_heads": 2,
    "img_size": 48,
    "patch_size": 8,
    "mlp_ratio": 1.3,
    "num_classes": 11,
    "depth": 1,
}


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits: int, student: Factory) -> None:
    _assert_same(student(weight_bits=bits, act_bits=bits))
    _assert_same(student(options=_WIDE, weight_bits=bits, act_bits=bits))


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 3), (3, 8), (4, 2), (4, 5), (4, 8), (8, 2), (6, 7)])
def test_mixed_widths(weight_bits: int, act_bits: int, student: Factory) -> None:
    _assert_same(student(options=_WIDE, weight_bits=weight_bits, act_bits=act_bits))


@pytest.mark.parametrize("fields", GRANULARITIES.values(), ids=GRANULARITIES.keys())
def test_every_granularity(fields: dict[str, Any], student: Factory) -> None:
    _assert_same(student(**fields))
    _assert_same(student(options=_WIDE | {"depth": 2}, **fields), 2)


@pytest.mark.parametrize("operands", [("weight",), ("input",), ("weight", "input")])
@pytest.mark.parametrize("size", [64, 128])
def test_groups_of_input_channels(operands: tuple[str, ...], size: int, student: Factory) -> None:
    overrides = {f"blocks.*.{operand}": {"scale": f"per_group_{size}"} for operand in operands}
    _assert_same(student(options={"embed_dim": 128, "num_heads": 2, "depth": 1}, overrides=overrides))


@pytest.mark.parametrize(("name", "options"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_architecture(name: str, options: dict[str, Any], student: Factory) -> None:
    _assert_same(student(name, options))


@pytest.mark.parametrize("isa", _native.isa_names().split(", "))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_instruction_set(isa: str, bits: int, student: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_ISA", isa)
    model = student(options=_WIDE, weight_bits=bits, act_bits=bits)
    assert CpuEngine(model).isa == isa
    _assert_same(model)
    if bits in (2, 8):
        for fields in (
            GRANULARITIES["q offset per channel, k per token"],
            GRANULARITIES["input signed"],
            GRANULARITIES["q, k per token, learned offsets"],
            {"overrides": {"blocks.*.qkv.weight": {"scale": "per_group_64"}}},
            {"weight_quantizer": "statsq"},
        ):
            _assert_same(student(options=_WIDE, weight_bits=bits, act_bits=bits, **fields), 1)


HALF = ["distilled", "average of patches, no class token", "register tokens", "positions of patches alone", "no positions"]
HALF += ["LayerScale", "norm before the blocks"]


@pytest.mark.parametrize("case", HALF)
def test_a_stream_of_float16(case: str, student: Factory) -> None:
    name, options = ARCHITECTURES[case]
    _assert_same(student(name, options, residual="float16"))


@pytest.mark.parametrize("isa", _native.isa_names().split(", "))
def test_a_stream_of_float16_with_every_instruction_set(isa: str, student: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_ISA", isa)
    options = _WIDE | {"depth": 2, "embed_dim": 126, "mlp_ratio": 2, "init_values": 0.5}  # rows end within a vector
    model = student("vit_tiny_patch16_224", options, residual="float16")
    _assert_same(model)
    _assert_same(student(residual="float16", overrides={"blocks.*.input": {"scale": "per_token"}}))  # another form of sums
    overrides = {"blocks.*.weight": {"scale": "per_group_64"}}
    _assert_same(student(options={"embed_dim": 128, "num_heads": 2, "depth": 1}, residual="float16", overrides=overrides), 1)
    plain = IntegerModel.from_tensors({**model.header, "residual": "float32"}, model.tensors)
    assert not np.array_equal(CpuEngine(plain).run(_pixels(model, 2)), CpuEngine(model).run(_pixels(model, 2)))


@pytest.mark.parametrize("isa", _native.isa_names().split(", "))
def test_every_instruction_set_rounds_to_float16_as_ieee_says(isa: str) -> None:
    """Every float16, the ties between them and the float32 beside both; what overflows, and what is no number."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    ties = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    edges = np.float32([65519.996, 65520, -65520, 1e9, -3e38, 1e-30, -1e-45, 0.0, -0.0])
    near = np.concatenate([halves, ties, edges])
    beside = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([near, *beside, np.float32([np.inf, -np.inf, np.nan])])
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16).astype(np.float32)
    for some in (slice(None), slice(0, 1), slice(1000, 1037)):
        rounded = x[some].copy()
        _native.to_half(isa, rounded)
        numbers = ~np.isnan(wanted[some])
        assert np.array_equal(np.isnan(rounded), ~numbers)
        assert np.array_equal(rounded.view(np.int32)[numbers], wanted[some].view(np.int32)[numbers])  # signs of zero too


def test_a_stream_that_overflows_float16_harms_nothing(student: Factory) -> None:
    """Infinite where float32 is not, so other logits; what runs next is as it should be."""
    model = student("vit_tiny_patch16_224", {"init_values": 0.5}, residual="float16")
    tensors = {name: np.full_like(t, 6e4) if name.endswith("gamma") else t for name, t in model.tensors.items()}
    pixels = _pixels(model, 2)

    def run(residual: str) -> np.ndarray:
        return CpuEngine(IntegerModel.from_tensors({**model.header, "residual": residual}, tensors)).run(pixels)

    logits = run("float32")
    assert np.isfinite(logits).all()
    assert run("float16").shape == logits.shape == (2, SMALL["num_classes"])
    assert not np.array_equal(run("float16"), logits)
    _assert_same(model)


def test_close_calls(student: Factory) -> None:
    """A million 8-bit codes: of these float32 alone would get some wrong."""
    _assert_same(student(options=_WIDE | {"depth": 2}, weight_bits=8, act_bits=8), 24)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("step", [1e-6, 0.02, 0.06, 0.1, 0.2, 1.0, 1e6])
def test_codes_behind_gelu(step: float, activation: str, make_student: Factory, small_vit: Factory) -> None:
    """From steps that resolve the dip below zero, where thresholds give up, to such as see none of it, or nothing at all."""
    student = make_student(small_vit(**SMALL | {"act_layer": activation, "depth": 1}), weight_bits=4, act_bits=4)
    quantizer = quantization_points(student)["blocks.0.mlp.fc2.input"]
    for bits in (4, 3, 2):
        changed = copy.deepcopy(student)
        other = quantization_points(changed)["blocks.0.mlp.fc2.input"]
        offset = torch.linspace(-0.4, 0.1, quantizer.offset.numel())
        other.set_parameters(torch.full_like(quantizer.scale, step), offset)
        other.spec = type(other.spec)(**{**vars(other.spec), "bits": bits})
        _assert_same(qvit.freeze(changed), varied=False)


def test_pixels_of_fewer_bits(student: Factory) -> None:
    _assert_same(student(edge_bits=4))
    _assert_same(student("vit_tiny_patch16_224", {"img_size": (37, 23), "patch_size": (11, 7)}, edge_bits=3))


def test_tensors_in_tensors_out(student: Factory) -> None:
    model = student()
    images = model.preprocessing.normalise(_pixels(model, 2))
    codes: dict[str, Any] = {}
    logits = CpuEngine(model).forward(torch.from_numpy(images), codes)
    assert isinstance(logits, torch.Tensor)
    assert {name: tuple(code.shape) for name, code in codes.items()} == tap_shapes(model, 2)
    assert all(isinstance(code, torch.Tensor) for code in codes.values())
    assert np.array_equal(logits.numpy(), CpuEngine(model).run(images))


def test_the_comparison_can_fail(student: Factory) -> None:
    model = student()
    tensors = dict(model.tensors)
    tensors["blocks.0.attn.v_offset"] = tensors["blocks.0.attn.v_offset"] + np.float16(0.05)
    other = IntegerModel.from_tensors(model.header, tensors)
    images = model.preprocessing.normalise(_pixels(model, 2))
    codes: dict[str, np.ndarray] = {}
    changed: dict[str, np.ndarray] = {}
    CpuEngine(model).forward(images, codes)
    CpuEngine(other).forward(images, changed)
    assert np.array_equal(codes["blocks.0.attn.map"], changed["blocks.0.attn.map"])
    assert not np.array_equal(codes["blocks.0.attn.proj.input"], changed["blocks.0.attn.proj.input"])


def test_heads_that_are_too_wide_are_refused(student: Factory) -> None:
    model = student(options={"embed_dim": 520, "num_heads": 1, "depth": 1, "img_size": 16, "mlp_ratio": 0.1})
    with pytest.raises(UnsupportedModelError, match="Heads of 520 channels are too wide for the CPU engine"):
        CpuEngine(model)
    assert qvit.engines.create_engine(model).name == "reference"


@pytest.mark.parametrize("bits", [2, 4])
def test_real_teacher_on_real_images(bits: int, data_dir: Path, set_plausible_scales: Factory) -> None:
    """The trained ViT-S/14 (its first two blocks, which take seconds) on real images."""
    from qvit.sources import open_source
    from qvit.training.data import evaluation_loader

    weights, images = data_dir / "vit_small_patch14_224_imagenette.safetensors", data_dir / "imagenette224-val.tar"
    if not (weights.exists() and images.exists()):
        pytest.skip(f"{weights.name} or {images.name} is not in {data_dir}")
    teacher = timm.create_model("vit_small_patch16_224", patch_size=14, num_classes=10, depth=2)
    state = {name: t.float() for name, t in safetensors.torch.load_file(weights).items()}
    teacher.load_state_dict({name: t for name, t in state.items() if name in teacher.state_dict()})
    preprocessing = Preprocessing((3, 224, 224))
    student: Any = qvit.quantize(teacher.eval(), spec=ModelSpec.of_bits(bits), preprocessing=preprocessing)
    source = open_source(images, "val")
    batch = next(iter(evaluation_loader(source, preprocessing, 3, indices=range(0, len(source), len(source) // 3))))[0]
    set_plausible_scales(student, batch)
    model = qvit.freeze(student)
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(model).forward(batch, wanted)
    assert torch.equal(CpuEngine(model).forward(batch, codes), logits)
    for name, code in wanted.items():
        assert torch.equal(code, codes[name]), name
