"""The contract of the project: what was trained is what runs.

The fake-quantized training graph and the reference engine, which share no code beyond the exact matrix product, must give the
same codes at every quantization point. On a CPU they give the same bits, so these tests ask for that.
"""

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
from qvit.engines.reference import ReferenceEngine
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from qvit.integer.packing import pack
from qvit.layers.points import quantization_points, record_codes
from qvit.preprocessing import Preprocessing
from qvit.spec import HalfStep, ModelSpec, Operand, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from tests.engines.cases import ARCHITECTURES, GRANULARITIES, SMALL, SWIN_GRANULARITIES, SWINS

Factory = Callable[..., Any]


def _images(student: Any, count: int = 3) -> torch.Tensor:
    """Random pixels as the model's preprocessing normalises them."""
    preprocessing = student.qvit.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (count, *preprocessing.input_size), dtype=np.uint8)
    return torch.from_numpy(preprocessing.normalise(pixels))


def _assert_same(student: Any, images: torch.Tensor, tmp_path: Path) -> None:
    """Freezes, saves, loads and runs, and compares every code with those of the training graph."""
    qvit.freeze(student).save(tmp_path / "m.qvit")
    engine = ReferenceEngine(IntegerModel.load(tmp_path / "m.qvit"))
    with torch.no_grad(), record_codes(student) as expected:
        wanted = student(images)
    codes: dict[str, torch.Tensor] = {}
    logits = engine.forward(images, codes)
    assert codes.keys() == expected.keys() == {n for n in quantization_points(student) if not n.endswith(".weight")}
    for name, code in expected.items():
        assert code.shape == codes[name].shape, name
        spec = quantization_points(student)[name].spec
        assert spec.qn <= int(codes[name].min()), name
        assert int(codes[name].max()) <= spec.qp, name
        # Codes that are all the same would agree whatever the engine does.
        assert code.unique().numel() > 1, name
        assert torch.equal(code, codes[name]), name
    assert torch.equal(wanted, logits)
    assert logits.std() > 1e-3


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits: int, make_student: Factory, small_vit: Factory, perturb: Factory, tmp_path: Path) -> None:
    student = perturb(make_student(small_vit(**SMALL), weight_bits=bits, act_bits=bits))
    _assert_same(student, _images(student), tmp_path)


