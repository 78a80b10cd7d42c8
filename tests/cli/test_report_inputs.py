"""What a report is given: models, their teachers and images, and the sentences where there are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import qvit
from qvit.cli.report_inputs import Opened, data_of, open_quantized, open_teacher
from qvit.errors import QvitError
from qvit.integer.model import IntegerModel
from qvit.training.checkpoint import load_student


def test_a_run_a_checkpoint_and_a_file(report_runs: Path, frozen_file: Path) -> None:
    run = open_quantized(report_runs / "qvit")
    assert run.title == "Q-ViT W2A2"
    assert {line["kind"] for line in run.log} == {"train", "epoch", "eval"}
    checkpoint = open_quantized(report_runs / "qvit" / "last.safetensors")
    assert checkpoint.log == run.log
    assert open_quantized(report_runs / "baseline").title == "baseline W2A2"
    frozen = open_quantized(frozen_file)
    assert isinstance(frozen.model, IntegerModel)
    assert (frozen.log, frozen.metadata, frozen.file_bytes) == ([], None, frozen_file.stat().st_size)
    assert frozen.title == "quantized W4A4"  # the file does not say by which method


def test_the_teacher_of_a_run_is_its_float_model(report_runs: Path, checkpoints: Path) -> None:
    student = open_quantized(report_runs / "qvit")
    teacher, why = open_teacher(None, student)
    assert (teacher is not None, why) == (True, "")
    named, _ = open_teacher(checkpoints / "float.safetensors", student)
    assert teacher is not None
    assert named is not None
    for own, other in zip(teacher.model.parameters(), named.model.parameters(), strict=True):
        assert own.equal(other)


def test_why_there_is_no_teacher(frozen_file: Path, checkpoints: Path, tmp_path: Path) -> None:
    assert open_teacher(None, open_quantized(frozen_file)) == (
        None,
        "A frozen file does not hold the float model that it came from: name it with --teacher.",
    )
    with pytest.raises(QvitError, match="does not say which model it belongs to"):
        open_teacher(checkpoints / "state.safetensors", open_quantized(frozen_file))
    student = open_quantized(checkpoints / "quantized.safetensors")
    assert "cannot be opened (There is no checkpoint /somewhere/vit.pth: check the path)" in open_teacher(None, student)[1]
    assert student.metadata is not None
    for recipe in ({"method": "calibration"}, {"method": "qvit"}):  # none that trains, and one that was given a live model
        silent = replace(student, metadata=replace(student.metadata, recipe=recipe))
        assert "does not say which float model is its teacher" in open_teacher(None, silent)[1]


def test_the_images_of_a_recipe(report_runs: Path, checkpoints: Path, frozen_file: Path, tmp_path: Path) -> None:
    assert data_of(open_quantized(report_runs / "qvit")) == [str(report_runs / "images")]
    assert data_of(open_quantized(checkpoints / "quantized.safetensors")) == ["/somewhere/digits"]
    # Files keep names without folders: only the digits are found by theirs.
    assert data_of(open_quantized(frozen_file)) == ["digits"]
    student, metadata = load_student(report_runs / "qvit" / "best.safetensors")
    path = tmp_path / "named.qvit"
    qvit.freeze(student, metadata.classes, {"recipe": {"data": {"train": "images", "val": None}}}).save(path)
    assert data_of(open_quantized(path)) is None
    qvit.freeze(student, metadata.classes).save(path)
    assert data_of(open_quantized(path)) is None


def test_titles() -> None:
    assert Opened(None, None, None, (), {"method": "irm"}, 3, 8).title == "IRM W3A8"  # type: ignore[arg-type]
    assert Opened(None, None, None, (), {"method": "own"}, 3, 3).title == "own W3A3"  # type: ignore[arg-type]
