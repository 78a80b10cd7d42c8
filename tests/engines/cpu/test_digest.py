"""A compiled module that was not made from the sources beside it is refused; a wheel, which has none, is taken as it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qvit
from qvit.engines import create_engine, default_engine
from qvit.engines.cpu import CpuEngine, _native, digest
from qvit.errors import QvitError, StaleBuildError
from qvit.integer.model import IntegerModel

REFUSED = r"^The compiled CPU engine was not made from \S+src as it is now: install qvit again \(pip install -e \.\)\.$"


@pytest.fixture(autouse=True)
def unread() -> Iterator[None]:
    digest.is_current.cache_clear()
    yield
    digest.is_current.cache_clear()


@pytest.fixture
def model(make_student: Callable[..., Any], small_vit: Callable[..., Any]) -> IntegerModel:
    return qvit.freeze(make_student(small_vit(embed_dim=32, num_heads=1, depth=1, img_size=16, patch_size=8)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the sources beside the package."""
    src = tmp_path / "src"
    (src / "ops").mkdir(parents=True)
    (src / "engine.cpp").write_text("int a;")
    (src / "ops" / "math.h").write_text("int b;")
    monkeypatch.setattr(digest, "SOURCES", src)
    return src


def test_every_change_of_a_source_is_another_digest(folder: Path) -> None:
    seen = [digest.digest(folder)]
    assert len(seen[0]) == 64
    (folder / "notes.txt").write_text("no source")
    (folder / ".#engine.h").symlink_to("an.editor@somewhere")  # dangling
    (folder / "engine.cpp.orig").write_text("no source")
    assert digest.digest(folder) == seen[0]
    (folder / "engine.cpp").write_text("int c;")
    seen.append(digest.digest(folder))
    (folder / "engine.cpp").rename(folder / "ops" / "engine.cpp")
    seen.append(digest.digest(folder))
    (folder / "pool.h").write_text("")
    seen.append(digest.digest(folder))
    (folder / "pool.h").write_text("int b;")
    (folder / "ops" / "math.h").write_text("")
    seen.append(digest.digest(folder))
    assert len({*seen}) == 5


def test_the_compiled_module_says_what_it_was_made_from() -> None:
    """With what CMake asks, which runs the file by itself."""
    if not digest.SOURCES.exists():
        pytest.skip("a wheel has no sources")
    file = str(digest.__file__)
    said = subprocess.run([sys.executable, "-I", "-S", file], capture_output=True, text=True, check=True).stdout
    assert said == f"{_native.sources}\n"


@pytest.mark.parametrize("sources", ["0" * 64, None], ids=["of other sources", "of before it said so"])
def test_an_old_module_is_refused(
    sources: str | None, model: IntegerModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no engine was named too: the reference engine would hide it. Nothing of the module has run by then."""
    old = SimpleNamespace() if sources is None else SimpleNamespace(sources=sources)
    monkeypatch.setattr("qvit.engines.cpu._native", old)
    monkeypatch.setitem(sys.modules, "qvit.engines.cpu._native", old)
    assert default_engine() == "cpu"
    for make in (lambda: CpuEngine(model), lambda: create_engine(model), lambda: create_engine(model, "cpu")):
        with pytest.raises(StaleBuildError, match=REFUSED):
            make()
    assert issubclass(StaleBuildError, QvitError)


def test_sources_that_changed_since_are_noticed(model: IntegerModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(**{**vars(_native), "sources": digest.digest(folder)})
    monkeypatch.setattr("qvit.engines.cpu._native", now)
    monkeypatch.setitem(sys.modules, "qvit.engines.cpu._native", now)
    pixels = np.zeros((1, 3, 16, 16), np.uint8)
    assert CpuEngine(model).run(pixels).shape == (1, 7)
    (folder / "engine.cpp").write_text("int a; // as edited")
    assert CpuEngine(model).run(pixels).shape == (1, 7)  # read once a process
    digest.is_current.cache_clear()
    with pytest.raises(StaleBuildError, match=REFUSED):
        CpuEngine(model)


def test_without_sources_there_is_nothing_to_compare(
    model: IntegerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nowhere in (tmp_path / "src", tmp_path):
        assert digest.digest(nowhere) == ""
        monkeypatch.setattr(digest, "SOURCES", nowhere)
        digest.is_current.cache_clear()
        assert digest.is_current("0" * 64)
        assert digest.is_current(None)
        assert CpuEngine(model).name == "cpu"
