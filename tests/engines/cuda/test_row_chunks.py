"""Launches over chunks of rows make the same codes and logits as launches over all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, plan_vit, tiles
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.row_chunks import Rows, chunk_rows, row_chunks
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines.cuda.emulator import Emulated, open_gpu
from tests.engines.cuda.test_cuda import SMALL, check

Factory = Callable[..., Any]
COUNT = 66  # images of 5 tokens: 330 rows
PRODUCTS = ("gemm", "gemm_few", "gemm_hopper")


@pytest.mark.parametrize(
    ("size", "rows", "wanted"),
    [
        (0, 330, [330]),
        (128, 330, [128, 128, 74]),
        (128, 319, [128, 191]),  # a rest of less than half a chunk
        (256, 100, [100]),
        (256, 384, [256, 128]),
        (16896, 50432, [16896, 16896, 16640]),  # DeiT, batch 256
        (16896, 197, [197]),
    ],
)
def test_chunks(size: int, rows: int, wanted: list[int]) -> None:
    chunks = row_chunks(rows, size)
    assert [one.count for one in chunks] == wanted
    assert [one.first for one in chunks] == [sum(wanted[:i]) for i in range(len(wanted))]


def test_rows_of_floats_and_codes() -> None:
    floats, codes = torch.arange(512.0).reshape(256, 2), torch.arange(256 * 256, dtype=torch.int32)
    assert torch.equal(Rows(128, 100).floats(floats), floats[128:228])
    assert Rows(64, 100).codes(codes, 2)[0] == 64 * 256


def small(make_student: Factory, small_vit: Factory, bits: int, width: int) -> Any:
    options = {"embed_dim": width, "num_heads": width // 32, "depth": 2, "mlp_ratio": 0.5, "img_size": 16}
    return make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits))


def rows_of(launch: Launch) -> int:
    return launch.values["rows"] if launch.kernel == "norm" else launch.values["m"]


def in_chunks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: size)


def within_blocks(model: IntegerModel, gpu: Any, count: int = COUNT) -> list[tuple[str, int]]:
    """What is launched over rows between one attention and the next: what leaves it, and how many rows."""
    kinds = {0: "floats", 1: "activation", 2: "heads", 3: "floats and codes"}
    launches = CudaEngine(model, gpu, all_tokens=True).launches(count)
    (first, second) = (i for i, one in enumerate(launches) if one.kernel == "attention")
    return [(kinds.get(one.defines.get("EPILOGUE", -1), one.kernel), rows_of(one)) for one in launches[first + 1 : second]]


@pytest.mark.parametrize(
    ("bits", "width", "size", "count", "fused"),
    [
        (4, 128, 128, COUNT, False),
        (2, 64, 128, COUNT, False),  # planes of bits, though chunks have too few tiles for them, and for LayerNorm behind
        (2, 128, 256, 80, True),  # LayerNorm behind the products of a chunk
    ],
)
def test_same_codes_and_logits(
    bits: int,
    width: int,
    size: int,
    count: int,
    fused: bool,
    make_student: Factory,
    small_vit: Factory,
    perturb: Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks_of(size, monkeypatch)
    gpu = open_gpu(hopper=True)
    model = qvit.freeze(perturb(small(make_student, small_vit, bits, width)))
    launches = [one for one in CudaEngine(model, gpu, all_tokens=True).launches(count) if one.kernel in PRODUCTS]
    parts = [one.defines for one in launches if rows_of(one) == size]
    assert parts
    if gpu.device.type == "cpu":
        assert any(one["EPILOGUE"] == 3 for one in parts) == fused
        assert any(one.get("BITS") for one in parts) == (bits == 2)
    check(model, gpu, count)


def test_launches_take_turns(
    make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 0)
    gpu = Emulated(hopper=True)
    model = qvit.freeze(perturb(small(make_student, small_vit, 4, 128)))
    names = ["floats", "norm", "activation", "floats", "norm"]
    whole = [*((name, 330) for name in names), ("heads", 330)]
    in_chunks_of(0, monkeypatch)
    assert within_blocks(model, gpu) == whole
    last = CudaEngine(model, gpu, all_tokens=True).launches(COUNT)[-1]
    assert last.defines["NORM"] == 1
    in_chunks_of(128, monkeypatch)
    assert within_blocks(model, gpu) == [*((name, rows) for rows in (128, 128, 74) for name in names), whole[-1]]
    in_chunks = CudaEngine(model, gpu, all_tokens=True).launches(COUNT)[-1]
    assert in_chunks.code == last.code  # with the norm in front, as without chunks
    in_chunks_of(512, monkeypatch)  # one chunk
    assert within_blocks(model, gpu) == whole


def test_where_chunks_pay(make_student: Factory, small_vit: Factory) -> None:
    assert chunk_rows(384, False, False, True, 132) == 16896
    assert chunk_rows(768, False, False, True, 132) == 8448
    assert chunk_rows(384, True, False, True, 132) == 0
    assert chunk_rows(384, False, True, True, 132) == 0
    assert chunk_rows(384, False, False, False, 132) == 0
    model = qvit.freeze(small(make_student, small_vit, 4, 128))
    rows = {rows for name, rows in within_blocks(model, Emulated(hopper=True), 100) if name != "heads"}
    assert rows == {256, 244}, "a tile of 128 rows for each of two multiprocessors"
