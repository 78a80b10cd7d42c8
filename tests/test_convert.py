"""`quantize` and `rebuild`: what a student is, that its float function is the model's, that it can be restored."""

from __future__ import annotations

import copy
import io
import json

import pytest
import timm
import torch

from qvit.convert import StudentInfo, preprocessing_of, quantize, rebuild
from qvit.errors import NotCalibratedError, SpecError, UnsupportedModelError
from qvit.layers.attention import QuantAttention
from qvit.layers.linear import QuantLinear
from qvit.layers.patch_embed import QuantPatchProjection
from qvit.layers.points import float_mode, quantization_points
from qvit.layers.rectify import Rectify
from qvit.preprocessing import Preprocessing
from qvit.spec import HalfStep, ModelSpec, PerChannel, PerGroup, PerHead, PerTensor, PerToken

VARIANTS = {
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "patch 14": ("vit_tiny_patch16_224", {"patch_size": 14, "img_size": 42}),
    "patch 32": ("vit_tiny_patch16_224", {"patch_size": 32, "img_size": 64}),
    "not square": ("vit_tiny_patch16_224", {"patch_size": (8, 16), "img_size": (40, 32)}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.3}),
    "average pool": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "average pool with class token": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "deit 3": ("deit3_small_patch16_224", {}),
    "registers outside the embedding": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "clip quick gelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "fc norm": ("vit_tiny_patch16_224", {"global_pool": "token", "fc_norm": True}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 28}),
    "siglip": ("vit_base_patch16_siglip_gap_224", {}),
    "no biases": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "grey": ("vit_tiny_patch16_224", {"in_chans": 1}),
    "no position embedding": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
}


@pytest.fixture(params=list(VARIANTS), ids=lambda name: name.replace(" ", "_"))
def model(request, small_vit):
    name, options = VARIANTS[request.param]
    return small_vit(name, **options)


def images_for(model: torch.nn.Module, count: int = 2) -> torch.Tensor:
    """Normalised random pixels."""
    p = preprocessing_of(model)
    mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    return (torch.randint(0, 256, (count, *p.input_size)) / 255 - mean) / std


def test_the_float_function_is_unchanged_and_so_is_the_original(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    x = images_for(model)
    student = quantize(model, spec=ModelSpec(rectify=False))
    with float_mode(student), torch.no_grad():
        torch.testing.assert_close(student(x), model(x), rtol=1e-4, atol=1e-4)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # nothing is shared: training the student leaves the teacher alone
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in theirs for p in student.parameters())
    assert not hasattr(model, "qvit")
    assert type(student) is type(model)


