"""The measured process: its answers, its memory, its errors, and that it imports nothing it does not need."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.bench.on_device import random_images
from qvit.bench.worker import _open, time_calls


def test_the_first_call_is_not_counted() -> None:
    calls: list[int] = []
    assert len(time_calls(lambda: calls.append(0), 0.0, 5)) == 5
    assert len(calls) == 6
    times = time_calls(lambda: calls.append(0), 0.05, 1)
    assert len(times) > 1
    assert sum(times) <= 1000


MEMORY = """
import numpy as np
from qvit.bench.worker import memory
before = memory()
assert 5 < before["now_mb"] <= before["peak_mb"], before
block = np.ones(64 << 17)  # 64 MB of 2^20 bytes, touched
after = memory()
assert 55 < after["now_mb"] - before["now_mb"] < 75, (before, after)
del block
assert memory()["now_mb"] < after["now_mb"] - 50, (after, memory())
assert memory()["peak_mb"] > after["now_mb"] - 1, (after, memory())  # the kernel counts pages in batches
"""


def test_memory_is_of_this_process() -> None:
    """In a process that nothing else runs in."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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


def test_serves_an_engine_on_a_device(frozen_file: Path) -> None:
    request = {"engine": "reference", "peer": None, "path": str(frozen_file), "shape": [2, 1, 8, 8], "device": "cpu"}
    status, replies = _serve(request | {"input": "uint8"}, {"seconds": 0.01, "calls": 2})
    assert status == 0
    assert replies[0] == {}
    assert len(replies[1]["ms"]) >= 2
    assert replies[1]["device"] == "cpu"
    assert "gpu_mb" not in replies[1]


@pytest.fixture
def _tf32() -> Iterator[None]:
    """The settings of TF32 are the same afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_tf32")
def test_opens_engines_and_peers_on_a_device(frozen_file: Path, tmp_path: Path, small_vit: Callable[..., Any]) -> None:
    shape, device = [2, 1, 8, 8], {"device": "cpu"}
    engine = {"engine": "reference", "peer": None, "path": str(frozen_file), "shape": shape, **device}
    runner = qvit.load(frozen_file, engine="reference")
    for dtype in ("uint8", "float32"):
        calls = _open(engine | {"input": dtype})
        assert np.array_equal(calls.array(), runner(random_images(shape, dtype, torch.device("cpu")).numpy()))
    model = small_vit(embed_dim=32, num_heads=1, depth=1, img_size=8, in_chans=1, patch_size=4).bfloat16()
    torch.save(model, tmp_path / "model.pt")
    peer = {"engine": None, "peer": "eager-bf16", "path": str(tmp_path), "shape": shape, **device}
    with torch.no_grad():
        expected = model(random_images(shape, "bfloat16", torch.device("cpu")))
    assert np.array_equal(_open(peer | {"input": "bfloat16"}).array(), expected.float().numpy())
    with pytest.raises(RuntimeError, match="type"):
        _open(peer | {"input": "float32"}).array()


def test_tells_what_failed(frozen_file: Path) -> None:
    request = {"engine": "reference", "peer": None, "path": "absent.qvit", "shape": [1, 1, 8, 8], "threads": 1}
    status, replies = _serve(request)
    assert status == 1
    assert "No such file" in replies[0]["error"]
    status, replies = _serve(request | {"path": str(frozen_file), "shape": [1, 3, 8, 8]})
    assert status == 1
    assert "takes images" in replies[0]["error"]
