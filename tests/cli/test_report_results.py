"""Rows of accuracy, size and latency."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvit.cli.report_inputs import open_quantized
from qvit.cli.report_results import own_rows, rows_of
from qvit.training.checkpoint import load_model


def test_a_checkpoint_and_its_frozen_file_have_the_same_float_size(report_runs: Path, checkpoints: Path) -> None:
    student = open_quantized(report_runs / "qvit")
    before = [p.clone() for p in student.model.parameters()]
    own, parent = own_rows(student, latency=False, threads=None)
    assert all(p.equal(q) for p, q in zip(student.model.parameters(), before, strict=True))  # freezing rounds a copy
    parameters = sum(p.numel() for p in load_model(checkpoints / "float.safetensors")[0].parameters())
    assert parent["file_bytes"] == 4 * parameters
    assert own["data"] == "images"
    frozen = open_quantized(report_runs / "student.qvit")
    assert own_rows(frozen, latency=False, threads=None) == []  # it says nothing of accuracy
    known = open_quantized(report_runs / "student.qvit")
    object.__setattr__(known, "facts", {"float_top1": 50.0, "integer_top1": 40.0, "data": "/a/b"})
    rows = own_rows(known, latency=False, threads=None)
    assert [(row["data"], row["file_bytes"]) for row in rows] == [("b", known.file_bytes), ("b", 4 * parameters)]


def test_rows_of_files_say_where_they_are_from() -> None:
    rows = [{"ms_median": 3.0}, {"fake_top1": 50.0, "own": True}, {"loss": 1.0}]
    report = {"hardware": {"cpu": "some cpu", "gpu": "some gpu"}, "rows": rows}
    found = rows_of(Path("folder/file.json"), report)
    assert [row["source"] for row in found] == ["file.json"] * 2
    assert all(row["machine"] == "some gpu" and not row["own"] for row in found)
    assert rows_of(Path("file.json"), {"rows": rows[:1]})[0]["machine"] is None


def test_latency(report_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvit.cli.report_results._SECONDS", 0.01)
    (row,) = own_rows(open_quantized(report_runs / "student.qvit"), latency=True, threads=1)
    assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
