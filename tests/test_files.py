"""`write_atomically`: the old file or the new one, never a part."""

from __future__ import annotations

import errno
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvit.errors import InputError
from qvit.files import write_atomically


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert _entries(path.parent) == ["file.bin"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_the_umask_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the whole process, and checkpoints are written by a thread while others make files of their own."""

    def touched(_mask: int) -> int:
        raise AssertionError("another thread's new file would have other permissions at this moment")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", touched)
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(lambda n: write_atomically(tmp_path / f"{n}", b"x"), range(40)))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    assert len(_entries(tmp_path)) == 40


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: write_atomically(tmp_path / "file", bytes([n]) * 50_000), range(40)))
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 50_000
    assert len(set(content)) == 1
    assert _entries(tmp_path) == ["file"]


def test_a_name_that_is_taken_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".file.taken").write_bytes(b"another's")
    names = iter(["taken", "free"])
    monkeypatch.setattr(secrets, "token_hex", lambda _bytes: next(names))
    write_atomically(tmp_path / "file", b"new")
    assert ((tmp_path / "file").read_bytes(), (tmp_path / ".file.taken").read_bytes()) == (b"new", b"another's")


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "Input/output error")])
def test_failure_at_any_step_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, message: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(InputError, match=message) as caught:
        write_atomically(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert _entries(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def on_full_device(descriptor: int, mode: str) -> object:
        os.close(descriptor)
        return real(os.open("/dev/full", os.O_WRONLY), mode)

    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", on_full_device)
    with pytest.raises(InputError, match="disk is full"):
        write_atomically(path, b"new" * 10_000)
    assert path.read_bytes() == b"old"
    assert _entries(tmp_path) == ["file"]


def test_ctrl_c_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert _entries(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "below", b"")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path, b"")
    assert _entries(tmp_path) == ["file"]
