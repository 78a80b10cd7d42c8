"""The residual stream in float16: rounded as IEEE rounds, gradients as they are, compiled or not, float32 untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch.utils.checkpoint import checkpoint

import qvit
from qvit.convert import family_of, rebuild
from qvit.layers.blocks import transformer_blocks
from qvit.layers.points import float_mode
from qvit.layers.residual import HalfBlock, HalfSwinBlock, half_stream, rounded_by_sums, to_half
from qvit.spec import ModelSpec

Factory = Callable[..., Any]


def _interesting() -> torch.Tensor:
    """Every float16, the ties between neighbours, and the float32 on both sides of each; what overflows; no numbers."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    ties = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    near = np.concatenate([halves, ties, np.float32([65520, -65520, 1e9, -3e38, 1e-30, -1e-45])])
    beside = [np.nextafter(near, np.float32(side) * np.float32(np.inf)) for side in (-1, 1)]
    return torch.from_numpy(np.concatenate([near, *beside, np.float32([np.inf, -np.inf, np.nan])]))


def _same(a: torch.Tensor, b: np.ndarray) -> None:
    """Bit for bit, signs of zero included, but for which NaN it is."""
    a = a.numpy()
    assert np.array_equal(np.isnan(a), np.isnan(b))
    assert np.array_equal(a.view(np.int32)[~np.isnan(a)], b.view(np.int32)[~np.isnan(a)])


