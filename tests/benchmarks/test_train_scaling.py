"""Scaling on two CPU processes: what is measured, and that two processes train what one does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import train_scaling

from qvit.errors import QvitError
from qvit.training.checkpoint import LAST
from qvit.training.engine import fit
from qvit.training.recipe import Recipe

TINY = "{img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, num_classes: 3}"
DIGITS = "model.args={img_size: 8, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 24, depth: 1, num_heads: 3}"


def test_one_and_two_processes_are_timed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--processes", "1", "2", "--batch", "4", "--model", "vit_tiny_patch16_224"]
    arguments += ["--model-args", TINY, "--rounds", "2", "--steps", "2", "--warmup", "1", "--json", str(path)]
    rows = train_scaling.main(arguments)
    assert json.loads(path.read_text())["rows"] == rows
    assert [(row["processes"], row["batch"], row["batch_total"]) for row in rows] == [(1, 4, 4), (2, 4, 8)]
    one, two = rows
    for row in rows:
        assert (row["method"], row["weight_bits"]) == ("qvit", 2)
        assert row["train_images_per_s"] == pytest.approx(1000 * row["batch_total"] / row["ms_median"])
    assert one["efficiency"] == pytest.approx(100)
    assert two["efficiency"] == pytest.approx(50 * two["train_images_per_s"] / one["train_images_per_s"])
    assert (one["communication"], one["allreduce_ms"]) == (0, 0)
    assert 0 <= two["communication"] < 100
    assert two["allreduce_ms"] > 0
    assert one["gradient_mb"] == two["gradient_mb"] > 0.01
    assert "efficiency %" in capfd.readouterr().out


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    tiny = ["schedule.warmup_epochs=1", DIGITS]
    parent = Recipe.load("digits_float", [*tiny, "schedule.epochs=6", "eval_every=6"])
    fit(parent, tmp_path / "float", progress=False)
    changes = [*tiny, "schedule.epochs=2", "optim.name=sgd", "optim.lr=0.01", f"model.checkpoint={tmp_path / 'float' / LAST}"]
    arguments = ["--device", "cpu", "--data", "digits", "--processes", "2", "--train", "128", "--set", *changes]
    row = train_scaling.main(arguments)[0]
    assert (row["processes"], row["batch"], row["batch_total"], row["steps"], row["images"]) == (2, 64, 128, 22, 360)
    recipe = Recipe.load("digits", [*train_scaling.VARIANTS["soft"], "quant.bits=2", *changes, "batch_size=128"])
    one = train_scaling._train(recipe, tmp_path / "one")
    # One image is 0.28 points: of 360, two or three may lie on an edge that rounding moves.
    assert row["integer_top1"] == pytest.approx(one["integer_top1"], abs=1)
    assert row["fake_top1"] == pytest.approx(row["integer_top1"], abs=0.6)
    # Ten classes: a network that learned nothing would agree with anything.
    assert row["integer_top1"] > 50


def test_timed_and_trained_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, int, bool, list[str]]] = []

    def launch(_folder: Path, changes: list[str], batch: int, processes: int, train: bool, _options: Any) -> dict[str, Any]:
        launched.append((batch, processes, train, changes))
        row = {"processes": processes, "batch": batch // processes if train else batch}
        row["batch_total"] = row["batch"] * processes
        if train:
            return row | {"integer_top1": 90.0 + processes, "train_images_per_s": 50.0}
        return row | {"ms_median": 1.0, "train_images_per_s": 100.0 * processes - 20 * (processes > 1)}

    monkeypatch.setattr(train_scaling, "_launch", launch)
    path = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--data", "digits", "--processes", "1", "2", "--batch", "4", "8", "--train", "8"]
    rows = train_scaling.main([*arguments, "--json", str(path)])
    assert json.loads(path.read_text())["rows"] == rows
    assert [call[:3] for call in launched] == [
        (4, 1, False),
        (4, 2, False),
        (8, 1, False),
        (8, 2, False),
        (8, 1, True),
        (8, 2, True),
    ]
    assert [row.get("efficiency") for row in rows] == [100, 90, 100, 90, None, None]
    assert [row.get("difference") for row in rows] == [None, None, None, None, 0, 1]
    assert "data.train=digits" in launched[-1][3]
    # Without a row of one GPU there is nothing to compare with.
    assert not {"efficiency", "difference"} & set(train_scaling.main([*arguments[:4], "--processes", "2", "--train", "8"])[0])


def test_a_failing_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def failing(command: list[str], env: dict[str, str], check: bool) -> SimpleNamespace:
        seen.append(env)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(train_scaling.subprocess, "run", failing)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    with pytest.raises(QvitError, match="in 2 processes ended with status 3"):
        train_scaling.main(
            ["--device", "cpu", "--processes", "2", "--batch", "4", "--model", "vit_tiny_patch16_224", "--model-args", TINY]
        )
    assert seen[0]["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "0"], "--processes must be"),
        (["--processes", "1", "3", "--train", "256"], "shared evenly"),
        (["--train", "0"], "--train must be"),
        (["--train", "256", "--model", "deit_tiny_patch16_224", "--processes", "1"], "in another call"),
        (["--device", "cuda", "--processes", "64"], "more than the"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_scaling.main(["--device", "cpu", *arguments])
    assert words in capsys.readouterr().err
