"""Teachers that do not fit are refused before training, each in one sentence; those that fit are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

from qvit.convert import quantize
from qvit.errors import RecipeError
from qvit.training.engine import fit
from qvit.training.recipe import Recipe
from qvit.training.teachers import check_teacher

from .test_engine import RANDOM

ARGS = RANDOM["model"]["args"]


def model(**changes: Any) -> nn.Module:
    return timm.create_model(RANDOM["model"]["name"], **ARGS | changes)


class Classifier(nn.Module):
    """A teacher that is no transformer."""

    num_classes = 3


@pytest.mark.parametrize(
    ("changes", "dgd", "features", "words"),
    [
        ({"num_classes": 5}, False, None, "teacher has 5 classes, the student 3"),
        ({"img_size": 16}, False, None, r"\(3, 16, 16\).* the student \(3, 8, 8\)"),
        ({"in_chans": 1}, False, None, r"\(1, 8, 8\)"),
        ({"depth": 3}, True, None, "3 blocks, the student 2.*set distill.dgd to 0"),
        ({"num_heads": 3}, True, None, "3 heads, the student 2"),
        ({"patch_size": 2}, True, None, "17 tokens, the student 5"),
        ({"patch_size": 2}, False, "last", "17 tokens 24 wide, the student's 5 tokens 24 wide"),
        ({"embed_dim": 48}, False, "last", "5 tokens 48 wide.*set distill.feature and activations_first.feature to 0"),
        ({"depth": 3}, False, "all", "3 blocks, the student 2, and features .* set distill.feature_blocks=last"),
    ],
)
def test_a_difference_that_is_compared_is_refused(changes: dict, dgd: bool, features: str | None, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        check_teacher(model(**changes), quantize(model(), bits=4), dgd, features)
    assert "\n" not in str(caught.value)


def test_what_is_not_compared_may_differ() -> None:
    student = quantize(model(), bits=4)
    check_teacher(model(depth=3, embed_dim=48, num_heads=3, patch_size=2), student, dgd=False, features=None)
    check_teacher(model(embed_dim=48), student, dgd=True, features=None)
    check_teacher(model(depth=3, num_heads=4), student, dgd=False, features="last")
    check_teacher(model(), student, dgd=True, features="all")
    check_teacher(Classifier(), student, dgd=False, features=None)


@pytest.mark.parametrize(("dgd", "features", "words"), [(True, None, "distill.dgd"), (False, "all", "distill.feature")])
def test_a_teacher_that_is_no_transformer(dgd: bool, features: str | None, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"Classifier.* use a timm ViT, or set {words}"):
        check_teacher(Classifier(), quantize(model(), bits=4), dgd, features)


SWIN: dict[str, Any] = {"img_size": 16, "patch_size": 2, "window_size": 4, "num_classes": 3, "embed_dim": 16}


def swin(**changes: Any) -> nn.Module:
    stages = {"depths": (2, 1), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", **SWIN | stages | changes)


@pytest.mark.parametrize(
    ("changes", "dgd", "features", "words"),
    [
        ({"depths": (2, 2)}, True, None, "4 blocks, the student 3"),
        ({"num_heads": (4, 4)}, True, None, r"teacher has 4 heads, the student \[2, 2, 4\]"),
        ({"window_size": 2}, True, None, "4 tokens, the student 16"),
        ({"patch_size": 1}, True, None, r"\[16, 16, 4\] windows, the student \[4, 4, 1\]"),
        ({"img_size": 32}, False, None, r"\(3, 32, 32\)"),
        ({"embed_dim": 32}, False, "last", "16 tokens 64 wide, the student's 16 tokens 32 wide"),
        ({"depths": (2, 2)}, False, "all", "4 blocks, the student 3, and features"),
    ],
)
def test_a_swin_that_differs_is_refused(changes: dict, dgd: bool, features: str | None, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        check_teacher(swin(**changes), quantize(swin(), bits=4), dgd, features)
    assert "\n" not in str(caught.value)


def test_teachers_of_a_swin() -> None:
    student = quantize(swin(), bits=4)
    check_teacher(swin(), student, dgd=True, features="all")
    check_teacher(swin(embed_dim=32), student, dgd=True, features=None)
    check_teacher(swin(depths=(1, 2)), student, dgd=False, features="last")
    vit = model(img_size=16)
    check_teacher(vit, student, dgd=False, features=None)
    with pytest.raises(RecipeError, match="2 blocks, the student 3"):
        check_teacher(vit, student, dgd=True, features=None)
    with pytest.raises(RecipeError, match="17 tokens 24 wide, the student's 16 tokens 32 wide"):
        check_teacher(vit, student, dgd=False, features="all")


def test_nothing_is_written_before(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="3 blocks, the student 2"):
        fit(tiny_recipe(), tmp_path / "run", teacher=model(depth=3), progress=False)
    teacher = {"name": RANDOM["model"]["name"], "args": ARGS | {"depth": 3}}
    with pytest.raises(RecipeError, match="3 blocks, the student 2"):
        fit(tiny_recipe(teacher=teacher), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
