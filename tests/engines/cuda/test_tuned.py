"""Choices that were measured: found by shape, kept in files, and taken by plans."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qvit
from qvit.engines.cuda import CudaEngine, tiles, tuned
from qvit.engines.cuda.tiles import HopperTile, MmaTile, choose_whole_rows
from qvit.engines.cuda.tuned import Choice, Tuned, file_name, tuned_for, write
from qvit.spec import ModelSpec
from tests.engines.cuda.emulator import Emulated

CHOICES = [
    Choice("codes", 50432, 1536, 384, False, MmaTile(128, 128, 64, 4, 2, 2)),
    Choice("codes", 197, 1536, 384, False, HopperTile(2, 64, 4)),
    Choice("rows", 50432, 384, 384, True, None),
    Choice("floats", 50432, 384, 384, True, HopperTile(2, 128, 2, bits=True, piece=32, slots=2)),
    Choice("floats", 50432, 384, 384, True, HopperTile(2, 128, 2, bits=True, piece=64, slots=1), half=True),
]


def test_the_nearest_number_of_rows_counts() -> None:
    known = Tuned(CHOICES)
    assert known.find("codes", 50432, 1536, 384, bits=False, half=False) == CHOICES[0]
    assert known.find("codes", 45000, 1536, 384, bits=False, half=False) == CHOICES[0]
    assert known.find("codes", 160, 1536, 384, bits=False, half=False) == CHOICES[1]
    assert known.find("codes", 4000, 1536, 384, bits=False, half=False) is None
    assert known.find("codes", 50432, 1536, 384, bits=True, half=False) is None
    assert known.find("rows", 50432, 384, 384, bits=True, half=False) == CHOICES[2]
    assert Tuned().find("rows", 1, 1, 1, bits=False, half=False) is None


def test_float16_has_choices_of_its_own() -> None:
    known = Tuned(CHOICES)
    assert [known.find("floats", 50432, 384, 384, True, half) for half in (False, True)] == CHOICES[3:]
    assert known.find("rows", 50432, 384, 384, bits=True, half=True) is None
    assert [choice.to_json()["half"] for choice in known.all()] == [False, False, False, False, True]


def test_a_file_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "FILES", tmp_path)
    assert tuned_for("NVIDIA X1 80GB").all() == []
    assert file_name("NVIDIA X1 80GB") == "nvidia-x1-80gb"
    write(tmp_path / "nvidia-x1-80gb.json", "NVIDIA X1 80GB", CHOICES, {"torch": "2"})
    assert json.loads((tmp_path / "nvidia-x1-80gb.json").read_text())["gpu"] == "NVIDIA X1 80GB"
    assert sorted(map(repr, tuned_for("NVIDIA X1 80GB").all())) == sorted(map(repr, CHOICES))


def test_plans_take_them(
    make_student: Callable[..., Any], small_vit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"embed_dim": 64, "num_heads": 2, "img_size": 24, "patch_size": 8, "depth": 2}
    model = qvit.freeze(make_student(small_vit(**small), spec=ModelSpec.of_bits(2)))
    gpu = Emulated(hopper=True)
    gpu.multiprocessors = 1

    def used(*choices: Choice) -> list[tuple[str, int, int]]:
        gpu.tuned = Tuned(choices)
        launches = CudaEngine(model, gpu, all_tokens=True).launches(700)
        return [(one.kernel, one.defines["BITS"], one.defines["kBN"]) for one in launches if one.kernel == "gemm_hopper"]

    rows = 700 * 10
    plain = used()
    assert any(bits for _, bits, _ in plain)
    without = used(*(Choice("planes", rows, n, k, True, None) for n, k in ((192, 64), (64, 64), (256, 64), (64, 256))))
    assert not any(bits for _, bits, _ in without)
    narrow = used(Choice("planes", rows, 192, 64, True, HopperTile(1, 64, 2, bits=True)))
    assert narrow != plain
    assert len(narrow) == len(plain)
    # A choice comes before the rule for LayerNorm, in both directions.
    whole_rows = choose_whole_rows(rows, 64, 64, 1, bits=True)
    assert whole_rows is not None
    for widest, proj, fused in ((64, None, 1), (64, whole_rows, 3), (0, None, 0), (0, whole_rows, 2)):
        monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", widest)
        gpu.tuned = Tuned([Choice("rows", rows, 64, 64, True, proj)])
        launches = CudaEngine(model, gpu, all_tokens=True).launches(700)
        assert sum(one.defines.get("EPILOGUE") == 3 for one in launches) == fused


@pytest.mark.parametrize("residual", ["float32", "float16"])
def test_plans_take_those_of_their_stream(
    residual: str, make_student: Callable[..., Any], small_vit: Callable[..., Any]
) -> None:
    """Of a ViT with a norm in front of its blocks, whose patch embedding is float32 in any case."""
    small = {
        "embed_dim": 64,
        "num_heads": 2,
        "img_size": 24,
        "patch_size": 8,
        "depth": 2,
        "pre_norm": True,
        "class_token": False,
    }
    small |= {"global_pool": "avg"}
    model = qvit.freeze(make_student(small_vit(**small), spec=ModelSpec.of_bits(2, residual=residual)))
    gpu, half = Emulated(hopper=True), residual == "float16"
    gpu.multiprocessors = 1
    rows = 700 * 9

    def launches(*choices: Choice) -> list[Any]:
        gpu.tuned = Tuned(choices)
        return [(one.kernel, one.grid, one.defines) for one in CudaEngine(model, gpu, all_tokens=True).launches(700)]

    alone = tuple(Choice("rows", rows, 64, k, True, None, half=half) for k in (64, 256))
    floats = HopperTile(1, 64, 2, bits=True, piece=16, slots=1)
    of_patches = HopperTile(1, 64, 3, row_stages=2, piece=16, slots=1)
    for choice, before in (
        (alone[0], ()),
        (Choice("floats", rows, 64, 256, True, floats, half=half), alone),
        (Choice("planes", rows, 192, 64, True, None, half=half), ()),
        (Choice("floats", rows, 64, 192, False, of_patches), ()),
        (
            Choice("codes", rows, 192, 64, False, MmaTile(64, 64, 64, 3, 4, 1)),
            (Choice("planes", rows, 192, 64, True, None, half=half),),
        ),
    ):
        plain = launches(*before)
        assert launches(*before, choice) != plain, choice
        assert launches(*before, replace(choice, half=not choice.half)) == plain, choice


def check_file(path: Path) -> None:
    """A file of a GPU as the package may hold it: read by its name, every tile one that the GPU has room for."""
    content = json.loads(path.read_text())
    assert path.stem == file_name(content["gpu"])
    assert {"command", "torch"} <= content["measured"].keys()
    choices = tuned_for(content["gpu"]).all()
    assert len(choices) == len(content["choices"]) > 0
    for choice in choices:
        assert choice.kind in ("codes", "floats", "rows", "planes")
        assert min(choice.m, choice.n, choice.k) > 0
        assert not (choice.half and choice.kind == "codes")
        if choice.tile is None:
            assert choice.kind in ("rows", "planes")
        else:
            assert choice.tile.shared(choice.k) <= tiles.MOST_SHARED
            assert getattr(choice.tile, "bits", False) == choice.bits
            assert choice.kind != "rows" or choice.tile.direct  # type: ignore[union-attr]


def test_files_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in tuned.FILES.glob("*"):
        assert path.suffix == ".json"
        check_file(path)
    monkeypatch.setattr(tuned, "FILES", tmp_path)
    path = tmp_path / "nvidia-x1-80gb.json"
    write(path, "NVIDIA X1 80GB", CHOICES, {"command": "python benchmarks/tune_gpu.py", "torch": "2"})
    check_file(path)
    too_large = Choice("codes", 50432, 1536, 384, False, HopperTile(3, 128, 16))
    write(path, "NVIDIA X1 80GB", [*CHOICES, too_large], {"command": "python benchmarks/tune_gpu.py", "torch": "2"})
    with pytest.raises(AssertionError):
        check_file(path)
