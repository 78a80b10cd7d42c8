"""Taps against q and k computed by hand from the blocks' inputs."""

from __future__ import annotations

import gc
import weakref

import pytest
import timm
import torch
from torch import nn

from qvit.distill import dgd_loss, tap_queries_keys
from qvit.errors import TrainingError
from qvit.layers.points import float_mode


def inputs_of(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What enters the attention of each block."""
    kept: list[torch.Tensor] = []
    handles = [block.norm1.register_forward_hook(lambda _m, _i, out: kept.append(out)) for block in model.blocks]
    model(images)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_float_taps_are_what_attention_computes(small_vit, fused: bool, qk_norm: bool) -> None:
    model = small_vit("vit_tiny_patch16_224", qk_norm=qk_norm)
    for block in model.blocks:
        block.attn.fused_attn = fused
    images = torch.randn(2, 3, 48, 48)
    with tap_queries_keys(model) as taps:
        model(images)
        collected = taps.collect()
    assert len(collected) == 2
    for block, x, (q, k) in zip(model.blocks, inputs_of(model, images), collected, strict=True):
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        for part, got, norm in ((0, q, block.attn.q_norm), (1, k, block.attn.k_norm)):
            rows = slice(48 * part, 48 * (part + 1))
            flat = x @ weight[rows].t() + bias[rows]
            want = torch.stack([flat[..., 16 * h : 16 * (h + 1)] for h in range(3)], dim=1)
            assert got.shape == (2, 3, 10, 16)
            torch.testing.assert_close(got, norm(want), rtol=1e-5, atol=1e-5)
        # and they give the attention's own output
        v = block.attn.qkv(x)[..., 96:].unflatten(-1, (3, 16)).transpose(1, 2)
        out = ((q @ k.transpose(-2, -1) * 16**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.proj(out), block.attn(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rectify", [True, False])
def test_student_taps_enter_the_quantizers(make_student, rectify: bool) -> None:
    student = make_student(rectify=rectify, weight_bits=3, act_bits=3)
    entered: dict[str, torch.Tensor] = {}
    for block in range(2):
        for name in "qk":
            quantizer = getattr(student.blocks[block].attn, f"{name}_quantizer")
            quantizer.register_forward_pre_hook(lambda _m, i, key=f"{block}{name}": entered.__setitem__(key, i[0]))
    taps = tap_queries_keys(student)
    student(torch.randn(2, 3, 48, 48))
    for block, (q, k) in enumerate(taps.collect()):
        assert q.shape == k.shape == (2, 3, 10, 16)
        assert torch.equal(q, entered[f"{block}q"])
        assert torch.equal(k, entered[f"{block}k"])
        assert not torch.equal(q, k)
    with float_mode(student):
        student(torch.randn(2, 3, 48, 48))
    assert len(taps.collect()) == 2
    taps.close()


def test_gradients_flow_from_the_loss_into_the_student_alone(small_vit, make_student) -> None:
    teacher = small_vit()
    student = make_student(teacher, rectify=True).train()
    images = torch.randn(2, 3, 48, 48)
    teacher_taps, student_taps = tap_queries_keys(teacher), tap_queries_keys(student)
    with torch.no_grad():
        teacher(images)
    student(images)
    dgd_loss(student_taps.collect(), teacher_taps.collect()).backward()
    attention = student.blocks[1].attn
    for parameter in (attention.qkv.weight, attention.rectify_q.weight, attention.rectify_k.bias, student.pos_embed):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_an_unquantized_copy_has_distance_zero(small_vit, make_student) -> None:
    teacher = small_vit()
    student = make_student(teacher, rectify=False)
    images = torch.randn(2, 3, 48, 48)
    with (
        tap_queries_keys(teacher) as teacher_taps,
        tap_queries_keys(student) as student_taps,
        float_mode(student),
        torch.no_grad(),
    ):
        teacher(images)
        student(images)
        assert dgd_loss(student_taps.collect(), teacher_taps.collect()) < 12 * 1e-3


def test_collect_empties_and_close_removes_the_hooks(small_vit) -> None:
    model = small_vit()
    taps = tap_queries_keys(model)
    with pytest.raises(TrainingError, match="run the tapped model"):
        taps.collect()
    model(torch.randn(1, 3, 48, 48))
    first = taps.collect()[0][0]
    with pytest.raises(TrainingError):
        taps.collect()
    model(torch.randn(1, 3, 48, 48))
    assert not torch.equal(taps.collect()[0][0], first)
    model(torch.randn(1, 3, 48, 48))
    taps.clear()
    with pytest.raises(TrainingError):
        taps.collect()
    taps.close()
    assert not any(module._forward_hooks for module in model.modules())
    with tap_queries_keys(model):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_collect_keeps_no_reference(small_vit) -> None:
    model = small_vit()
    taps = tap_queries_keys(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 48, 48))
    collected = taps.collect()
    alive = weakref.ref(collected[0][0])
    del collected
    gc.collect()
    assert alive() is None


def test_hooks_fire_inside_a_wrapper(make_student) -> None:
    """As under DistributedDataParallel: the hooks sit on the inner modules."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    student = make_student()
    taps = tap_queries_keys(student)
    Wrapper(student)(torch.randn(1, 3, 48, 48))
    assert len(taps.collect()) == 2


def test_under_distributed_data_parallel(make_student, tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = make_student().train()
        taps = tap_queries_keys(student)
        wrapped = nn.parallel.DistributedDataParallel(student)
        logits = wrapped(torch.randn(2, 3, 48, 48))
        collected = taps.collect()
        (logits.sum() + dgd_loss(collected, [(torch.randn_like(q), torch.randn_like(k)) for q, k in collected])).backward()
        assert student.blocks[0].attn.rectify_q.weight.grad.abs().max() > 0
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(TrainingError, match="ResNet"):
        tap_queries_keys(timm.create_model("resnet18"))


def test_taps_of_swin_are_those_of_every_window(small_swin, make_student) -> None:
    model = small_swin()
    student = make_student(model, rectify=False, weight_bits=8, act_bits=8)
    images = torch.randn(2, 3, 32, 32)
    with tap_queries_keys(model) as teacher_taps, tap_queries_keys(student) as student_taps:
        with torch.no_grad(), float_mode(student):
            model(images)
            student(images)
        theirs, own = teacher_taps.collect(), student_taps.collect()
    shapes = [(8, 2, 16, 8), (8, 2, 16, 8), (2, 4, 16, 8)]  # windows of all images, heads, tokens of a window, D
    assert [q.shape for q, _ in theirs] == [k.shape for _, k in own] == shapes
    for (q, k), (q_student, k_student) in zip(theirs, own, strict=True):
        torch.testing.assert_close(q_student, q, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(k_student, k, rtol=1e-4, atol=1e-4)
    # the second block sees windows of the rolled map: compare with the map of tokens
    block = model.layers[0].blocks[1]
    normed = block.norm1(model.layers[0].blocks[0](model.patch_embed(images)))
    first_window = torch.roll(normed, (-2, -2), (1, 2))[0, :4, :4].reshape(16, 16)
    want = block.attn.qkv(first_window)[:, :16].view(16, 2, 8).transpose(0, 1)
    torch.testing.assert_close(theirs[1][0][0], want, rtol=1e-4, atol=1e-4)


def test_dgd_compares_tokens_of_one_window_alone(small_swin) -> None:
    """Whole windows of an image may trade places with their teacher's alike; tokens of different windows may not."""
    model = small_swin()
    with tap_queries_keys(model) as taps:
        model(torch.randn(2, 3, 32, 32))
        (q, k), *_ = taps.collect()
    other = q + 0.3 * torch.randn_like(q)
    loss = dgd_loss([(q, k)], [(other, k)])
    order = torch.randperm(8)
    torch.testing.assert_close(dgd_loss([(q[order], k)], [(other[order], k)]), loss)
    whole = [x.unflatten(0, (2, 4)).transpose(1, 2).flatten(2, 3) for x in (q, other)]  # all tokens of an image at once
    assert not torch.isclose(dgd_loss([(whole[0], k)], [(whole[1], k)]), loss)
