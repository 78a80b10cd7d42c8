"""Every recipe that comes with the package: it says how it is launched and what to expect, loads, and takes a step."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qvit.cli.main import build
from qvit.training.engine import open_loop
from qvit.training.recipe import Recipe, recipe_names

from .helpers import write_images

NAMES = recipe_names()
SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2}
SMALL_SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), 24, 0)


def header(name: str) -> str:
    """The comment that a recipe opens with."""
    text = (resources.files("qvit") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return re.match(r"(#.*\n)+", text).group()  # type: ignore[union-attr]


def test_the_recipes_there_are() -> None:
    assert {"paper_imagenet", "fast_imagenet", "imagenette", "cifar10", "cifar10_float", "digits", "digits_float"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_how_it_is_launched_and_what_to_expect(name: str) -> None:
    text = header(name)
    assert "Expect" in text or "could not be run here" in text
    lines = text.replace("\\\n#", "").splitlines()
    commands = [line for line in lines if re.search(rf"(qvit|qvit\.cli\.main) train {name}\b", line)]
    assert len(commands) == 1
    words = shlex.split(commands[0].lstrip("# "))
    arguments = words[words.index("train") :]
    # The command line knows all of its options: the first thing to fail is that it would do something.
    help_text = CliRunner().invoke(build(), ["train", "--help"], env={"COLUMNS": "200"}).output
    assert {word for word in arguments if word.startswith("-")} <= {*re.findall(r"--[a-z-]+", help_text), "-o"}
    overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
    method = "float" if name.endswith("_float") else {"cifar10": "irm"}.get(name, "qvit")
    assert Recipe.load(name, overrides).method == method
    if "nproc-per-node" in commands[0]:
        assert words[0] == "torchrun"


@pytest.mark.parametrize("name", NAMES)
def test_only_digits_are_for_a_cpu(name: str) -> None:
    assert Recipe.load(name).needs_gpu is not name.startswith("digits")


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_a_step(name: str, images: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    assert recipe.model is not None
    swin = recipe.model.name.startswith("swin")
    args = recipe.model.args | (SMALL_SWIN if swin else SMALL)
    changes = ["model.pretrained=false", "model.checkpoint=null", "batch_size=6", "data.workers=0", "needs_gpu=false"]
    changes += ["precision=fp32", "compile=false", "quant.calibration_images=12"]
    if recipe.data.train != "digits":
        args |= {"img_size": 16, "patch_size": 2 if swin else 8, "num_classes": 3}
        changes.append(f"data.train={images}")
        if recipe.data.cache:
            changes.append("data.cache_size=12")
    changes += [f"model.args.{key}={value}" for key, value in args.items()]
    if recipe.teacher is not None:
        small = SMALL | {"img_size": 16, "patch_size": 8, "num_classes": 3}
        changes += ["teacher.checkpoint=null", *(f"teacher.args.{key}={value}" for key, value in small.items())]
    loop = open_loop(recipe.override(*changes), tmp_path, progress=False)
    before = [p.detach().clone() for p in loop.model.parameters()]
    batch, labels = next(iter(loop.loader))
    assert len(batch) == 6
    with loop.stepping():
        loop.train_step(batch, labels)
        loop.train_step(batch, labels)  # the first step of a warm-up may be next to none
    assert loop.step == 2
    names, means = loop.window.take() or ([], torch.tensor(torch.nan))
    assert names[0] == "loss"
    assert means.isfinite().all()
    assert any(not torch.equal(p, q) for p, q in zip(before, loop.model.parameters(), strict=True))
