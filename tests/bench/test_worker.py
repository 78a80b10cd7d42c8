"""The measured process: its answers, its memory, its errors, and that it imports nothing it does not need."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qvit.bench.worker import memory, time_calls


def test_the_first_call_is_not_counted() -> None:
    calls: list[int] = []
    assert len(time_calls(lambda: calls.append(0), 0.0, 5)) == 5
    assert len(calls) == 6
    times = time_calls(lambda: calls.append(0), 0.05, 1)
    assert len(times) > 1
    assert sum(times) <= 1000


def test_memory_is_of_this_process() -> None:
    before = memory()
    assert 5 < before["now_mb"] <= before["peak_mb"]
    block = np.ones(64 << 17)  # 64 MB of 2^20 bytes, touched
    after = memory()
    assert 55 < after["now_mb"] - before["now_mb"] < 75
    del block
    assert memory()["now_mb"] < after["now_mb"] - 50
    assert memory()["peak_mb"] > after["now_mb"] - 1  # the kernel counts pages in batches


def _serve(request: dict, *orders: dict, blocked: tuple[str, ...] = ()) -> tuple[int, list[dict]]:
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nfrom qvit.bench.worker import main\nmain()"
    command = [sys.executable, "-c", code, json.dumps(request)]
    text = "".join(json.dumps(order) + "\n" for order in orders)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    return done.returncode, [json.loads(line) for line in io.StringIO(done.stdout)]


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_serves_an_engine(frozen_file: Path, engine: str) -> None:
    request = {"engine": engine, "peer": None, "path": str(frozen_file), "shape": [3, 1, 8, 8], "threads": 1}
    # What a program that only classifies has no use for must not count as its memory.
    blocked = ("torch", "timm", "typer", "rich") if engine == "cpu" else ("typer", "rich")
    order = {"seconds": 0.01, "calls": 2}
    status, replies = _serve(request, order, order, blocked=blocked)
    assert status == 0
    assert replies[0] == {}
    assert len(replies) == 3
    assert all(len(reply["ms"]) >= 2 and min(reply["ms"]) > 0 for reply in replies[1:])
    assert replies[1]["peak_mb"] > 10


def test_tells_what_failed(frozen_file: Path) -> None:
    request = {"engine": "reference", "peer": None, "path": "absent.qvit", "shape": [1, 1, 8, 8], "threads": 1}
    status, replies = _serve(request)
    assert status == 1
    assert "No such file" in replies[0]["error"]
    status, replies = _serve(request | {"path": str(frozen_file), "shape": [1, 3, 8, 8]})
    assert status == 1
    assert "takes images" in replies[0]["error"]
