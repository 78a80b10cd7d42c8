"""``qvit train``: what it makes of its arguments; the training itself has tests of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit
import qvit.training.engine
from qvit.convert import preprocessing_of
from qvit.training.checkpoint import LAST, Metadata, read_checkpoint, save_checkpoint
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.sections import ModelSection

from .conftest import ARGUMENTS, MODEL

Cli = Callable[..., Any]
_RECIPE = """\
method: qvit
model: {name: vit_tiny_patch16_224, args: {img_size: 8, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 12,
  num_heads: 3, depth: 1}}
data: {train: digits, workers: 0, crop_pct: 1.0, augment: {hflip: 0}}
quant: {calibration_images: 8}
schedule: {epochs: 1}
batch_size: 512
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(_RECIPE)
    return path


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of `fit`, which then raises as if Ctrl-C had been pressed."""
    calls: list[dict[str, Any]] = []

    def fit(recipe: Any, output: Path, **values: Any) -> None:
        calls.append({"recipe": recipe, "output": output, **values})
        raise TrainingInterrupted("Stopped after step 3 of 9: resume the run to go on.")

    monkeypatch.setattr(qvit.training.engine, "fit", fit)
    return calls


def test_the_road_from_training_to_integers(cli: Cli, recipe: Path, checkpoints: Path, tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "report.json"
    weights = ("--checkpoint", checkpoints / "float.safetensors", "--teacher", checkpoints / "state.safetensors")
    done = cli("train", recipe, *weights, "--set", "quant.bits=3", "-o", run, "--json", report)
    assert done.status == 0, done.err
    assert "images/s" in done.out
    again = cli("train", recipe, *weights, "--set", "quant.bits=3", "-o", run, "--resume")
    assert (again.status, "images/s" in again.out) == (0, False)  # nothing was left to train
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["method"], row["weight_bits"], row["act_bits"], row["epochs"], row["data"]) == ("qvit", 3, 3, 1, "digits")
    assert row["images"] == 360
    assert f"{row['fake_top1']:.2f} % of 360 images" in done.out
    cli("train", recipe, "-o", run).refused("holds a run already")
    assert cli("freeze", run, "-o", tmp_path / "m.qvit", "--data", "digits", "--limit", 16).status == 0
    # The file says how good its float parent and its student were.
    provenance = qvit.IntegerModel.load(tmp_path / "m.qvit").provenance
    assert provenance["float_top1"] == 9.75
    assert provenance["fake_top1"] == pytest.approx(row["best_top1"])
    done = cli("eval", tmp_path / "m.qvit", "--data", "digits", "--limit", 16, "--against", run)
    assert done.status == 0
    assert "kept" in done.out
    assert cli("inspect", tmp_path / "m.qvit").status == 0


def test_a_budget_from_training_to_integers(cli: Cli, recipe: Path, checkpoints: Path, tmp_path: Path) -> None:
    weights = ("--checkpoint", checkpoints / "float.safetensors")
    measured = tmp_path / "sensitivities.json"
    budget = ("--set", "quant.budget_mb=0.0113", "--set", f"quant.sensitivities={measured}")
    report = tmp_path / "report.json"
    done = cli("train", recipe, *weights, *budget, "-o", tmp_path / "run", "--json", report)
    assert (done.status, measured.exists()) == (0, True), done.err
    # What was chosen is said, a block a line, and in the result file.
    (row,) = json.loads(report.read_text())["rows"]
    layers = ("attn.qkv", "attn.attention", "attn.proj", "mlp.fc1", "mlp.fc2")
    chosen = [row[f"bits of blocks.0.{layer}"] for layer in layers]
    assert len(set(chosen)) > 1
    lines = [line.split() for line in done.out.splitlines()]
    assert ["blocks.0", *map(str, chosen)] in lines
    assert ["block", *(layer.rpartition(".")[2] for layer in layers)] in lines
    assert row["budget_mb"] == 0.0113
    assert "budget_bops" not in row
    assert f"{row['bit_operations']:,} bit operations an image" in done.out
    # A resumed run says it as well, though nothing is chosen any more.
    again = cli("train", recipe, *weights, *budget, "-o", tmp_path / "run", "--resume")
    assert ["blocks.0", *map(str, chosen)] in [line.split() for line in again.out.splitlines()]
    done = cli("freeze", tmp_path / "run", "-o", tmp_path / "m.qvit")
    assert "0.0113 MB, kept" in done.out
    assert (tmp_path / "m.qvit").stat().st_size <= 11_300
    cli("train", recipe, *weights, *budget, "--set", "quant.budget_mb=0.001", "-o", tmp_path / "b").refused("cannot be met")


def test_a_cascade_from_training_to_integers(cli: Cli, recipe: Path, checkpoints: Path, tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "report.json"
    weights = ("--checkpoint", checkpoints / "float.safetensors")
    stages = (
        "--set",
        "schedule.epochs=3",
        "--set",
        "quant.bits=2",
        "--set",
        "cascade.share=0.4",
        "--set",
        "quant.residual=float16",
    )
    done = cli("train", recipe, *weights, *stages, "-o", run, "--json", report)
    assert done.status == 0, done.err
    assert "first stage: 4 bits, 1 of 3 epochs" in done.err
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["weight_bits"], row["residual"], row["epochs"], row["steps"]) == (2, "float16", 3, 6)
    assert row["best_epoch"] > 1
    assert "after 3 epochs" in done.out
    assert cli("freeze", run, "-o", tmp_path / "m.qvit").status == 0
    provenance = qvit.IntegerModel.load(tmp_path / "m.qvit").provenance
    best = row["best_epoch"]
    assert (provenance["epochs"], provenance["fake_top1"]) == (best, pytest.approx(row["best_top1"]))
    # The report shows both stages, one behind the other.
    page = tmp_path / "page.html"
    done = cli("report", run, "-o", page, "--images", 4, "--maps", 1, "--json", report)
    assert done.status == 0, done.err
    curve = [line for line in json.loads(report.read_text())["rows"] if line["figure"] == "training" and line["kind"] == "eval"]
    assert [(line["step"], line["epoch"], line.get("first_stage", False)) for line in curve] == [
        (2, 1, True),
        (4, 2, False),
        (6, 3, False),
    ]
    assert "the first stage of a cascade" in page.read_text()
    assert f"<dt>epochs</dt><dd>{best}</dd>" in "".join(page.read_text().split("\n"))


def test_ctrl_c_says_how_to_go_on(cli: Cli, recipe: Path, fitted: list[dict[str, Any]], tmp_path: Path) -> None:
    done = cli("train", recipe, "-o", tmp_path / "run", "--resume")
    done.refused("resume the run to go on", status=130)
    assert fitted[0]["resume"] is True
    assert fitted[0]["output"] == tmp_path / "run"


def test_data_and_overrides(cli: Cli, recipe: Path, fitted: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = ("train", recipe, "-o", tmp_path / "run")
    cli(*arguments, "--data", "/data/imagenet", "--set", "quant.bits=2", "--set", "optim.lr=1e-3")
    cli(*arguments, "--train-data", "a.tar", "--train-data", "b.tar", "--val-data", "c.tar")
    cli(*arguments)
    first, second, third = (call["recipe"] for call in fitted)
    assert (first.data.train, first.data.val, first.quant.bits, first.optim.lr) == ("/data/imagenet", None, 2, 1e-3)
    assert (second.data.train, second.data.val) == (["a.tar", "b.tar"], "c.tar")
    assert (third.data.train, third.data.val) == ("digits", None)


def test_weights_and_teachers(cli: Cli, recipe: Path, checkpoints: Path, fitted: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = ("train", recipe, "-o", tmp_path / "run")
    state, described = checkpoints / "state.safetensors", checkpoints / "float.safetensors"
    cli(*arguments, "--checkpoint", state)
    cli(*arguments, "--teacher", state)
    cli(*arguments, "--teacher", described)
    first, second, third = fitted
    assert (first["recipe"].model.checkpoint, first["recipe"].teacher) == (state, None)
    # A state dict is taken for the model of the recipe; a checkpoint says itself what it is.
    assert second["recipe"].teacher.checkpoint == state
    assert second["recipe"].teacher.name == "vit_tiny_patch16_224"
    assert third["recipe"].teacher == ModelSection(checkpoint=described)


def test_a_run_says_who_taught_it(cli: Cli, recipe: Path, checkpoints: Path, tmp_path: Path) -> None:
    """In its checkpoint, so that a resumed run cannot go on with another teacher unnoticed."""
    run, described, state = tmp_path / "run", checkpoints / "float.safetensors", checkpoints / "state.safetensors"
    arguments = ("train", recipe, "--checkpoint", state, "-o", run)
    assert cli(*arguments, "--teacher", described).status == 0
    teacher = read_checkpoint(run / LAST).metadata.recipe["teacher"]
    assert teacher == {"name": None, "args": {}, "pretrained": False, "checkpoint": str(described)}
    cli(*arguments, "--resume").refused(f"was started with the teacher {described}, now none is named")
    assert cli(*arguments, "--teacher", described, "--resume").status == 0
    # A frozen file names it as well, without the folder.
    assert cli("freeze", run, "-o", tmp_path / "m.qvit").status == 0
    assert qvit.IntegerModel.load(tmp_path / "m.qvit").provenance["recipe"]["teacher"]["checkpoint"] == "float.safetensors"


def test_a_teacher_that_is_quantized(cli: Cli, recipe: Path, checkpoints: Path, tmp_path: Path) -> None:
    weights = ("--checkpoint", checkpoints / "state.safetensors", "--teacher", checkpoints / "quantized.safetensors")
    cli("train", recipe, *weights, "-o", tmp_path / "run").refused("holds a quantized model: use a float one")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_classes": 5}, ("The teacher has 5 classes, the student 10: use another teacher",)),
        ({"img_size": 16}, ("The teacher takes images (1, 16, 16)", "the student (1, 8, 8)")),
        ({"in_chans": 3}, ("The teacher takes images (3, 8, 8)", "the student (1, 8, 8)")),
        ({"depth": 2}, ("The teacher has 2 blocks, the student 1", "set distill.dgd to 0")),
        ({"num_heads": 2}, ("The teacher has 2 heads, the student 3", "set distill.dgd to 0")),
    ],
)
def test_a_teacher_that_does_not_fit(
    cli: Cli, recipe: Path, small_vit: Callable[..., Any], tmp_path: Path, changes: dict[str, int], parts: tuple[str, ...]
) -> None:
    """Whether a checkpoint describes it or the recipe does."""
    teacher = small_vit(MODEL, **ARGUMENTS | changes)
    path = tmp_path / "teacher.safetensors"
    save_checkpoint(path, teacher, Metadata.of(teacher, preprocessing_of(teacher), list("abcde"), {"method": "float"}))
    cli("train", recipe, "--teacher", path, "-o", tmp_path / "run").refused(*parts)
    section = json.dumps({"name": MODEL, "args": ARGUMENTS | changes})
    cli("train", recipe, "--set", f"teacher={section}", "-o", tmp_path / "run").refused(*parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("nothing",), "There is no recipe 'nothing'"),
        (("nothing.yaml",), "nothing.yaml cannot be read"),
        (("RECIPE", "--set", "quant.bits=9"), "quant.bits=9"),
        (("RECIPE", "--set", "quant.bit=4"), "quant.bits"),
        (("RECIPE", "--set", "quant.bits"), "is no override"),
        (("RECIPE", "--data", "digits", "--train-data", "digits"), "either --data"),
        (("RECIPE", "--data", "nowhere"), "nowhere"),
        (("RECIPE", "--teacher", "none.pth"), "none.pth"),
        (("RECIPE", "--checkpoint", "none.pth"), "none.pth"),
    ],
)
def test_bad_input(cli: Cli, recipe: Path, tmp_path: Path, arguments: tuple[str, ...], part: str) -> None:
    done = cli("train", *(str(recipe) if a == "RECIPE" else a for a in arguments), "-o", tmp_path / "run")
    done.refused(part)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["imagenette", "paper_imagenet"])
def test_no_gpu_for_a_recipe_that_needs_one(cli: Cli, tmp_path: Path, name: str) -> None:
    """Said first, before anything is read or downloaded."""
    done = cli("train", name, "--data", "nowhere", "-o", tmp_path / "run")
    done.refused("needs a GPU and PyTorch finds none", "needs_gpu=false")
    assert not (tmp_path / "run").exists()


def test_images_of_other_classes(cli: Cli, recipe: Path, tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    cli("train", recipe, "--data", image_folder(3), "-o", tmp_path / "run").refused("3 classes", "10")
    assert not (tmp_path / "run").exists()
