"""Codes that lie two a byte between fc1 and fc2: every code and logit is the reference engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import qvit
from qvit.engines.cuda import CudaEngine, plan_vit, tiles
from qvit.engines.cuda.tiles import HopperTile, MmaTile
from qvit.engines.cuda.tuned import Choice, Tuned
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines.cuda.emulator import open_gpu
from tests.engines.cuda.test_cuda import SMALL, check

Factory = Callable[..., Any]
Defines = dict[str, int]


@pytest.fixture(autouse=True)
def _packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 0)
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 0)


@pytest.fixture
def gpu() -> Any:
    """With so few multiprocessors that blocks have several tiles."""
    gpu = open_gpu(hopper=True)
    gpu.multiprocessors = 2
    return gpu


@pytest.fixture
def small(make_student: Factory, small_vit: Factory, perturb: Factory) -> Callable[..., IntegerModel]:
    """``small(width, spec, hidden, **options)``: of images of 5 tokens."""

    def make(width: int, spec: int | ModelSpec, hidden: int, **options: Any) -> IntegerModel:
        shape = {"embed_dim": width, "num_heads": width // 32, "depth": 1, "mlp_ratio": hidden / width, "img_size": 16}
        spec = ModelSpec.of_bits(spec) if isinstance(spec, int) else spec
        return qvit.freeze(perturb(make_student(small_vit(**SMALL | shape | options), spec=spec)))

    return make


def between(model: IntegerModel, gpu: Any, count: int) -> tuple[list[Defines], list[Defines]]:
    """Constants of the launches that write codes two a byte, and of those that read them."""
    all_of = [dict(one.defines) for one in CudaEngine(model, gpu, all_tokens=True).launches(count)]
    return [one for one in all_of if one.get("OUT_NIBBLES")], [one for one in all_of if one.get("A_NIBBLES")]


def check_packed(model: IntegerModel, gpu: Any, count: int, launches: int = 1) -> list[Defines]:
    """With so many launches that read such codes."""
    writes, reads = between(model, gpu, count)
    assert len(writes) == len(reads) == launches
    check(model, gpu, count, images_too=False)
    return reads


def test_rows_stream(gpu: Any, small: Callable[..., IntegerModel]) -> None:
    """A block with two row blocks, of which the second has seven rows; more of k than there are buffers."""
    gpu.multiprocessors = 1
    (fc2,) = check_packed(small(192, 4, 1024), gpu, 27)
    assert (fc2["kBN"], fc2["RESIDENT"], fc2["OVERLAP"], fc2["kRowStages"]) == (192, 0, 1, 3)


def test_rows_stay(gpu: Any, small: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """For two tiles of columns, of which the second is not full; without overlap."""
    monkeypatch.setattr(tiles, "_FLOATS", tuple(replace(one, overlaps=False) for one in tiles._FLOATS[2:]))
    (fc2,) = check_packed(small(160, 3, 512), gpu, 28)
    assert (fc2["kBN"], fc2["RESIDENT"], fc2["OVERLAP"]) == (128, 1, 0)


def test_rows_stay_for_wide_tiles(gpu: Any, small: Callable[..., IntegerModel]) -> None:
    """As a file of measured tiles may say: several tiles of 256 k, row blocks that follow each other, two tiles of columns.

    Those of proj, which are bytes, stay too.
    """
    staying = replace(tiles._FLOATS[0], stages=3, slots=2, keeps_rows=True)
    gpu.tuned = Tuned(Choice("floats", 5 * 27, 384, k, False, staying) for k in (384, 768))
    gpu.multiprocessors = 1
    model = small(384, 4, 768)
    (fc2,) = check_packed(model, gpu, 27)
    assert (fc2["kBN"], fc2["RESIDENT"], fc2["kStages"], fc2["kSlots"]) == (192, 1, 3, 2)
    (proj,) = (
        one
        for one in CudaEngine(model, gpu, all_tokens=True).launches(27)
        if one.defines.get("DEPTH") == 384 and one.values["n"] == 384
    )
    assert (proj.defines["kStages"], proj.defines["RESIDENT"], proj.defines["A_NIBBLES"]) == (3, 1, 0)


@pytest.mark.parametrize(
    "tuned", [("codes", 768, 384, MmaTile(64, 64, 64, 4, 4, 1)), ("floats", 384, 768, HopperTile(2, 384, 4, direct=True))]
)
def test_measured_tiles_that_do_not_know_how(
    tuned: tuple[str, int, int, Any], gpu: Any, small: Callable[..., IntegerModel]
) -> None:
    """Of fc1 or of fc2: codes are bytes."""
    kind, n, k, tile = tuned
    model = small(384, 4, 768)
    assert [len(one) for one in between(model, gpu, 27)] == [1, 1]
    gpu.tuned = Tuned([Choice(kind, 5 * 27, n, k, False, tile)])
    assert between(model, gpu, 27) == ([], [])


def test_tables_are_cut_narrow(gpu: Any, small: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 columns of fc1, of which a lane has 8 bytes."""
    monkeypatch.setattr(tiles, "_HOPPER", tiles._HOPPER[-1:])
    gpu.multiprocessors = 1
    model = small(96, 4, 256)
    writes, _ = between(model, gpu, 27)
    assert writes[0]["kBN"] == 64
    check_packed(model, gpu, 27)


@pytest.mark.parametrize("bits", [3, 4])
def test_norm_behind(bits: int, gpu: Any, small: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of weights that stay, with tiles of their own for each warpgroup."""
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 192)
    first, last = check_packed(small(128, bits, 512, depth=2), gpu, 53, launches=2)
    assert (first["EPILOGUE"], first["DIRECT"], first["B_STAYS"], last["EPILOGUE"]) == (3, 1, 1, 0)


def test_chunks_of_rows(gpu: Any, small: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """330 rows in three chunks; codes of fc2's input lie where those of the chunk before did."""
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 128)
    gpu.multiprocessors = 1
    check_packed(small(128, 4, 256), gpu, 66, launches=3)


@pytest.mark.parametrize(
    ("multiprocessors", "depth", "count", "reads"),
    [
        (2, 2, 27, [0]),  # 27 rows in place of 135
        (1, 1, 66, [1]),  # to rows that do not follow each other
    ],
    ids=["bytes in the last block alone", "packed"],
)
def test_the_last_block(
    multiprocessors: int, depth: int, count: int, reads: list[int], gpu: Any, small: Callable[..., IntegerModel]
) -> None:
    """Whether few rows know how is asked for the tokens that heads read."""
    gpu.multiprocessors = multiprocessors
    model = small(128, 4, 256, depth=depth)
    launches = CudaEngine(model, gpu).launches(count)
    (*blocks, last) = (one for one in launches if "n" in one.values and (one.values["n"], one.values["k"]) == (128, 256))
    assert [one.defines["A_NIBBLES"] for one in blocks] == [1] * (depth - 1)
    assert [last.defines["A_NIBBLES"]] == reads
    assert (last.values["m"], last.defines["SCATTER"]) == (count, 1)
    check(model, gpu, count, images_too=False)


@pytest.mark.parametrize(
    ("spec", "hidden", "count"),
    [
        (8, 256, 27),  # no room in half a byte
        (2, 256, 27),  # planes of bits
        (4, 320, 27),  # not whole tiles
        (4, 256, 1),  # few rows
    ],
)
def test_what_stays_as_it_was(spec: int, hidden: int, count: int, gpu: Any, small: Callable[..., IntegerModel]) -> None:
    model = small(64, spec, hidden)
    assert between(model, gpu, count) == ([], [])
    if hidden == 320:
        check(model, gpu, count, images_too=False)
