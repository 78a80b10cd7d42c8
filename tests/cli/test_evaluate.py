"""``qvit eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.cli.images import name_of, spaced
from qvit.integer.model import IntegerModel
from qvit.sources import DigitsSource
from qvit.training.checkpoint import load_model, load_student

Cli = Callable[..., Any]


def _top1(predict: Callable[[np.ndarray], Any], model: Any, indices: list[int]) -> float:
    source = DigitsSource("val")
    preprocessing = model.preprocessing
    images = np.stack([preprocessing.normalise(preprocessing.pixels(source[i][0])) for i in indices])
    labels = np.asarray([source[i][1] for i in indices])
    return 100 * float((np.asarray(predict(images)).argmax(-1) == labels).mean())


@pytest.fixture
def qvit_file(checkpoints: Path, tmp_path: Path) -> Path:
    student, metadata = load_student(checkpoints / "quantized.safetensors")
    path = tmp_path / "student.qvit"
    qvit.freeze(student, metadata.classes).save(path)
    return path


def test_integers_against_their_checkpoint(cli: Cli, checkpoints: Path, qvit_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    against = ("--against", checkpoints / "quantized.safetensors", "--engine", "reference")
    done = cli("eval", qvit_file, "--data", "digits", "--limit", 50, "--batch", 16, *against, "--json", report)
    assert (done.status, done.err) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    runner = qvit.load(qvit_file, engine="reference")
    expected = _top1(runner, runner.model, spaced(360, 50))
    assert row["integer_top1"] == pytest.approx(expected)
    assert f"{expected:.2f} % (integer)" in done.out
    assert (row["images"], row["weight_bits"], row["act_bits"], row["engine"]) == (50, 4, 4, "reference")
    assert row["file_bytes"] == qvit_file.stat().st_size
    assert (row["agreement"], row["codes_agreement"], row["logits_difference"]) == (100, 100, 0)
    assert "kept" in done.out


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_cpu_engine_is_the_default(cli: Cli, checkpoints: Path, qvit_file: Path, tmp_path: Path, workers: int) -> None:
    report = tmp_path / "report.json"
    options = ("--limit", 50, "--batch", 16, "--threads", 1, "--workers", workers, "--json", report)
    done = cli("eval", qvit_file, "--data", "digits", *options, "--against", checkpoints / "quantized.safetensors")
    assert (done.status, done.err) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    runner = qvit.load(qvit_file, engine="cpu")
    assert row["engine"] == "cpu"
    assert row["integer_top1"] == pytest.approx(_top1(runner, runner.model, spaced(360, 50)))
    assert row["agreement"] >= 99.5
    assert "kept" in done.out


def test_a_file_of_another_checkpoint_does_not_agree(cli: Cli, checkpoints: Path, frozen_file: Path) -> None:
    against = ("--against", checkpoints / "quantized.safetensors")
    cli("eval", frozen_file, "--data", "digits", "--limit", 8, *against).refused("is not the student")


def test_checkpoints(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    for name, kind, key in (("float", "float", "float_top1"), ("quantized", "fake-quantized", "fake_top1")):
        report = tmp_path / "report.json"
        done = cli("eval", checkpoints / f"{name}.safetensors", "--data", "digits", "--limit", 40, "--json", report)
        assert (done.status, done.err) == (0, "")
        (row,) = json.loads(report.read_text())["rows"]
        model, metadata = load_model(checkpoints / f"{name}.safetensors")
        with torch.no_grad():
            expected = _top1(lambda x, model=model: model(torch.from_numpy(x)), metadata, spaced(360, 40))
        assert row[key] == pytest.approx(expected)
        assert f"({kind})" in done.out
        assert row["weight_bits"] == (32 if name == "float" else 4)


def test_the_folder_of_a_run_means_its_best_checkpoint(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    cli("eval", run, "--data", "digits").refused("holds no best.safetensors and no last.safetensors")
    (run / "last.safetensors").write_bytes((checkpoints / "float.safetensors").read_bytes())
    assert "(float)" in cli("eval", run, "--data", "digits", "--limit", 4).out
    (run / "best.safetensors").write_bytes((checkpoints / "quantized.safetensors").read_bytes())
    assert "(fake-quantized)" in cli("eval", run, "--data", "digits", "--limit", 4).out


def test_names_of_the_classes_that_differ_are_told(cli: Cli, frozen_file: Path, qvit_file: Path) -> None:
    assert "note: the classes have other names" in cli("eval", frozen_file, "--data", "digits", "--limit", 4).out
    assert "note:" not in cli("eval", qvit_file, "--data", "digits", "--limit", 4).out


def test_bad_input(cli: Cli, frozen_file: Path, checkpoints: Path, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    digits = ("--data", "digits")
    cli("eval", tmp_path / "none.qvit", *digits).refused("No such file")
    cli("eval", tmp_path / "none.safetensors", *digits).refused("none.safetensors")
    cli("eval", checkpoints / "state.safetensors", *digits).refused("no checkpoint of qvit")
    cli("eval", frozen_file, "--data", image_folder(3)).refused("images3 has 3 classes and the model has 10")
    cli("eval", frozen_file, "--data", tmp_path / "nowhere").refused("nowhere")
    cli("eval", frozen_file, *digits, "--limit", 0).refused("--limit 0 is out of range")
    cli("eval", frozen_file, *digits, "--batch", 0).refused("--batch 0 is out of range")
    cli("eval", frozen_file, *digits, "--workers", -1).refused("--workers -1 is out of range")
    cli("eval", frozen_file, *digits, "--engine", "warp").refused("no engine 'warp'")
    cli("eval", frozen_file, *digits, "--device", "tpu9").refused("no device 'tpu9'")
    cli("eval", frozen_file, *digits, "--device", "cuda", "--engine", "cpu").refused("'cpu' does not run on", "'cuda'")
    cli("eval", frozen_file, *digits, "--threads", 0).refused("--threads 0 is out of range")
    cli("eval", checkpoints / "float.safetensors", *digits, "--against", frozen_file).refused("--against")
    for option, value in (("--engine", "cuda"), ("--threads", 2)):
        done = cli("eval", checkpoints / "quantized.safetensors", *digits, option, value)
        done.refused(f"{option} is for the integers of a .qvit file", "freeze it, or leave")
    cli("eval", frozen_file, *digits, "--limit", 4, "--against", checkpoints / "float.safetensors").refused("float model")
    root = image_folder(10, per_class=1)
    (root / "4" / "0.png").write_bytes(b"damaged")
    cli("eval", frozen_file, "--data", root).refused(str(root / "4" / "0.png"))
    data = (checkpoints / "quantized.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    cli("eval", tmp_path / "cut.safetensors", *digits).refused("truncated or damaged")


def test_limit_is_spread_over_the_classes() -> None:
    assert spaced(10, 3) == [0, 4, 9]
    assert spaced(5, 9) == [0, 1, 2, 3, 4]
    assert len(set(spaced(1975, 500))) == 500


def test_names_of_data_have_no_folders() -> None:
    assert name_of(["/data/a.tar", "b.tar"]) == "a.tar, b.tar"


def test_a_wrong_file_is_refused_before_the_images_are_read(cli: Cli, frozen: IntegerModel, tmp_path: Path) -> None:
    path = tmp_path / "model.qvit"
    frozen.save(path)
    path.write_bytes(path.read_bytes()[:-4])
    cli("eval", path, "--data", tmp_path / "nowhere").refused("truncated or damaged")
