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


def test_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report_file.write_report(path, [{"a": 1, "b": None}], ["qvit"])
    assert report_file.read_rows(path) == [{"a": 1, "b": None}]
    with pytest.raises(InputError, match="cannot be read"):
        report_file.read_rows(tmp_path / "none.json")
    for text in ("", "[]", "{}", '{"rows": 1}', '{"rows": [1]}', "\xff"):
        path.write_text(text)
        with pytest.raises(InputError, match="no result file"):
            report_file.read_rows(path)


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