@pytest.mark.parametrize("fields", GRANULARITIES.values(), ids=GRANULARITIES.keys())
def test_every_granularity(
    fields: dict[str, Any], make_student: Factory, small_vit: Factory, perturb: Factory, tmp_path: Path
) -> None:
    student = perturb(make_student(small_vit(**SMALL), **fields))
    _assert_same(student, _images(student), tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_of_swin(bits: int, make_student: Factory, small_swin: Factory, perturb: Factory, tmp_path: Path) -> None:
    student = perturb(make_student(small_swin(), weight_bits=bits, act_bits=bits))
    _assert_same(student, _images(student, 2), tmp_path)


@pytest.mark.parametrize("options", SWINS.values(), ids=SWINS.keys())
def test_every_swin(
    options: dict[str, Any], make_student: Factory, small_swin: Factory, perturb: Factory, tmp_path: Path
) -> None:
    student = perturb(make_student(small_swin(**options), weight_bits=3, act_bits=2))
    _assert_same(student, _images(student, 2), tmp_path)


@pytest.mark.parametrize("fields", SWIN_GRANULARITIES.values(), ids=SWIN_GRANULARITIES.keys())
def test_every_granularity_of_swin(
    fields: dict[str, Any], make_student: Factory, small_swin: Factory, perturb: Factory, tmp_path: Path
) -> None:
    student = perturb(make_student(small_swin(), **fields))
    _assert_same(student, _images(student, 2), tmp_path)


def test_groups_of_input_channels_in_swin(make_student: Factory, small_swin: Factory, perturb: Factory, tmp_path: Path) -> None:
    overrides = {f"layers.*.{operand}": {"scale": "per_group_64"} for operand in ("weight", "input")}
    student = perturb(make_student(small_swin(embed_dim=64, depths=(1, 1)), overrides=overrides))
    _assert_same(student, _images(student, 2), tmp_path)


def test_a_calibrated_swin(small_swin: Factory, tmp_path: Path) -> None:
    student = qvit.quantize(small_swin(), bits=3).eval()
    images = _images(student, 4)
    qvit.calibrate(student, [images], images=4)
    _assert_same(student, images, tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_statsq_at_every_end(bits: int, make_student: Factory, small_vit: Factory, perturb: Factory, tmp_path: Path) -> None:
    model = small_vit(**SMALL | {"embed_dim": 120, "num_heads": 5})
    student = perturb(make_student(model, weight_bits=bits, act_bits=bits, weight_quantizer="statsq"))
    _assert_same(student, _images(student), tmp_path)


@pytest.mark.parametrize("operands", [("weight",), ("input",), ("weight", "input")])
@pytest.mark.parametrize("size", [64, 128])
def test_groups_of_input_channels(
    operands: tuple[str, ...], size: int, make_student: Factory, small_vit: Factory, perturb: Factory, tmp_path: Path
) -> None:
    overrides = {f"blocks.*.{operand}": {"scale": f"per_group_{size}"} for operand in operands}
    student = perturb(make_student(small_vit(**SMALL | {"embed_dim": 128, "num_heads": 2, "depth": 1}), overrides=overrides))
    _assert_same(student, _images(student, 2), tmp_path)


@pytest.mark.parametrize(("name", "options"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_architecture(
    name: str, options: dict[str, Any], make_student: Factory, small_vit: Factory, perturb: Factory, tmp_path: Path
) -> None:
    student = perturb(make_student(small_vit(name, **SMALL | options)))
    _assert_same(student, _images(student), tmp_path)


def test_after_calibration_and_in_the_state_that_a_checkpoint_restores(small_vit: Factory, tmp_path: Path) -> None:
    student = qvit.quantize(small_vit(**SMALL), spec=ModelSpec.of_bits(3))
    images = _images(student, 4)
    qvit.calibrate(student, [images], images=4)
    restored = qvit.quantize(small_vit(**SMALL), spec=ModelSpec.of_bits(3))
    restored.load_state_dict(student.state_dict())
    _assert_same(restored.eval(), images, tmp_path)


def test_the_comparison_can_fail(make_student: Factory, small_vit: Factory, perturb: Factory, tmp_path: Path) -> None:
    student = perturb(make_student(small_vit(**SMALL)))
    images = _images(student)
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.blocks[0].attn.v_quantizer.offset.add_(0.05)
    qvit.freeze(student)
    codes: dict[str, torch.Tensor] = {}
    ReferenceEngine(qvit.freeze(other)).forward(images, codes)
    with torch.no_grad(), record_codes(student) as expected:
        student(images)
    assert torch.equal(expected["blocks.0.attn.map"], codes["blocks.0.attn.map"])
    assert not torch.equal(expected["blocks.0.attn.proj.input"], codes["blocks.0.attn.proj.input"])


# --- single operations against NumPy in wide integers ------------------------------------------------------------------


def _layer(rng: np.random.Generator, m: int, k: int, bits: int, scale_x: Any, scale_w: Any, offset_w: Any = None) -> ops.Linear:
    tokens = 5
    shapes = {PerTensor: (1,), PerToken: (tokens, 1), PerGroup: (k // 64,)}
    shapes_w = {PerTensor: (1,), PerChannel: (m, 1), PerGroup: (m, k // 64)}
    source = ops.Quantizer(
        QuantSpec(bits, scale=scale_x), rng.uniform(0.5, 2, shapes[type(scale_x)]).astype(np.float32), offset=None
    )
    spec = QuantSpec(bits, signed=True, scale=scale_w, offset=offset_w, operand=Operand.WEIGHT)
    codes = rng.integers(spec.qn, spec.qp + 1, (m, k))
    weight = ops.Weight(spec, (m, k), pack(codes, bits), rng.uniform(0.5, 2, shapes_w[type(scale_w)]).astype(np.float32))
    return ops.Linear("layer", source, weight, rng.normal(size=m).astype(np.float32))


def _engine_for(layer: ops.Linear) -> ReferenceEngine:
    """An engine around a single layer."""

    class OneLayer:
        def linears(self) -> list[ops.Linear]:
            return [layer]

    return ReferenceEngine(OneLayer())  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_x", [PerTensor(), PerToken(), PerGroup(64)])
@pytest.mark.parametrize("scale_w", [PerTensor(), PerChannel(), PerGroup(64)])
def test_linear_against_numpy(bits: int, scale_x: Any, scale_w: Any) -> None:
    rng = np.random.default_rng(bits)
    m, k = 7, 128
    layer = _layer(rng, m, k, bits, scale_x, scale_w)
    codes = rng.integers(0, layer.input.spec.qp + 1, (2, 5, k))
    y = _engine_for(layer).linear(torch.from_numpy(codes).to(torch.int16), layer).numpy()

    x = codes * _wide(layer.input.scale, scale_x, 64)
    w = layer.weight.codes().astype(np.int64) * _wide(layer.weight.scale, scale_w, 64)
    assert layer.bias is not None
    np.testing.assert_allclose(y, x @ w.T + layer.bias, rtol=1e-5, atol=1e-4 * float(np.abs(x @ w.T).max()))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_x", [PerTensor(), PerToken(), PerGroup(64)])
@pytest.mark.parametrize("scale_w", [PerTensor(), PerChannel()])
def test_linear_with_weights_at_odd_half_steps_against_numpy(bits: int, scale_x: Any, scale_w: Any) -> None:
    rng = np.random.default_rng(bits)
    layer = _layer(rng, 7, 128, bits, scale_x, scale_w, HalfStep())
    codes = rng.integers(0, layer.input.spec.qp + 1, (2, 5, 128))
    y = _engine_for(layer).linear(torch.from_numpy(codes).to(torch.int16), layer).numpy()
    x = codes * _wide(layer.input.scale, scale_x, 64)
    w = (layer.weight.codes() + 0.5) * layer.weight.scale.astype(np.float64)
    np.testing.assert_allclose(y, x @ w.T + layer.bias, rtol=1e-5, atol=1e-4 * float(np.abs(x @ w.T).max()))


def _wide(scale: np.ndarray, granularity: Any, size: int) -> np.ndarray:
    scale = scale.astype(np.float64)
    return np.repeat(scale, size, axis=-1) if isinstance(granularity, PerGroup) else scale


def test_sums_are_exact_integers_where_float32_is_not() -> None:
    # 3,001 products of 8-bit codes at their ends: the sums need more than the 24 bits of a float32.
    rng = np.random.default_rng(0)
    layer = _layer(rng, 3, 3001, 8, PerTensor(), PerTensor())
    one = np.ones(1, np.float32)
    source = ops.Quantizer(layer.input.spec, one, None)
    worst = np.full((3, 3001), -128)
    worst[1] = rng.integers(-128, 128, 3001)
    worst[2, ::2] = 127
    layer = ops.Linear("layer", source, ops.Weight(layer.weight.spec, (3, 3001), pack(worst, 8), one), None)
    codes = np.full((1, 5, 3001), 255)
    codes[0, 1:] = rng.integers(200, 256, (4, 3001))
    exact = codes.astype(np.int64) @ worst.T.astype(np.int64)
    assert np.abs(exact).max() > 1 << 24
    y = _engine_for(layer).linear(torch.from_numpy(codes).to(torch.int16), layer)
    # The epilogue is float32: the exact sum, rounded once.
    assert (y.numpy() == exact.astype(np.float32)).all()


def test_codes_are_rounded_half_to_even_and_clamped() -> None:
    spec = QuantSpec(3, signed=True, operand=Operand.INPUT)
    quantizer = ops.Quantizer(spec, np.asarray([0.5], np.float32), None)
    engine = _engine_for(_layer(np.random.default_rng(0), 1, 64, 2, PerTensor(), PerTensor()))
    x = torch.tensor([-9.0, -2.0, -1.25, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 1.5, 9.0])
    assert engine.quantize(x, quantizer).tolist() == [-4, -4, -2, -2, 0, 0, 0, 2, 2, 3, 3]
    assert engine.quantize(x, quantizer).dtype == torch.int16


# --- real images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_real_teacher_on_real_images(bits: int, data_dir: Path, set_plausible_scales: Factory) -> None:
    """The contract on the trained ViT-S/14 (its first two blocks, which take seconds) and real images."""
    from qvit.analyze.agreement import agreement
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
    loader = evaluation_loader(source, preprocessing, 3, indices=range(0, len(source), len(source) // 3))
    set_plausible_scales(student, next(iter(loader))[0])
    measured = agreement(student, ReferenceEngine(qvit.freeze(student)), loader)
    assert measured.images >= 3
    assert measured.holds, measured


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    ],
)
def test_features_are_what_timm_gives_before_the_head(
    small_vit: Factory, make_student: Factory, name: str, options: dict[str, Any]
) -> None:
    student = make_student(small_vit(name, **SMALL, **options))
    images = _images(student)
    features = ReferenceEngine(qvit.freeze(student)).features(images)
    with torch.no_grad():
        expected = student.forward_head(student.forward_features(images), pre_logits=True)
    assert features.shape == (3, 24)
    # timm averages tokens in float32, the integer model in float64.
    torch.testing.assert_close(features, expected, rtol=0.0, atol=1e-6 if options else 0.0)


# --- a residual stream of float16 ----------------------------------------------------------------------------------------


class _Recorder(ReferenceEngine):
    """Keeps what enters every LayerNorm over the residual stream."""

    def norm(self, x: torch.Tensor, norm: ops.LayerNorm | None) -> torch.Tensor:
        if norm is not None and norm is not self.model.norm_pre:
            self.__dict__.setdefault("read", []).append(x)
        return super().norm(x, norm)


def _is_half(x: torch.Tensor) -> bool:
    return np.array_equal(x.numpy(), x.numpy().astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("residual", ["float32", "float16"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_what_reads_the_residual_stream_reads_it_rounded(
    family: str, residual: str, frozen: IntegerModel, frozen_swin: IntegerModel
) -> None:
    model = frozen if family == "vit" else frozen_swin
    model = IntegerModel.from_tensors({**model.header, "residual": residual}, model.tensors)
    engine = _Recorder(model)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *model.preprocessing.input_size), dtype=np.uint8)
    images = torch.from_numpy(model.preprocessing.normalise(pixels))
    logits = engine.forward(images)
    read = engine.__dict__["read"]
    assert len(read) == 2 * len(model.blocks) + 1 + sum(stage.merging is not None for stage in model.stages)
    assert [_is_half(x) for x in read] == [residual == "float16"] * len(read)
    assert not _is_half(logits)
    features = engine.features(images)
    assert not _is_half(features)  # what norm and pooling make of it is not rounded
    plain = ReferenceEngine(IntegerModel.from_tensors({**model.header, "residual": "float32"}, model.tensors))
    assert torch.equal(plain.forward(images), logits) == (residual == "float32")


@pytest.mark.parametrize("case", ["distilled", "register tokens", "LayerScale", "norm before the blocks", "no positions"])
def test_a_trained_stream_of_float16_is_what_runs(
    case: str, make_student: Factory, small_vit: Factory, perturb: Factory, tmp_path: Path
) -> None:
    name, options = ARCHITECTURES[case]
    student = perturb(make_student(small_vit(name, **SMALL | options), residual="float16"))
    _assert_same(student, _images(student), tmp_path)


@pytest.mark.parametrize("name", ["two stages", "three stages"])
def test_a_trained_stream_of_float16_of_swin_is_what_runs(
    name: str, make_student: Factory, small_swin: Factory, perturb: Factory, tmp_path: Path
) -> None:
    student = perturb(make_student(small_swin(**SWINS[name]), residual="float16"))
    _assert_same(student, _images(student, 2), tmp_path)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_calibrated_stream_of_float16_is_what_runs(
    family: str, small_vit: Factory, small_swin: Factory, tmp_path: Path
) -> None:
    model = small_vit(**SMALL) if family == "vit" else small_swin()
    student = qvit.quantize(model, spec=ModelSpec.of_bits(3, residual="float16")).eval()
    images = _images(student, 4)
    qvit.calibrate(student, [images], images=4)
    _assert_same(student, images, tmp_path)


def test_half_is_ieees(frozen: IntegerModel) -> None:
    engine = ReferenceEngine(IntegerModel.from_tensors({**frozen.header, "residual": "float16"}, frozen.tensors))
    values = np.array(
        [0.0, -0.0, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 3 * 2**-26, 65504.0, 65519.0, 65520.0, -1e9], np.float32
    )
    expected = np.array([0, 0, 1, 1 + 2**-9, 2**-24, 0, 2**-24, 65504, 65504, np.inf, -np.inf], np.float32)
    assert np.array_equal(engine.stream(torch.from_numpy(values)).numpy(), expected)
