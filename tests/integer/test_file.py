"""The `.qvit` file: what is written is what is read, and whatever else lies at the path is refused with a sentence."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qvit.errors import FileFormatError, InputError, QvitError
from qvit.integer import file as qvit_file
from qvit.integer.model import IntegerModel


def _same(a: IntegerModel, b: IntegerModel) -> bool:
    equal = set(a.tensors) == set(b.tensors) and all(
        a.tensors[name].dtype == b.tensors[name].dtype and np.array_equal(a.tensors[name], b.tensors[name])
        for name in a.tensors
    )
    return equal and json.loads(json.dumps(a.header)) == json.loads(json.dumps(b.header))


def test_round_trip(frozen: IntegerModel, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.qvit"
    size = frozen.save(path)
    assert size == path.stat().st_size
    loaded = IntegerModel.load(path)
    assert _same(frozen, loaded)
    assert loaded.classes == frozen.classes
    assert loaded.provenance == {"fake_top1": 12.5, "data": "digits"}
    # A loaded model can be saved again, to the same bytes.
    loaded.save(tmp_path / "again.qvit")
    assert (tmp_path / "again.qvit").read_bytes() == path.read_bytes()


def test_header_holds_equal_specs_once(frozen_file: Path) -> None:
    stored = _document(frozen_file)["qvit"]
    assert len(stored["specs"]) == len({json.dumps(spec, sort_keys=True) for spec in stored["specs"]})
    assert len(stored["specs"]) < len(stored["points"])


def _refused(path: Path) -> str:
    with pytest.raises((FileFormatError, InputError)) as caught:
        IntegerModel.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_truncated_anywhere(frozen_file: Path, tmp_path: Path) -> None:
    data = frozen_file.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = {
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        len(data) // 2,
        len(data) - 1,
        *range(10, len(data), len(data) // 40),
    }
    for cut in sorted(cuts):
        path = tmp_path / f"cut{cut}.qvit"
        path.write_bytes(data[:cut])
        _refused(path)


def test_bytes_after_the_end_are_refused(frozen_file: Path) -> None:
    frozen_file.write_bytes(frozen_file.read_bytes() + b"\0")
    _refused(frozen_file)


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_no_flipped_bit_goes_unnoticed(frozen: IntegerModel, tmp_path: Path, place: float, bit: int, in_header: bool) -> None:
    path = tmp_path / "flip.qvit"
    frozen.save(path)
    data = bytearray(path.read_bytes())
    # Half of the flips go into the header, which is the smaller part of a real file and the more delicate one.
    end = 8 + struct.unpack("<Q", bytes(data[:8]))[0] if in_header else len(data)
    data[int(place * end)] ^= 1 << bit
    path.write_bytes(data)
    try:
        loaded = IntegerModel.load(path)
    except (FileFormatError, InputError):
        return
    assert _same(loaded, frozen)


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_any_other_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "noise.qvit"
    path.write_bytes(data)
    _refused(path)


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert "No such file" in _refused(tmp_path / "none.qvit")
    assert "is a folder" in _refused(tmp_path)
    empty = tmp_path / "empty.qvit"
    empty.touch()
    assert "truncated or damaged" in _refused(empty)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable(frozen_file: Path) -> None:
    frozen_file.chmod(0)
    assert "Permission denied" in _refused(frozen_file)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "other.qvit"
    save_file({"head.weight": np.zeros((2, 2), np.float32)}, path)
    assert "is no .qvit file" in _refused(path)
    save_file({"head.weight": np.zeros((2, 2), np.float32)}, path, metadata={"qvit": "[1, 2]"})
    _refused(path)
    save_file({"head.weight": np.zeros((2, 2), np.float32)}, path, metadata={"qvit": "[" * 100_000})
    _refused(path)


@pytest.mark.parametrize("claim", [1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_header_that_claims_to_be_huge(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "huge.qvit"
    path.write_bytes(struct.pack("<Q", claim) + b"{}" * 50)
    _refused(path)


def test_oversized_file_is_not_even_opened(tmp_path: Path) -> None:
    path = tmp_path / "large.qvit"
    with open(path, "wb") as file:
        file.truncate((4 << 30) + 1)
    assert "more than any .qvit file" in _refused(path)


def _document(path: Path) -> dict[str, Any]:
    """The JSON document of a file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return json.loads(header["__metadata__"]["qvit"])


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the JSON document of a file and nothing else; the checksum is left as it is."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"]["qvit"])
    change(document)
    header["__metadata__"]["qvit"] = json.dumps(document)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_rewriting_alone_changes_nothing(frozen: IntegerModel, frozen_file: Path) -> None:
    _rewrite(frozen_file, lambda document: None)
    assert _same(IntegerModel.load(frozen_file), frozen)


def test_newer_format(frozen_file: Path) -> None:
    _rewrite(frozen_file, lambda document: document.update(format=3))
    assert "is of format 3 and this qvit reads up to 2: upgrade" in _refused(frozen_file)


def test_only_a_rounded_residual_stream_takes_the_second_format(
    frozen: IntegerModel, frozen_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "residual" not in frozen.header
    assert _document(frozen_file)["format"] == 1
    IntegerModel.from_tensors({**frozen.header, "residual": "float32"}, frozen.tensors).save(frozen_file)
    assert _document(frozen_file)["format"] == 1
    IntegerModel.from_tensors({**frozen.header, "residual": "float16"}, frozen.tensors).save(frozen_file)
    assert _document(frozen_file)["format"] == 2
    assert IntegerModel.load(frozen_file).residual == "float16"
    monkeypatch.setattr(qvit_file, "FORMAT", 1)  # what a qvit of before says
    assert "is of format 2 and this qvit reads up to 1: upgrade" in _refused(frozen_file)


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_format_that_is_none(frozen_file: Path, version: object) -> None:
    _rewrite(frozen_file, lambda document: document.update(format=version))
    assert "its format is" in _refused(frozen_file)


def test_header_is_covered_by_the_checksum(frozen_file: Path) -> None:
    _rewrite(frozen_file, lambda document: document["qvit"]["classes"].reverse())
    assert "checksum" in _refused(frozen_file)


def test_exchanged_tensors_are_noticed(frozen: IntegerModel, tmp_path: Path) -> None:
    path = tmp_path / "swapped.qvit"
    frozen.save(path)
    data = path.read_bytes()
    # Two tensors of one size change their names.
    first, second = b'"blocks.0.norm1.weight"', b'"blocks.1.norm1.weight"'
    assert data.count(first) == data.count(second) == 1
    path.write_bytes(data.replace(first, b"@@").replace(second, first).replace(b"@@", second))
    assert "checksum" in _refused(path)


def _no_space(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(
    frozen: IntegerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "model.qvit"
    path.write_bytes(b"the old file")
    monkeypatch.setattr(os, step, _no_space)
    with pytest.raises(InputError, match="disk is full"):
        frozen.save(path)
    assert path.read_bytes() == b"the old file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.qvit"]


def test_errors_of_the_format_are_errors_of_qvit() -> None:
    assert issubclass(FileFormatError, QvitError)
    assert qvit_file.FORMAT == 2
