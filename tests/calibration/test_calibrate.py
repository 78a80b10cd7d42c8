"""`calibrate`: the float function is kept, every quantizer is set, mistakes are named."""

import importlib

import pytest
import timm
import torch

import qvit
from qvit.errors import InputError, NotCalibratedError, UnsupportedModelError
from qvit.layers.points import float_mode, quantization_points
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.statsq import StatsQuantizer
from qvit.spec import Dims, ModelSpec, Operand

calibrate_module = importlib.import_module("qvit.calibration.calibrate")


def _images(model, count=8, seed=0):
    size = model.qvit.preprocessing
    mean, std = (torch.tensor(v)[:, None, None] for v in (size.mean, size.std))
    pixels = torch.randint(0, 256, (count, *size.input_size), generator=torch.Generator().manual_seed(seed))
    return (pixels / 255 - mean) / std


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.5}, {"class_token": False, "global_pool": "avg"}, {"qkv_bias": False}]
)
def test_equalisation_keeps_the_float_function(small_vit, options):
    model = small_vit("vit_tiny_patch16_224", **options)
    student = qvit.quantize(model, spec=ModelSpec.of_bits(4, rectify=False)).eval()
    images = _images(student)
    before = [p.clone() for p in student.parameters()]
    qvit.calibrate(student, [images], images=8)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert moved > 10
    with torch.no_grad(), float_mode(student):
        assert _relative(student(images), model(images)) < 1e-5


def test_statsq_needs_no_weight_scales(small_vit):
    student = qvit.quantize(small_vit(), spec=ModelSpec(weight_quantizer="statsq")).eval()
    images = _images(student)
    qvit.calibrate(student, [images], images=8)
    assert all(q.calibrated for q in quantization_points(student).values() if isinstance(q, LSQQuantizer))
    assert isinstance(student.blocks[0].mlp.fc1.weight_quantizer, StatsQuantizer)
    assert isinstance(student.head.weight_quantizer, LSQQuantizer)
    assert torch.isfinite(student(images)).all()


def test_without_equalisation_the_weights_stay(small_vit):
    model = small_vit()
    student = qvit.quantize(model, spec=ModelSpec.of_bits(4, rectify=False, equalise=False))
    qvit.calibrate(student, [_images(student)], images=8)
    assert torch.equal(student.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert torch.equal(student.blocks[1].norm2.weight, model.blocks[1].norm2.weight)


def test_rectified_model_keeps_the_float_function_nearly(small_vit):
    model = small_vit()
    student = qvit.quantize(model, bits=4).eval()
    images = _images(student)
    with torch.no_grad(), float_mode(student):
        default = _relative(student(images), model(images))
        qvit.calibrate(student, [images], images=8)
        fitted = _relative(student(images), model(images))
    assert fitted < 0.5 * default


def test_at_eight_bits_the_function_is_close(small_vit):
    model = small_vit()
    student = qvit.quantize(model, spec=ModelSpec.of_bits(8, rectify=False)).eval()
    images = _images(student, 16)
    qvit.calibrate(student, [images], images=16)
    with torch.no_grad():
        assert _relative(student(images), model(images)) < 0.1


def test_sets_every_quantizer_and_keeps_the_training_mode(small_vit):
    student = qvit.quantize(small_vit(), bits=3).train()
    with pytest.raises(NotCalibratedError, match=r"qvit\.calibrate"):
        student(_images(student))
    qvit.calibrate(student, ((batch, torch.zeros(len(batch))) for batch in _images(student).split(3)), images=8)
    assert student.training
    for quantizer in quantization_points(student).values():
        if isinstance(quantizer, LSQQuantizer):
            assert quantizer.calibrated
            assert quantizer.observer is None
            assert (quantizer.scale > 0).all()
    student(_images(student)).sum().backward()


def test_uses_as_many_images_as_asked_for(small_vit):
    model = small_vit()
    results = []
    for count, sizes in ((12, 4), (6, 6), (12, 12)):
        student = qvit.quantize(model, bits=4)
        images = 12 if sizes == 12 else 6
        qvit.calibrate(student, _images(student, 12)[:count].split(sizes), images=images)
        results.append(student.blocks[0].attn.qkv.input_quantizer.scale.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_needs_a_quantized_model(small_vit):
    with pytest.raises(UnsupportedModelError, match="not quantized"):
        qvit.calibrate(small_vit(), [torch.zeros(1, 3, 48, 48)])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 48, 48)]])
