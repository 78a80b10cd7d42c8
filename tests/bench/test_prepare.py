"""The preparing process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from qvit.bench.run import make_random_model
from qvit.integer.model import IntegerModel


def _prepare(**request: object) -> tuple[int, dict]:
    command = [sys.executable, "-m", "qvit.bench.prepare", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    (line,) = done.stdout.splitlines()
    return done.returncode, json.loads(line)


def test_a_random_model(tmp_path: Path) -> None:
    path = tmp_path / "model.qvit"
    assert _prepare(name="deit_tiny_patch16_224", bits=2, path=str(path)) == (0, {})
    assert IntegerModel.load(path).block_bits() == (2, 2)
    assert IntegerModel.load(path).residual == "float32"


def test_a_random_model_with_a_rounded_residual_stream(tmp_path: Path) -> None:
    path = tmp_path / "model.qvit"
    make_random_model("deit_tiny_patch16_224", 2, path, residual="float16")
    assert IntegerModel.load(path).residual == "float16"


def test_a_peers_model(frozen_file: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert _prepare(peer="torch-bf16", file=str(frozen_file), batch=2, path=str(tmp_path / "made")) == (0, {})
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["model.pt2"]


def test_what_fails_is_told(tmp_path: Path) -> None:
    status, reply = _prepare(name="no_such_model", bits=4, path=str(tmp_path / "model.qvit"))
    assert status == 1
    assert "no_such_model" in reply["error"]
    assert "\n" not in reply["error"]
