"""Which loaders a recipe gets, and that training with the cache keeps what training promises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from qvit.errors import RecipeError
from qvit.preprocessing import Preprocessing
from qvit.training.checkpoint import LAST
from qvit.training.engine import fit
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.loaders import stored_form
from qvit.training.recipe import Recipe

from .helpers import VAL, interrupt_at_step, tiny_values
from .test_engine import RUNNER, environment, metrics, same_tensors

MakeRecipe = Callable[..., Recipe]
CACHED: dict[str, Any] = {"data": {"cache": "device"}}


def test_training_with_the_cache_learns_and_evaluates_alike(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": "float", "schedule": {"epochs": 12}, "optim": {"lr": 5e-3}}
    cached = fit(tiny_recipe(**changes, **CACHED), tmp_path / "cached", progress=False)
    assert cached.best_top1 >= 90
    assert cached.images == VAL
    assert 0 < cached.loader_idle < 1
    # The same weights score the same, whether validation images are cached or read.
    state = safetensors.torch.load_file(cached.output / LAST)
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, weights)
    still = {"method": "float", "schedule": {"epochs": 1}, "optim": {"name": "sgd", "lr": 1e-12, "weight_decay": 0.0}}
    model = {**tiny_values(tmp_path)["model"], "checkpoint": str(weights)}
    for name, data in (("read", {}), ("kept", CACHED["data"])):
        again = fit(tiny_recipe(**still, model=model, data=data), tmp_path / name, progress=False)
        assert again.top1 == cached.top1


def test_stopping_and_resuming_with_the_cache_changes_nothing(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(**CACHED)
    interrupt_at_step(monkeypatch, 7)
    with pytest.raises(TrainingInterrupted):
        fit(recipe, tmp_path / "a", progress=False)
    monkeypatch.undo()
    fit(recipe, tmp_path / "a", resume=True, progress=False)
    fit(recipe, tmp_path / "b", progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)


def test_two_processes_with_the_cache_do_what_one_does(tiny_recipe: MakeRecipe, image_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data": {"cache": "device"}, "optim": {"name": "sgd", "lr": 0.003}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_values(image_folder, batch_size=4, **changes)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(RUNNER), str(tmp_path / "recipe.yaml"), str(tmp_path / "two")]
    ran = subprocess.run(command, env=environment(), timeout=120, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    fit(tiny_recipe(batch_size=8, **changes), tmp_path / "one", progress=False)
    one, two = (metrics(tmp_path / name, "train") for name in ("one", "two"))
    assert len(one) == len(two) == 15
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert [(line["top1"], line["images"]) for line in metrics(tmp_path / "two", "eval")] == [
        (line["top1"], VAL) for line in metrics(tmp_path / "one", "eval")
    ]


def test_images_of_several_sizes_train_once_they_are_squares(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8 + number, 12), name).save(tmp_path / "set" / name / f"{number}.png")
    args = tiny_values(tmp_path)["model"]["args"] | {"num_classes": 2}
    changes: dict[str, Any] = {"method": "float", "model": {"name": "vit_tiny_patch16_224", "args": args}}
    changes |= {"schedule": {"epochs": 1, "warmup_epochs": 0}}
    data = {"train": str(tmp_path / "set"), "cache": "device"}
    with pytest.raises(RecipeError, match=r"differ in size .*data\.cache_size"):
        fit(tiny_recipe(**changes, data=data), tmp_path / "a", progress=False)
    assert not (tmp_path / "a" / LAST).exists()
    assert fit(tiny_recipe(**changes, data=data | {"cache_size": 10}), tmp_path / "b", progress=False).images == 12


def test_stored_squares_are_cropped_in_the_middle(tiny_recipe: MakeRecipe) -> None:
    picture = Image.new("RGB", (30, 10))
    picture.paste((255, 255, 255), (10, 0, 20, 10))
    decode = stored_form(tiny_recipe(data={"cache": "device", "cache_size": 10}), Preprocessing((3, 8, 8)))
    assert decode(picture).shape == (3, 10, 10)
    assert decode(picture).min() == 255
    grey = stored_form(tiny_recipe(data={"cache": "device", "cache_size": 5}), Preprocessing((1, 8, 8), mean=(0,), std=(1,)))
    assert grey(picture).shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"cache": "device", "augment": {"erase": 0.25}}, r"data\.augment\.erase=0\.25 does not go with data\.cache=device"),
        ({"cache": "device", "augment": {"auto_augment": "rand-m9"}}, r"data\.augment\.auto_augment='rand-m9' does not"),
        ({"cache": "device", "augment": {"color_jitter": 0.4}}, r"data\.augment\.color_jitter=0\.4 does not"),
        ({"cache": "device", "augment": {"interpolation": "random"}}, r"data\.augment\.interpolation='random' does not"),
        ({"cache_size": 8}, r"data\.cache_size is read where data\.cache is device"),
        ({"cache": "devise"}, r"data\.cache='devise' is not allowed"),
        ({"cache": "device", "cache_size": 0}, r"data\.cache_size=0 is out of range"),
        ({"cach": "device"}, r"did you mean 'data\.cache'"),
    ],
)
def test_what_the_cache_does_not_know_is_refused(tiny_recipe: MakeRecipe, data: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        tiny_recipe(data=data)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_nothing_is_waited_for(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    from accelerate import Accelerator

    from qvit.training.loop import TrainingLoop
    from qvit.training.setup import set_up

    recipe, accelerator = tiny_recipe(**CACHED), Accelerator(mixed_precision="no")
    loop = TrainingLoop(recipe, accelerator, set_up(recipe, accelerator, None, None, None), tmp_path, None)
    batches = iter(loop.loader)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, _ in batches:
            assert images.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