def test_no_images(small_vit, batches):
    with pytest.raises(InputError, match="no images"):
        qvit.calibrate(qvit.quantize(small_vit(), bits=4), batches)


@pytest.mark.parametrize("batch", [torch.zeros(2, 1, 48, 48), torch.zeros(3, 48, 48), "images"])
def test_wrong_shape(small_vit, batch):
    with pytest.raises(InputError, match="image batches"):
        qvit.calibrate(qvit.quantize(small_vit(), bits=4), [batch])


def test_images_that_are_not_normalised_as_declared(small_vit):
    student = qvit.quantize(small_vit(), bits=4)
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        qvit.calibrate(student, [torch.rand(4, 3, 48, 48) * 255])


def test_distilled_heads_are_calibrated():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=5, img_size=32)
    student = qvit.quantize(model, bits=4)
    qvit.calibrate(student, [_images(student)], images=8)
    assert student.head.input_quantizer.calibrated
    assert student.head_dist.input_quantizer.calibrated


def test_the_float_function_of_swin_is_kept(small_swin):
    model = small_swin()
    student = qvit.quantize(model, spec=ModelSpec.of_bits(8, rectify=False)).eval()
    images = _images(student)
    before = {name: p.clone() for name, p in student.named_parameters()}
    qvit.calibrate(student, [images], images=8)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name]) and "quantizer" not in name}
    # patch merging is equalised as the blocks are
    assert {"layers.1.downsample.norm.weight", "layers.1.downsample.reduction.weight"} <= moved
    assert {f"layers.0.blocks.1.{part}.weight" for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1")} <= moved
    assert "layers.0.blocks.0.attn.relative_position_bias_table" not in moved
    with torch.no_grad():
        with float_mode(student):
            assert _relative(student(images), model(images)) < 1e-5
        assert _relative(student(images), model(images)) < 0.05


def test_rectified_swin_keeps_the_float_function_nearly(small_swin):
    model = small_swin()
    student = qvit.quantize(model, bits=4).train()
    images = _images(student)
    with torch.no_grad(), float_mode(student.eval()):
        default = _relative(student(images), model(images))
        qvit.calibrate(student.train(), [images], images=8)
        assert student.training
        fitted = _relative(student.eval()(images), model(images))
    assert fitted < 0.5 * default
    assert all(q.calibrated for q in quantization_points(student).values() if isinstance(q, LSQQuantizer))


def test_scales_of_swin_alone(small_swin):
    student = qvit.quantize(small_swin(), bits=4)
    before = {name: p.clone() for name, p in student.named_parameters() if "_quantizer." not in name}
    qvit.calibrate(student, [_images(student)], images=8, scales_only=True)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters() if name in before)
    assert student.layers[1].downsample.reduction.input_quantizer.calibrated


def test_samples_of_windows_lose_windows_before_tokens(monkeypatch):
    """Else the few tokens that are left would all lie in the same place of their windows."""
    monkeypatch.setattr(calibrate_module, "_VALUES_PER_POINT", 1000)
    quantizer = LSQQuantizer(ModelSpec.of_bits(4).resolve("x.input", Operand.INPUT), Dims(channels=2))
    windows = torch.arange(64.0)[:, None, None].expand(64, 10, 2)
    thinned = calibrate_module._thin(windows, quantizer, images=4)
    assert thinned.shape == (50, 10, 2)
    assert thinned[0, 0, 0] == 0
    assert thinned[-1, 0, 0] == 63
    of_images = calibrate_module._thin(windows, quantizer, images=64)
    assert of_images.shape == (64, 7, 2)
    assert calibrate_module._thin(windows.expand(64, 10, 2), quantizer, images=60).shape == (60, 8, 2)
