"""A student that is cut out of its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from qvit.errors import RecipeError
from qvit.training.engine import open_loop
from qvit.training.recipe import Recipe
from qvit.training.weight_selection import select_weights

from .test_engine import SWIN


def vit(**changes: Any) -> nn.Module:
    args = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **args | changes).eval()


def test_of_one_shape_the_student_is_the_teacher() -> None:
    student, teacher = vit(), vit()
    select_weights(student, teacher)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(student(images), teacher(images))


def test_channels_that_are_not_kept_are_not_missed_where_they_are_silent() -> None:
    # A teacher that uses every other channel of the residual stream and every other head computes what its student does.
    teacher, student = vit(embed_dim=48, num_heads=4), vit()
    with torch.no_grad():
        odd, odd_heads = torch.arange(1, 48, 2), torch.cat([torch.arange(12, 24), torch.arange(36, 48)])
        teacher.pos_embed[..., odd] = teacher.cls_token[..., odd] = 0
        for module in (teacher.patch_embed.proj, *(b.attn.proj for b in teacher.blocks), *(b.mlp.fc2 for b in teacher.blocks)):
            module.weight[odd] = 0
        for block in teacher.blocks:
            block.attn.proj.weight[:, odd_heads] = 0
            block.mlp.fc2.weight[:, torch.arange(1, 192, 2)] = 0
    for module in (*teacher.modules(), *student.modules()):
        if isinstance(module, nn.LayerNorm):  # whose mean and variance would be over half as many channels
            module.forward = lambda x: x  # type: ignore[method-assign]
    for layer in [teacher.head, *(b.attn.qkv for b in teacher.blocks), *(b.mlp.fc1 for b in teacher.blocks)]:
        layer.weight.data[:, odd] = 0
    select_weights(student, teacher)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(student(images), teacher(images), atol=1e-5, rtol=1e-4)


def test_patches_positions_and_depth_may_differ() -> None:
    teacher = vit(patch_size=2, embed_dim=60, depth=4, num_heads=3)
    student = vit()
    select_weights(student, teacher)
    assert torch.equal(student.blocks[0].mlp.fc2.bias, teacher.blocks[1].mlp.fc2.bias[torch.arange(24) * 60 // 24])
    assert torch.equal(student.cls_token, teacher.cls_token[..., torch.arange(24) * 60 // 24])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 12}, r"2 heads 6 wide and the student 2 12 wide"),
        ({"embed_dim": 48, "num_heads": 1}, r"1 heads 48 wide and the student 2 12 wide"),
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv\.bias is missing"),
        ({"depth": 1, "class_token": False, "global_pool": "avg"}, "cls_token is missing"),
    ],
)
def test_a_teacher_that_is_too_small_or_of_other_parts(changes: dict[str, Any], words: str) -> None:
    student = vit()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(RecipeError, match=rf"{words}.*set distill.start_from_teacher=false") as caught:
        select_weights(student, vit(**changes))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_a_swin_is_not_cut_out_of_a_vit() -> None:
    with pytest.raises(RecipeError, match=r"student \(SwinTransformer\) is no ViT"):
        select_weights(timm.create_model("swin_tiny_patch4_window7_224", **SWIN), vit())


def test_a_run_starts_there(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    teacher = vit(embed_dim=48, num_heads=4, depth=2)
    recipe = tiny_recipe(method="float", distill={"soft": 1, "start_from_teacher": True})
    loop = open_loop(recipe, tmp_path, teacher=teacher, progress=False)
    assert torch.equal(loop.model.head.weight, teacher.head.weight[:, ::2])
