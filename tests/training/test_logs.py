"""The log of a run: what is written is read back, and lines that were cut off are not."""

from __future__ import annotations

from pathlib import Path

from qvit.training.logs import METRICS, RunLog, read_metrics, truncate_metrics


def test_written_and_read(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 10, progress=False) as log:
        log.write("train", 4, 0, {"loss": 1.5, "lr": 1e-3})
        log.write("eval", 8, 1, {"top1": 50.0})
    path = tmp_path / METRICS
    lines = [
        {"kind": "train", "step": 4, "epoch": 0, "loss": 1.5, "lr": 1e-3},
        {"kind": "eval", "step": 8, "epoch": 1, "top1": 50.0},
    ]
    assert read_metrics(path) == lines
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 12, "lo\n[]\n3\n{"step": 1}\n')
    assert read_metrics(path) == lines
    truncate_metrics(path, 7)
    assert read_metrics(path) == lines[:1]
    assert path.read_text().count("\n") == 1


def test_no_log(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / METRICS) == []
    truncate_metrics(tmp_path / METRICS, 3)
    assert not (tmp_path / METRICS).exists()
