"""The parent's side of a child process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qvit.bench.child
from qvit.bench.child import Child, ChildError

ECHO = """
import json, os, sys, time
request = json.loads(sys.argv[1])
time.sleep(request.get("sleep", 0))
print("chatter", file=sys.stderr)
if "error" in request: print(json.dumps({"error": request["error"]}))
if "crash" in request: os.abort() if request["crash"] == "abort" else sys.exit("the last words")
print("{}", flush=True)
for line in sys.stdin:
    if json.loads(line) == {"end": 1}: os._exit(3)
    print(json.dumps({"got": json.loads(line), "variable": os.environ.get("QVIT_TEST")}), flush=True)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "echo_child.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "echo_child"


def test_orders_and_replies(module: str) -> None:
    with Child(module, {"sleep": 0.2}, {"QVIT_TEST": "set"}) as child:
        assert child.start_seconds > 0.2
        for number in range(3):
            assert child.ask({"number": number}) == {"got": {"number": number}, "variable": "set"}
        process = child._process
    assert process.poll() == 0


def test_it_ends_with_the_block_even_after_an_error(module: str) -> None:
    children = []

    def fail() -> None:
        with Child(module, {}) as child:
            children.append(child)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert children[0]._process.poll() is not None


def test_errors_that_it_tells(module: str) -> None:
    with pytest.raises(ChildError, match=r"^no such model$"):
        Child(module, {"error": "no such model"})


def test_a_process_that_ends_without_a_word(module: str) -> None:
    with pytest.raises(ChildError, match=r"exit status 1 \(the last words\)"):
        Child(module, {"crash": "exit"})
    with pytest.raises(ChildError, match="signal 6"):
        Child(module, {"crash": "abort"})
    with Child(module, {}) as child:
        with pytest.raises(ChildError, match="exit status 3"):
            child.ask({"end": 1})
        with pytest.raises(ChildError, match="exit status 3"):
            child.ask({"again": 1})


def test_one_that_does_not_listen_is_killed(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(qvit.bench.child, "_SECONDS_TO_END", 0.1)
    (tmp_path / "deaf_child.py").write_text("import time\nprint('{}', flush=True)\ntime.sleep(60)")
    with Child("deaf_child", {}) as child:
        process = child._process
    assert process.poll() == -9


def test_the_child_finds_this_package(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    code = f"import sys\nsys.path.insert(0, {root!r})\nfrom qvit.bench.child import Child\nChild('qvit.bench.nothing', {{}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "No module named qvit.bench.nothing" in done.stderr