def test_every_matrix_product_is_quantized(model) -> None:
    student = quantize(model, bits=3)
    for name, module in student.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            raise AssertionError(f"{name} stays in floating point")
    assert isinstance(student.patch_embed.proj, QuantPatchProjection)
    assert isinstance(student.head, QuantLinear)
    for block in student.blocks:
        assert isinstance(block.attn, QuantAttention)
        assert all(isinstance(m, QuantLinear) for m in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
        assert isinstance(block.attn.rectify_q, Rectify)
        assert isinstance(block.attn.rectify_k, Rectify)


def test_runs_once_calibrated_and_trains(model, set_plausible_scales) -> None:
    student = quantize(model, bits=4).eval()
    x = images_for(model)
    with pytest.raises(NotCalibratedError):
        student(x)
    set_plausible_scales(student, x)
    assert student(x).shape == (2, 7)
    assert torch.isfinite(student(x)).all()
    student.train()
    student(x).square().sum().backward()
    missing = [name for name, p in student.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


def test_eight_bits_follow_the_float_model(model, set_plausible_scales) -> None:
    student = quantize(model, spec=ModelSpec(8, 8, rectify=False)).eval()
    x = images_for(model, 8)
    set_plausible_scales(student, x)
    with torch.no_grad():
        want, got = model(x), student(x)
    assert (got - want).std() < 0.25 * want.std()
    assert not torch.equal(got, want)


def test_rebuild_and_load_state_dict_reproduce_the_student(model, set_plausible_scales) -> None:
    student = quantize(model, spec=ModelSpec(3, 2, overrides={"blocks.1.mlp": 4})).eval()
    x = images_for(model)
    set_plausible_scales(student, x)
    info = StudentInfo.from_dict(json.loads(json.dumps(student.qvit.to_dict())))
    assert info.to_dict() == student.qvit.to_dict()
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    buffer.seek(0)
    restored = rebuild(info).eval()
    with pytest.raises(NotCalibratedError):
        restored(x)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(restored(x), student(x))
    assert restored.qvit == info


def test_copies_are_independent(make_student) -> None:
    student = make_student()
    x = torch.randn(2, 3, 48, 48)
    other = copy.deepcopy(student)
    want = student(x)
    assert torch.equal(other(x), want)
    assert other.qvit == student.qvit
    with torch.no_grad():
        other.head.weight.zero_()
    assert torch.equal(student(x), want)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_default_bits_and_granularities(small_vit, bits: int) -> None:
    student = quantize(small_vit("deit_tiny_distilled_patch16_224"), bits=bits)
    for name, quantizer in quantization_points(student).items():
        edge = name.startswith(("patch_embed", "head"))
        assert quantizer.spec.bits == (8 if edge else bits), name
    attention = student.blocks[0].attn
    assert attention.qkv.weight_quantizer.spec.scale == PerChannel()
    assert attention.qkv.weight_quantizer.spec.signed
    assert attention.qkv.input_quantizer.spec.offset == PerChannel()
    assert (attention.q_quantizer.spec.scale, attention.q_quantizer.spec.offset) == (PerHead(), HalfStep())
    assert attention.v_quantizer.scale.shape == (3, 1, 16)
    assert attention.v_quantizer.offset.shape == (3, 1, 16)
    assert attention.map_quantizer.scale.shape == (3, 1, 1)
    assert attention.map_quantizer.offset is None
    assert student.head.input_quantizer.scale.shape == (1,)
    assert student.head.input_quantizer.offset.shape == (48,)
    assert student.blocks[0].mlp.fc2.weight_quantizer.scale.shape == (48, 1)


def test_overrides_apply_to_what_they_name_and_nothing_else(small_vit, set_plausible_scales) -> None:
    overrides = {
        "blocks.0": 8,
        "*.mlp.fc2.input": {"scale": "per_token", "signed": True},
        "blocks.1.mlp.fc2": {"bits": 3, "scale": PerGroup(64), "offset": None},
        "blocks.1.attn.q": {"scale": PerTensor(), "offset": "per_channel"},
        "head.weight": 4,
        "patch_embed": 6,
    }
    model = small_vit()
    student = quantize(model, spec=ModelSpec(2, 2, overrides=overrides))
    points = quantization_points(student)
    plain = quantization_points(quantize(model, bits=2))
    named = {name for name in points if points[name].spec != plain[name].spec}
    assert named == {name for name in points if name.startswith("blocks.0")} | {
        "blocks.1.mlp.fc2.input",
        "blocks.1.mlp.fc2.weight",
        "blocks.1.attn.q",
        "head.weight",
        "patch_embed.proj.input",
        "patch_embed.proj.weight",
    }
    assert all(q.spec.bits == 8 for name, q in points.items() if name.startswith("blocks.0"))
    assert points["blocks.0.mlp.fc2.input"].spec.scale == PerToken()
    assert points["blocks.0.mlp.fc2.input"].scale.shape == (10, 1)
    assert points["blocks.1.mlp.fc2.weight"].scale.shape == (48, 3)
    assert points["blocks.1.mlp.fc2.input"].scale.shape == (3,)
    assert points["blocks.1.attn.q"].offset.shape == (3, 1, 16)
    assert points["blocks.1.attn.q"].scale.shape == (1,)
    assert points["patch_embed.proj.input"].spec.bits == 6
    x = torch.randn(2, 3, 48, 48)
    assert set_plausible_scales(student.eval(), x)(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"blocks.2": 4}, r"'blocks\.2' matches no layer"),
        ({"blocks.0.attn.kqv": 4}, "matches no layer"),
        ({"*.fc1.input": {"scale": "per_channel"}}, r"blocks\.0\.mlp\.fc1\.input: .*equalis"),
        ({"head.input": {"scale": "per_token"}}, "no tokens"),
        ({"*.fc1.weight": {"scale": "per_group_64"}}, "groups of 64"),
        ({"*.attn.q": {"offset": "per_token"}}, r"blocks\.0\.attn\.q"),
        ({"*.weight": {"signed": False}}, "signed"),
        ({"*.v": {"offset": "per_pixel"}}, "per_pixel"),
        (
            {"blocks.1.mlp.fc2.weight": {"scale": PerGroup(64)}, "blocks.1.mlp.fc2.input": {"scale": "per_group_128"}},
            "one size|groups of 128",
        ),
        ({"patch_embed.proj.input": {"offset": None}}, r"patch_embed\.proj\.input"),
        ({"patch_embed.proj.input": {"signed": True}}, r"patch_embed\.proj\.input"),
        ({"patch_embed.proj.input": {"scale": "per_token"}}, r"patch_embed\.proj\.input"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(small_vit, overrides: dict, named: str) -> None:
    with pytest.raises(SpecError, match=named) as error:
        quantize(small_vit(), spec=ModelSpec(overrides=overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments", [{}, {"bits": 4, "spec": ModelSpec()}, {"bits": 1}, {"bits": 9}, {"bits": "4"}, {"bits": 4.0}]
)
def test_bits_or_spec(small_vit, arguments: dict) -> None:
    with pytest.raises(SpecError):
        quantize(small_vit(), **arguments)


def test_quantized_models_are_not_quantized_again(small_vit) -> None:
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        quantize(quantize(small_vit(), bits=4), bits=2)


def test_training_mode_is_kept(small_vit) -> None:
    assert quantize(small_vit().train(), bits=4).training
    assert not any(module.training for module in quantize(small_vit().eval(), bits=4).modules())


def test_preprocessing_is_timms_at_the_models_own_size() -> None:
    model = timm.create_model("vit_base_patch16_clip_224", depth=1, embed_dim=48, num_heads=3, img_size=(48, 64))
    p = quantize(model, bits=4).qvit.preprocessing
    assert p.input_size == (3, 48, 64)
    assert p.interpolation == "bicubic"
    assert p.crop_mode == "center"
    assert p.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    given = Preprocessing((3, 48, 64), 0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    student = quantize(model, bits=4, preprocessing=given)
    assert student.qvit.preprocessing == given
    torch.testing.assert_close(student.patch_embed.proj.input_quantizer.std[::256], torch.tensor(given.std))


def test_preprocessing_of_another_family() -> None:
    with pytest.raises(UnsupportedModelError, match="ResNet is not supported"):
        preprocessing_of(timm.create_model("resnet18"))


def test_preprocessing_of_other_channels(small_vit) -> None:
    p = quantize(small_vit("vit_tiny_patch16_224", in_chans=1), bits=4).qvit.preprocessing
    assert p.input_size == (1, 48, 48)
    assert len(p.mean) == len(p.std) == 1


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 48, 48)])
def test_preprocessing_for_another_model_is_refused(small_vit, size: tuple[int, int, int]) -> None:
    p = Preprocessing(size, mean=(0.5,) * size[0], std=(0.5,) * size[0])
    with pytest.raises(SpecError, match="input"):
        quantize(small_vit(), bits=4, preprocessing=p)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_deit_at_its_own_width(size: str) -> None:
    student = quantize(timm.create_model(f"deit_{size}_patch16_224", depth=1), bits=4)
    width = {"tiny": 192, "small": 384, "base": 768}[size]
    assert student.blocks[0].attn.q_quantizer.scale.shape == (width // 64, 1, 1)
    assert student.blocks[0].mlp.fc2.input_quantizer.offset.shape == (4 * width,)
    assert student.qvit.architecture.name == f"deit_{size}_patch16_224"