@pytest.mark.parametrize("rounding", [to_half, rounded_by_sums, half_stream])
def test_to_the_nearest_float16(rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = _interesting()
    with np.errstate(over="ignore"):
        _same(rounding(x), x.numpy().astype(np.float16).astype(np.float32))


def test_compiled_code_rounds_as_well() -> None:
    """A plain cast to float16 and back is optimised away."""
    x = _interesting()
    with np.errstate(over="ignore"):
        wanted = x.numpy().astype(np.float16).astype(np.float32)
    compiled = torch.compile(lambda x, y: half_stream(x * y))
    _same(compiled(x, torch.ones(())), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_code_has_the_gradient(dtype: torch.dtype) -> None:
    """torch 2.11 loses it behind a cast that changes nothing."""
    compiled = torch.compile(lambda x, y: half_stream(x * y))
    x, y = torch.randn(2, 3, 5, 32, dtype=dtype, requires_grad=True).unbind(0)
    out = compiled(x, y)
    assert torch.equal(out, (x * y).float().half().to(dtype))
    (grad,) = torch.autograd.grad(out, x, torch.full_like(out, 3.0))
    assert torch.equal(grad, 3 * y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_type_stays_and_its_float16_numbers_are_exact(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(1000)).to(dtype)
    out = half_stream(x)
    assert out.dtype == dtype
    assert torch.equal(out.float(), x.float().half().float())


def test_the_gradient_passes_unchanged() -> None:
    x = torch.randn(4, 7, requires_grad=True)
    half_stream(x).backward(weight := torch.randn(4, 7))
    assert torch.equal(x.grad, weight)


@pytest.fixture(params=["vit", "swin"])
def pair(request: pytest.FixtureRequest, make_student: Factory, small_vit: Factory, small_swin: Factory) -> tuple[Any, Any]:
    """The same student with a stream of float16 and of float32."""
    options = {"init_values": 0.5, "pre_norm": True, "reg_tokens": 1}
    if request.param == "vit":
        model = small_vit("vit_tiny_patch16_224", img_size=32, **options)
    else:
        model = small_swin(drop_path_rate=0.0)  # timm's default makes a step random
    half = make_student(model, residual="float16")
    full = qvit.quantize(model, spec=ModelSpec()).eval()
    full.load_state_dict(half.state_dict())  # the names are the same
    return half, full


def _images(student: Any, count: int = 2) -> torch.Tensor:
    preprocessing = student.qvit.preprocessing
    pixels = np.random.default_rng(1).integers(0, 256, (count, *preprocessing.input_size), dtype=np.uint8)
    return torch.from_numpy(preprocessing.normalise(pixels))


def _streams(student: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """What enters and leaves every block, and what norm2 reads."""
    seen: list[torch.Tensor] = []
    handles = []
    for block in transformer_blocks(student):
        handles.append(block.register_forward_hook(lambda _m, inputs, output: seen.extend([inputs[0], output])))
        handles.append(block.norm2.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0])))
    student(images)
    for handle in handles:
        handle.remove()
    return seen


def test_only_a_stream_of_float16_has_other_blocks(pair: tuple[Any, Any]) -> None:
    half, full = pair
    assert {type(block) for block in transformer_blocks(half)} <= {HalfBlock, HalfSwinBlock}
    assert {type(block) for block in transformer_blocks(full)} <= {Block, SwinTransformerBlock}
    assert not any(module._forward_hooks for module in full.modules())
    assert [name for name, _ in half.named_modules()] == [name for name, _ in full.named_modules()]


@pytest.mark.parametrize("training", [False, True])
def test_the_stream_is_rounded_everywhere(pair: tuple[Any, Any], training: bool) -> None:
    half, full = (student.train(training) for student in pair)
    images = _images(half)
    streams = _streams(half, images)
    assert len(streams) == 3 * len(transformer_blocks(half))
    assert all(torch.equal(x, x.half().float()) for x in streams)
    assert not any(torch.equal(x, x.half().float()) for x in _streams(full, images))
    assert not torch.equal(half(images), half(images).half().float())


def test_rounding_by_hand_is_the_same(pair: tuple[Any, Any]) -> None:
    """The blocks of float32, with the rounding between their halves written out."""
    half, full = pair
    family, images = family_of(full), _images(full)
    with torch.no_grad():
        x = family.stem(full, images).half().float()
        assert torch.equal(family.stem(half, images), x)
        for merging, blocks in family.stages(full):
            x = x if merging is None else merging(x).half().float()
            for block in blocks:
                middle = family.after_attention(block, x).half().float()
                y = block.mlp(block.norm2(middle))
                x = (middle + (block.ls2(y) if hasattr(block, "ls2") else y)).half().float()
        assert torch.equal(family.tail(full, x), half(images))


def test_what_walks_through_the_blocks_agrees_with_the_model(pair: tuple[Any, Any]) -> None:
    half, _ = pair
    family, images = family_of(half), _images(half)
    with torch.no_grad():
        x = family.stem(half, images)
        for merging, blocks in family.stages(half):
            x = x if merging is None else merging(x)
            for block in blocks:
                middle = family.after_attention(block, x)
                assert torch.equal(middle, middle.half().float())
                x = block(x)
        assert torch.equal(family.tail(half, x), half(images))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_those_of_float32_but_for_rounding(pair: tuple[Any, Any], dtype: torch.dtype | None) -> None:
    gradients = []
    for student in pair:
        student.train()
        with float_mode(student), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            student(_images(student)).float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    half, full = gradients
    assert (half - full).norm() < (5e-3 if dtype is None else 5e-2) * full.norm()
    if dtype is None:  # the sums of autocast on a CPU may have too few places for a rounding to float16
        assert not torch.equal(half, full)


def test_recomputed_activations_give_the_same_gradients(pair: tuple[Any, Any]) -> None:
    half, _ = pair
    other = copy.deepcopy(half)
    for block in transformer_blocks(other):
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    for student in (half, other):
        student.train()
        student(_images(student)).square().mean().backward()
    for (name, one), two in zip(half.named_parameters(), other.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, two.grad), name


def test_a_rebuilt_student_rounds_too(pair: tuple[Any, Any]) -> None:
    half, _ = pair
    again = rebuild(half.qvit).eval()
    again.load_state_dict(half.state_dict())
    images = _images(half)
    with torch.no_grad():
        assert torch.equal(again(images), half(images))
