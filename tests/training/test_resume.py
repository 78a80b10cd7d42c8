"""Which recipes go on from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm

from qvit.convert import preprocessing_of
from qvit.errors import TrainingError
from qvit.training.checkpoint import Checkpoint, Metadata
from qvit.training.recipe import Recipe
from qvit.training.resume import check_same_run


def checkpoint_of(recipe: dict[str, Any]) -> Checkpoint:
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    return Checkpoint(Path("run/last.safetensors"), Metadata.of(model, preprocessing_of(model), ["a", "b"], recipe), {}, None)


def test_paths_and_reports_may_differ_and_nothing_that_changes_a_weight() -> None:
    recipe = Recipe.from_dict({"method": "baseline", "optim": {"lr": 0.1}})
    checkpoint = checkpoint_of(recipe.to_dict())
    check_same_run(checkpoint, recipe, 1)
    check_same_run(checkpoint, recipe.override("data.train=elsewhere", "data.workers=9", "log_every=3", "needs_gpu=true"), 1)
    for change in ("optim.lr=0.2", "seed=1", "anneal.share=0.1", "distill.cached_crops=3"):
        with pytest.raises(TrainingError, match=f"was started with {change.partition('=')[0]}="):
            check_same_run(checkpoint, recipe.override(change), 1)
    with pytest.raises(TrainingError, match="was started with 1 processes, now there are 2"):
        check_same_run(checkpoint, recipe, 2)
    check_same_run(replace(checkpoint, metadata=replace(checkpoint.metadata, processes=2)), recipe, 2)


def test_a_teacher_of_its_own_is_part_of_the_run() -> None:
    plain = Recipe.from_dict({"method": "baseline"})
    taught = plain.override("teacher.checkpoint=runs/large/best.safetensors")
    check_same_run(checkpoint_of(taught.to_dict()), taught.override("teacher.checkpoint=elsewhere/best.safetensors"), 1)
    with pytest.raises(TrainingError, match=r"with the teacher runs/large/best\.safetensors, now none is named: name it again"):
        check_same_run(checkpoint_of(taught.to_dict()), plain, 1)
    with pytest.raises(TrainingError, match=r"without a teacher of its own, now it is runs/large/best\.safetensors: resume"):
        check_same_run(checkpoint_of(plain.to_dict()), taught, 1)
    named = plain.override("teacher.name=deit_small_patch16_224", "teacher.pretrained=true")
    with pytest.raises(TrainingError, match=r"with the teacher deit_small_patch16_224, now none"):
        check_same_run(checkpoint_of(named.to_dict()), plain, 1)
    with pytest.raises(TrainingError, match=r"was started with teacher\.name='deit_small_patch16_224', now it is None"):
        check_same_run(checkpoint_of(named.to_dict()), taught.override("teacher.pretrained=false"), 1)


def test_a_key_that_is_newer_than_the_checkpoint_had_its_default_then() -> None:
    recipe = Recipe.from_dict({})
    old = recipe.to_dict()
    del old["anneal"], old["distill"]["cached_crops"], old["quant"]["weight_quantizer"], old["quant"]["residual"]
    check_same_run(checkpoint_of(old), recipe, 1)
    with pytest.raises(TrainingError, match=r"anneal\.share=0\.0, now it is 0\.2"):
        check_same_run(checkpoint_of(old), recipe.override("anneal.share=0.2"), 1)


def test_a_key_that_is_gone_is_a_difference() -> None:
    old = Recipe.from_dict({}).to_dict() | {"magic": 3}
    with pytest.raises(TrainingError, match="was started with magic=3, now it is None"):
        check_same_run(checkpoint_of(old), Recipe.from_dict({}), 1)
