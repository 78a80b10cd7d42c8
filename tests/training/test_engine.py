"""The loop: it learns, it resumes with the same bits, many processes do what one does, and it stops in good order."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from torch import nn

import qvit.training.engine
import qvit.training.loop
from qvit.analyze.agreement import agreement
from qvit.convert import quantize
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError, RecipeError, TrainingError, WeightsError
from qvit.integer.freeze import freeze
from qvit.sources import open_source
from qvit.training.checkpoint import BEST, LAST, load_model, load_student, read_checkpoint
from qvit.training.data import evaluation_loader, open_split
from qvit.training.engine import fit, train
from qvit.training.evaluate import evaluate
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.recipe import Recipe

from .helpers import VAL, interrupt_at_step, tiny_values

MakeRecipe = Callable[..., Recipe]
RUNNER = Path(__file__).with_name("run_fit.py")
# Everything that draws random numbers: augmentation, mixup, stochastic depth, dropout.
RANDOM = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 24, "depth": 2, "num_heads": 2}
        | {"drop_path_rate": 0.3, "proj_drop_rate": 0.2},
    },
    "data": {"mixup": 0.5, "label_smoothing": 0.1},
}
SWIN = {"img_size": 8, "patch_size": 1, "window_size": 4, "num_classes": 3, "embed_dim": 8} | {
    "depths": [2, 1],
    "num_heads": [2, 4],
    "drop_path_rate": 0.1,
}


def metrics(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same_tensors(a: Path, b: Path) -> bool:
    first, second = safetensors.torch.load_file(a), safetensors.torch.load_file(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_a_float_model_learns_and_is_saved(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = fit(tiny_recipe(method="float", schedule={"epochs": 12}, optim={"lr": 5e-3}), tmp_path / "run", progress=False)
    assert result.best_top1 >= 90
    assert (result.images, result.epochs, result.steps) == (VAL, 12, 60)
    losses = [line["loss"] for line in metrics(result.output, "train")]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    model, metadata = load_model(result.output / BEST)
    assert metadata.student is None
    assert metadata.classes == ["blue", "green", "red"]
    assert metadata.epochs == result.best_epoch
    source = open_source(metadata.recipe["data"]["train"], "val")
    assert evaluate(model, evaluation_loader(source, metadata.preprocessing, 4)).top1 == result.best_top1
    assert any(path.name.startswith("events.") for path in result.output.iterdir())


def test_a_float_model_learns_from_a_teacher_alone(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = RANDOM["model"]
    teacher = timm.create_model(model["name"], **model["args"]).eval()
    with torch.no_grad():
        teacher.head.weight.mul_(30)  # answers that are not all alike
    changes = {"method": "float", "distill": {"label": 0, "hard": 0, "soft": 1, "temperature": 2}, "optim": {"lr": 5e-3}}
    fit(tiny_recipe(**changes, schedule={"epochs": 6}), tmp_path / "a", teacher=teacher, progress=False)
    losses = [row["loss"] for row in metrics(tmp_path / "a", "train")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert load_model(tmp_path / "a" / LAST)[1].student is None
    # the recipe's teacher, and a model of another family
    swin = {"name": "swin_tiny_patch4_window7_224", "args": SWIN}
    data = {"mean": [0.5] * 3, "std": [0.25] * 3}
    recipe = tiny_recipe(**changes, schedule={"epochs": 1}, model=swin, teacher=model, data=data)
    fit(recipe, tmp_path / "b", progress=False)
    assert set(metrics(tmp_path / "b", "train")[0]) - {"kind", "step", "epoch", "loss", "lr"} == {"soft"}


def test_a_float_model_without_a_teacher_reads_labels_alone(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    fit(tiny_recipe(method="float", schedule={"epochs": 1}, distill={"soft": 1}), tmp_path, progress=False)
    row = metrics(tmp_path, "train")[0]
    assert row["loss"] == row["label"]


@pytest.mark.parametrize(
    ("method", "terms", "rectify"),
    [
        ("baseline", {"label", "hard"}, False),
        ("irm", {"label", "hard"}, True),
        ("dgd", {"label", "hard", "dgd"}, False),
        ("qvit", {"label", "hard", "dgd"}, True),
    ],
)
def test_the_four_methods(tiny_recipe: MakeRecipe, tmp_path: Path, method: str, terms: set[str], rectify: bool) -> None:
    result = fit(tiny_recipe(method=method, schedule={"epochs": 1}), tmp_path, progress=False)
    first = metrics(tmp_path, "train")[0]
    assert terms == set(first) - {"kind", "step", "epoch", "loss", "lr"}
    assert first["loss"] == pytest.approx(0.5 * first["label"] + 0.5 * first["hard"] + first.get("dgd", 0), rel=1e-5)
    student, metadata = load_student(tmp_path / LAST)
    assert student.qvit.spec.rectify is rectify
    assert metadata.preprocessing.crop_pct == 1.0
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(student(images), result.model(images))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_stream_of_float16_trains_and_its_integers_are_what_was_trained(
    family: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    swin = {"model": {"name": "swin_tiny_patch4_window7_224", "args": SWIN}} if family == "swin" else {}
    recipe = tiny_recipe(quant={"bits": 3, "residual": "float16"}, schedule={"epochs": 2}, **swin)
    result = fit(recipe, tmp_path, progress=False)
    student, metadata = load_student(tmp_path / LAST)
    frozen = freeze(student)
    assert (student.qvit.spec.residual, frozen.residual) == ("float16", "float16")
    source = open_source(metadata.recipe["data"]["train"], "val")
    batches = list(evaluation_loader(source, metadata.preprocessing, 4))
    measured = agreement(student, ReferenceEngine(frozen), batches)
    assert (measured.worst_codes, measured.top1, measured.logits) == (100, 100, 0)
    assert evaluate(result.model, batches).top1 == evaluate(student, batches).top1


def test_statsq_trains_and_its_integers_are_what_was_trained(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(quant={"bits": 2, "weight_quantizer": "statsq"}, schedule={"epochs": 8}, optim={"lr": 5e-3})
    result = fit(recipe, tmp_path, progress=False)
    losses = [line["loss"] for line in metrics(tmp_path, "train")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    student, metadata = load_student(tmp_path / LAST)
    assert student.qvit.spec.weight_quantizer == "statsq"
    frozen = freeze(student)
    assert all(layer.weight.half_step == layer.name.startswith("blocks") for layer in frozen.linears())
    source = open_source(metadata.recipe["data"]["train"], "val")
    batches = list(evaluation_loader(source, metadata.preprocessing, 4))
    measured = agreement(student, ReferenceEngine(frozen), batches)
    assert (measured.worst_codes, measured.top1, measured.logits) == (100, 100, 0)
    assert evaluate(ReferenceEngine(frozen).forward, batches).top1 == pytest.approx(result.top1, abs=10)


def test_a_student_at_hand_is_trained_in_place(tiny_recipe: MakeRecipe, image_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model=None, schedule={"epochs": 1})
    teacher = timm.create_model(RANDOM["model"]["name"], **RANDOM["model"]["args"])
    student = quantize(teacher, bits=4)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    result = train(student, teacher=teacher, recipe=recipe, data=image_folder, output=tmp_path, progress=False)
    assert result.model is student
    assert load_student(tmp_path / LAST)[1].student == student.qvit
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_distilled_deit_learns_on_two_heads(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    args = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = {"name": "deit_tiny_distilled_patch16_224", "args": args}
    result = fit(tiny_recipe(model=model, schedule={"epochs": 1}), tmp_path, progress=False)
    line = metrics(tmp_path, "train")[-1]
    assert line["label"] != line["hard"]
    assert result.model.distilled_training is False
    assert result.model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_the_same_seed_gives_the_same_bits_and_another_other_ones(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    for name, seed, workers in (("a", 0, 0), ("b", 0, 1), ("c", 1, 0)):
        recipe = tiny_recipe(**RANDOM | {"data": RANDOM["data"] | {"workers": workers}}, seed=seed, schedule={"epochs": 1})
        fit(recipe, tmp_path / name, progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
    assert not same_tensors(tmp_path / "a" / LAST, tmp_path / "c" / LAST)


def test_killed_at_a_random_step_and_resumed_ends_with_the_same_bits(
    tiny_recipe: MakeRecipe, image_folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"schedule": {"epochs": 30}, "checkpoint_every": 3, **RANDOM}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_values(image_folder, **changes)))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(RUNNER), str(tmp_path / "recipe.yaml"), str(killed)]
    process = subprocess.Popen(command, env=environment())
    last_step = random.Random(time.time_ns()).randint(7, 60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        log = killed / "metrics.jsonl"
        if log.exists() and f'"step": {last_step},' in log.read_text():
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = read_checkpoint(killed / LAST).metadata
    assert 3 <= stopped.step < 150, "the process was not killed in time"

    fit(tiny_recipe(**changes), killed, resume=True, progress=False)
    fit(tiny_recipe(**changes), whole, progress=False)
    assert same_tensors(killed / LAST, whole / LAST)
    assert same_tensors(killed / BEST, whole / BEST)
    for kind in ("train", "eval"):
        assert metrics(killed, kind) == metrics(whole, kind)


def test_swin_learns_with_irm_dgd_and_features(tiny_recipe: MakeRecipe, image_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        model={"name": "swin_tiny_patch4_window7_224", "args": SWIN},
        distill={"dgd": 0.3, "feature": 0.5, "feature_blocks": "all"},
        optim={"lr": 5e-3},
        schedule={"epochs": 6},
    )
    result = fit(recipe, tmp_path, progress=False)
    rows = metrics(tmp_path, "train")
    assert {"label", "hard", "dgd", "feature"} <= set(rows[0])
    assert sum(row["loss"] for row in rows[-5:]) < 0.8 * sum(row["loss"] for row in rows[:5])
    student, metadata = load_student(tmp_path / LAST)
    assert metadata.architecture.name == "swin_tiny_patch4_window7_224"
    table = student.layers[0].blocks[1].attn.relative_position_bias_table
    assert torch.equal(table, result.model.layers[0].blocks[1].attn.relative_position_bias_table)
    source = open_source(str(image_folder), "val")
    measured = agreement(student, ReferenceEngine(freeze(student)), evaluation_loader(source, metadata.preprocessing, 4))
    assert set(measured.codes.values()) == {100.0}
    assert (measured.top1, measured.logits) == (100.0, 0.0)


def test_swin_resumes_with_the_same_bits(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(
        model={"name": "swin_tiny_patch4_window7_224", "args": SWIN}, distill={"dgd": 0.3}, schedule={"epochs": 2}
    )
    interrupt_at_step(monkeypatch, 7)
    with pytest.raises(TrainingInterrupted):
        fit(recipe, tmp_path / "a", progress=False)
    monkeypatch.undo()
    fit(recipe, tmp_path / "a", resume=True, progress=False)
    fit(recipe, tmp_path / "b", progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_ctrl_c_saves_and_resumes_with_the_same_bits(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    recipe = tiny_recipe(**RANDOM)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    name = "learning_rate" if where == "step" else "count_correct"
    original, calls = getattr(qvit.training.loop, name), []

    def interrupting(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == (7 if where == "step" else 2):
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(qvit.training.loop, name, interrupting)
    with pytest.raises(TrainingInterrupted, match=r"after step .* of 15: resume the run in"):
        fit(recipe, tmp_path / "a", progress=False)
    monkeypatch.undo()
    stopped = read_checkpoint(tmp_path / "a" / LAST).metadata
    assert (stopped.step, stopped.epochs) == ((7, 1) if where == "step" else (10, 1))
    assert signal.getsignal(signal.SIGINT) is before

    resumed = fit(recipe, tmp_path / "a", resume=True, progress=False)
    whole = fit(recipe, tmp_path / "b", progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
    assert (resumed.top1, resumed.best_top1, resumed.best_epoch) == (whole.top1, whole.best_top1, whole.best_epoch)
    assert [line["epoch"] for line in metrics(tmp_path / "a", "eval")] == [1, 2, 3]


def test_two_processes_do_what_one_does_with_twice_the_batch(
    tiny_recipe: MakeRecipe, image_folder: Path, tmp_path: Path
) -> None:
    # SGD with small steps: rounding errors stay small, as they would not through Adam or many values that change their code.
    # With steps three times as large one did, on a machine, at the eighth.
    changes: dict[str, Any] = {"data": {"workers": 1}, "optim": {"name": "sgd", "lr": 0.001}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_values(image_folder, batch_size=4, **changes)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(RUNNER), str(tmp_path / "recipe.yaml"), str(tmp_path / "two")]
    subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True)
    fit(tiny_recipe(batch_size=8, **changes), tmp_path / "one", progress=False)

    fit(tiny_recipe(batch_size=8, data={"workers": 1}, optim={"name": "sgd", "lr": 0.002}), tmp_path / "other", progress=False)

    one, two, other = (metrics(tmp_path / name, "train") for name in ("one", "two", "other"))
    assert len(one) == len(two) == 15
    for a, b in zip(one, two, strict=True):
        for term in ("loss", "label", "hard", "dgd", "lr"):
            assert b[term] == pytest.approx(a[term], rel=1e-5), (a["step"], term)
    # Gradients that were summed and not averaged would show.
    assert abs(other[4]["loss"] / one[4]["loss"] - 1) > 1e-3
    assert abs(other[-1]["loss"] / one[-1]["loss"] - 1) > 1e-2
    assert [(line["top1"], line["images"]) for line in metrics(tmp_path / "two", "eval")] == [
        (line["top1"], VAL) for line in metrics(tmp_path / "one", "eval")
    ]
    assert read_checkpoint(tmp_path / "two" / LAST).metadata.processes == 2
    with pytest.raises(TrainingError, match="2 processes"):
        fit(tiny_recipe(batch_size=4, **changes), tmp_path / "two", resume=True, progress=False)


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qvit.training.loop, "learning_rate", lambda step, *_: 1e-3 if step < 7 else 1e38)
    recipe = tiny_recipe(log_every=100, optim={"clip_grad": None})
    with pytest.raises(
        TrainingError, match=r"not a finite number at step .*last good checkpoint is .*last\.safetensors"
    ) as caught:
        fit(recipe, tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    checkpoint = read_checkpoint(tmp_path / LAST)
    assert checkpoint.metadata.step == 5
    assert all(tensor.isfinite().all() for tensor in checkpoint.model_state().values())


def test_weights_that_overflow_in_the_last_step_are_not_saved(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qvit.training.loop, "learning_rate", lambda step, *_: 1e-3 if step < 9 else float("inf"))
    with pytest.raises(TrainingError, match="model is not a finite number at step 10"):
        fit(tiny_recipe(method="float"), tmp_path, progress=False)
    assert read_checkpoint(tmp_path / LAST).metadata.step == 5


def test_evaluation_every_few_epochs_and_at_the_end(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    fit(tiny_recipe(method="float", eval_every=2), tmp_path, progress=False)
    assert [line["epoch"] for line in metrics(tmp_path, "eval")] == [2, 3]


def test_a_finished_run_resumes_to_its_result(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(method="float", schedule={"epochs": 1})
    first = fit(recipe, tmp_path, progress=False)
    again = fit(recipe, tmp_path, resume=True, progress=False)
    assert (again.top1, again.steps, again.train_images_per_s) == (first.top1, first.steps, 0)


def test_a_run_is_not_overwritten_nor_continued_with_another_recipe(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    fit(tiny_recipe(method="float", schedule={"epochs": 1}), tmp_path, progress=False)
    with pytest.raises(TrainingError, match="holds a run already"):
        fit(tiny_recipe(), tmp_path, progress=False)
    with pytest.raises(TrainingError, match=r"optim\.lr=0\.002, now it is 0\.5"):
        fit(tiny_recipe(method="float", schedule={"epochs": 1}, optim={"lr": 0.5}), tmp_path, resume=True, progress=False)
    (tmp_path / LAST).write_bytes(b"cut")
    with pytest.raises(WeightsError, match="truncated or damaged"):
        fit(tiny_recipe(method="float"), tmp_path, resume=True, progress=False)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": {"args": {"num_classes": 5}}}, InputError, "3 classes and the model has 5"),
        ({"batch_size": 64}, InputError, "takes 64 training images and there are 40"),
        ({"model": None}, RecipeError, "names no model"),
        ({"data": {"train": "/no/such/folder"}}, InputError, "There is no /no/such/folder"),
        ({"optim": {"name": "adamv"}}, RecipeError, "adamv"),
        ({"data": {"augment": {"auto_augment": "magic"}}}, RecipeError, "knows no policy 'magic'"),
        ({"optim": {"args": {"eps": -1}}}, RecipeError, "Invalid epsilon value"),
        ({"quant": {"overrides": {"*.nothing": 8}}}, ValueError, "matches no layer"),
    ],
)
def test_mistakes_end_before_training(
    tiny_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    if changes.get("model"):
        changes = {"model": {"name": "vit_tiny_patch16_224", "args": RANDOM["model"]["args"] | changes["model"]["args"]}}
    with pytest.raises(error, match=words):
        fit(tiny_recipe(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_made_is_named_before_any_work(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qvit.training.engine, "set_up", None)
    (tmp_path / "file").write_bytes(b"mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot be made \(.*file is no folder\): name another one"):
            fit(tiny_recipe(), output, progress=False)
    monkeypatch.setattr(os, "access", lambda place, _mode: place != tmp_path)
    with pytest.raises(InputError, match=r"cannot be written \(no permission in .*\): name another one"):
        fit(tiny_recipe(), tmp_path / "a" / "b", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_student_needs_a_teacher_and_a_quantizing_method(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    model: nn.Module = timm.create_model(RANDOM["model"]["name"], **RANDOM["model"]["args"])
    student = quantize(model, bits=4)
    with pytest.raises(RecipeError, match="needs a teacher"):
        fit(tiny_recipe(), tmp_path, model=student, progress=False)
    with pytest.raises(RecipeError, match="method float"):
        fit(tiny_recipe(method="float"), tmp_path, model=student, progress=False)
    other = timm.create_model(RANDOM["model"]["name"], **RANDOM["model"]["args"] | {"num_classes": 4})
    with pytest.raises(RecipeError, match="teacher has 4 classes"):
        fit(tiny_recipe(), tmp_path, model=student, teacher=other, progress=False)


def test_without_a_teacher_the_labels_are_enough(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    student = quantize(timm.create_model(RANDOM["model"]["name"], **RANDOM["model"]["args"]), bits=4)
    recipe = tiny_recipe(method="irm", distill={"label": 1, "hard": 0}, schedule={"epochs": 1})
    fit(recipe, tmp_path, model=student, progress=False)
    assert "hard" not in metrics(tmp_path, "train")[0]


def test_what_a_run_measures_and_keeps_is_what_freezing_gives(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(quant={"bits": 2}, schedule={"epochs": 4}, optim={"lr": 5e-3}, eval_every=1)
    result = fit(recipe, tmp_path / "often", progress=False)
    for path in (tmp_path / "often" / LAST, tmp_path / "often" / BEST):
        student, _ = load_student(path)
        state = {name: value.clone() for name, value in student.state_dict().items()}
        model = freeze(student)
        assert all(torch.equal(state[name], value) for name, value in student.state_dict().items()), "freezing rounds nothing"
        if path.name == LAST:
            val = open_split(recipe.data, "val")
            images = evaluation_loader(val, model.preprocessing, 16)
            assert evaluate(ReferenceEngine(model).forward, images, torch.device("cpu")).top1 == result.top1
    # Only then: what is rounded to be measured goes on as it was.
    fit(recipe.override("eval_every=4"), tmp_path / "once", progress=False)
    assert same_tensors(tmp_path / "once" / LAST, tmp_path / "often" / LAST)
