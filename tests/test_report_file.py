"""The result file that every command writes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import qvit
from qvit import report_file
from qvit.errors import InputError


def test_schema(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.json"
    rows = [{"model": "vit", "integer_top1": 97.5, "images": 10, "ratio_to_peer": float("nan"), "seed": None}]
    report_file.write_report(path, rows, ["qvit", "eval", "m.qvit"])
    report = json.loads(path.read_text())
    assert list(report) == ["schema", "command", "versions", "hardware", "rows"]
    assert report["schema"] == 1
    assert report["command"] == ["qvit", "eval", "m.qvit"]
    assert report["rows"] == [{"model": "vit", "integer_top1": 97.5, "images": 10, "ratio_to_peer": None, "seed": None}]
    assert report["versions"]["qvit"] == qvit.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert {"numpy", "safetensors", "torch"} <= set(report["versions"])
    assert report["hardware"]["cores"] >= 1
    assert report["hardware"]["cpu"]


def test_reading_what_was_written(tmp_path: Path) -> None:
    rows = [{"model": "vit", "integer_top1": 97.5}]
    report_file.write_report(tmp_path / "report.json", rows, ["qvit"])
    assert report_file.read_report(tmp_path / "report.json")["rows"] == rows


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read .No such file"),
        ("{", "is no result file"),
        ("[1]", "is no result file"),
        ('{"schema": 1}', "is no result file"),
        ('{"schema": 1, "rows": [1]}', "is no result file"),
        ('{"schema": 2, "rows": []}', "schema 2 and this qvit reads 1"),
    ],
)
def test_what_is_no_result_file(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        report_file.read_report(tmp_path / "report.json")


def test_nothing_names_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report_file.write_report(path, [], ["qvit"])
    text = path.read_text()
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text


def test_versions_import_nothing() -> None:
    code = "import sys; from qvit.report_file import *; versions(); hardware(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        report_file.write_report(tmp_path, [], ["qvit"])


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n\nmodel name\t: other\n", "AMD EPYC (family 25, model 17)"),
        ("Hardware\t: Raspberry Pi\n", "Raspberry Pi"),
    ],
)
def test_the_generation_of_the_processor_is_told(monkeypatch: pytest.MonkeyPatch, cpuinfo: str, name: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_options: cpuinfo)
    assert report_file.hardware()["cpu"] == name
