"""``qvit bench``, with the engine alone; its peers have tests of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvit.report_file import usable_cores

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def test_an_engine_alone(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--vs", "none", "--batch", "1,3", "--threads", "1", "--rounds", 1)
    done = cli("bench", frozen_file, *options, "--json", report)
    assert (done.status, done.err) == (0, "")
    content = json.loads(report.read_text())
    rows = content["rows"]
    assert [(row["engine"], row["batch"], row["threads"]) for row in rows] == [("cpu", 1, 1), ("cpu", 3, 1)]
    for row in rows:
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_median"])
        assert 0.02 < row["start_seconds"] < 60
        assert row["rss_mb"] >= row["rss_now_mb"] > 10
        assert row["file_bytes"] == frozen_file.stat().st_size
        assert f"{row['ms_median']:.2f}" in done.out
    assert done.out.count("qvit cpu") == 2
    assert content["command"][:2] == ["qvit", "bench"]


def test_one_thread_and_all_by_default(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert cli("bench", frozen_file, "--vs", "none", "--rounds", 1, "--json", report).status == 0
    threads = [row["threads"] for row in json.loads(report.read_text())["rows"]]
    assert threads == sorted({1, usable_cores()})


def test_a_busy_machine_is_told(cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (97.5, 0.0, 0.0))
    done = cli("bench", frozen_file, "--vs", "none", "--threads", 1, "--rounds", 1)
    assert done.status == 0
    assert "the machine is busy (load 97.5" in done.err


def test_mistakes(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    cli("bench", frozen_file, "--vs", "tvm").refused("no peer 'tvm' to compare with: use some of openvino")
    cli("bench", frozen_file, "--batch", "one").refused("--batch 'one' is no list of whole numbers")
    cli("bench", frozen_file, "--batch", "0").refused("--batch 0 is out of range")
    cli("bench", frozen_file, "--threads", "").refused("--threads '' is no list")
    cli("bench", frozen_file, "--rounds", 0).refused("--rounds 0 is out of range")
    cli("bench", tmp_path / "none.qvit", "--vs", "none").refused("No such file")
    cli("bench", frozen_file, "--engine", "warp", "--vs", "none").refused("engine warp cannot be measured", "no engine 'warp'")
    cli("bench", "no_such_model", "--vs", "none").refused("no_such_model")
    frozen_file.write_bytes(frozen_file.read_bytes()[:300])
    cli("bench", frozen_file, "--vs", "none").refused("truncated or damaged")
