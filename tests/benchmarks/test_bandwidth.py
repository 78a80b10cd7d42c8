"""The memory bandwidth: every byte is moved, every round counted, the file is a result file."""

from __future__ import annotations

import json
from pathlib import Path

import bandwidth
import pytest

from qvit.analyze.roofline import CPU
from qvit.report_file import usable_cores


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "BYTES", 1 << 20)
    rows = bandwidth.main(["--rounds", "3", "--json", str(tmp_path / "bandwidth.json")])
    assert [row["threads"] for row in rows] == list(range(1, usable_cores() + 1))
    assert all(row["gb_per_s_best"] >= row["gb_per_s_median"] > 0 for row in rows)
    report = json.loads((tmp_path / "bandwidth.json").read_text())
    assert report["rows"] == rows
    assert str(tmp_path) not in json.dumps(report)


def test_the_rooflines_number_is_the_measured_one() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "bandwidth-epyc-zen4-2cores.json"
    rows = json.loads(path.read_text())["rows"]
    assert CPU.bandwidth == pytest.approx(1e9 * max(row["gb_per_s_best"] for row in rows), rel=0.01)
