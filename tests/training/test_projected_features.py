"""A float model that learns from the features of a teacher of another shape, through `qvit.training.engine.fit`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import qvit.training.loop
from qvit.errors import RecipeError, TrainingError
from qvit.training.checkpoint import BEST, LAST, load_model, read_checkpoint
from qvit.training.engine import fit, open_loop
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.recipe import Recipe

from .helpers import interrupt_at_step
from .test_engine import RANDOM, SWIN, metrics, same_tensors

MakeRecipe = Callable[..., Recipe]
VIT = "vit_tiny_patch16_224"
FEATURES: dict[str, Any] = {"label": 0, "hard": 0, "soft": 0, "feature": 1, "feature_blocks": "thirds"}


def teacher(**changes: Any) -> nn.Module:
    """Wider, deeper and of more tokens than the students here."""
    args = {"img_size": 8, "patch_size": 2, "num_classes": 3, "embed_dim": 40, "depth": 6, "num_heads": 4}
    torch.manual_seed(7)
    return timm.create_model(VIT, **args | changes).eval()


@pytest.mark.parametrize("student", [RANDOM["model"], {"name": "swin_tiny_patch4_window7_224", "args": SWIN}])
def test_it_learns_features_of_another_shape_and_exports_the_model_alone(
    tiny_recipe: MakeRecipe, tmp_path: Path, student: dict[str, Any]
) -> None:
    changes = {"data": RANDOM["data"] | {"mean": [0.5] * 3, "std": [0.25] * 3}, "optim": {"lr": 1e-2}}
    recipe = tiny_recipe(method="float", model=student, distill=FEATURES, schedule={"epochs": 6}, **changes)
    taught = teacher()
    before = {name: tensor.clone() for name, tensor in taught.state_dict().items()}
    result = fit(recipe, tmp_path, teacher=taught, progress=False)
    rows = metrics(tmp_path, "train")
    assert set(rows[0]) - {"kind", "step", "epoch", "loss", "lr"} == {"feature"}
    assert sum(row["feature"] for row in rows[-5:]) < 0.85 * sum(row["feature"] for row in rows[:5])
    assert all(torch.equal(before[name], tensor) for name, tensor in taught.state_dict().items())
    model, metadata = load_model(tmp_path / LAST)
    assert metadata.student is None
    assert all(torch.equal(value, result.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert not [name for name in read_checkpoint(tmp_path / BEST).tensors if not name.startswith("model.")]
    assert read_checkpoint(tmp_path / LAST).projector_state().keys() >= {"projections.0.weight", "projections.0.bias"}


def test_it_resumes_with_the_same_bits(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"distill": FEATURES | {"soft": 1}, "schedule": {"epochs": 2}, **RANDOM}
    recipe = tiny_recipe(method="float", **changes)
    interrupt_at_step(monkeypatch, 7)
    with pytest.raises(TrainingInterrupted):
        fit(recipe, tmp_path / "a", teacher=teacher(), progress=False)
    monkeypatch.undo()
    fit(recipe, tmp_path / "a", teacher=teacher(), resume=True, progress=False)
    fit(recipe, tmp_path / "b", teacher=teacher(), progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
    # one of another shape does not fit the maps that were learned
    with pytest.raises(TrainingError, match="belongs to another model"):
        fit(recipe, tmp_path / "a", teacher=teacher(embed_dim=48), resume=True, progress=False)


def test_the_projection_is_averaged_clipped_and_stepped_with_the_model(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = open_loop(tiny_recipe(method="float", distill=FEATURES), tmp_path, teacher=teacher(), progress=False)
    projector = loop.setup.projector
    assert projector is not None
    averaged: list[nn.Parameter] = []
    monkeypatch.setattr(qvit.training.loop, "average_gradients", lambda parameters, _processes: averaged.extend(parameters))
    before = [p.detach().clone() for p in projector.parameters()]
    with loop.stepping():
        loop.train_step(*next(iter(loop.loader)))
    assert {id(p) for p in projector.parameters()} < {id(p) for p in averaged}
    gradients = [p.grad for p in averaged if p.grad is not None]
    assert torch.stack([g.norm() for g in gradients]).norm() <= 1 + 1e-5
    assert all(not torch.equal(old, new) for old, new in zip(before, projector.parameters(), strict=True))


def test_in_bf16_the_loss_is_that_of_float32_up_to_rounding(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    features = []
    for precision in ("fp32", "bf16"):
        recipe = tiny_recipe(method="float", distill=FEATURES, precision=precision)
        loop = open_loop(recipe, tmp_path / precision, teacher=teacher(), progress=False)
        with loop.stepping():
            loop.train_step(*next(iter(loop.loader)))
        names, means = loop.window.take() or ([], torch.tensor(torch.nan))
        features.append(means[names.index("feature")].item())
    assert features[1] == pytest.approx(features[0], rel=0.02)
    assert features[1] != features[0]


class Classifier(nn.Module):
    """A teacher without tokens."""

    num_classes = 3


def test_a_teacher_without_tokens_is_refused_in_a_sentence(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(method="float", distill=FEATURES)
    with pytest.raises(
        RecipeError, match=r"Classifier\) has no features .*: use a timm ViT.*set distill.feature .*to 0"
    ) as caught:
        fit(recipe, tmp_path / "run", teacher=Classifier(), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_without_a_teacher_features_are_not_read(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    loop = open_loop(tiny_recipe(method="float", distill=FEATURES), tmp_path, progress=False)
    assert loop.setup.projector is None
    assert loop.setup.teacher is None
