"""Measured tiles go by the rows of the whole pass and come before rules, which go by those of a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import plan_vit
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.few_tiles import FewTile
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.engines.cuda.plan_vit import VitPlan
from qvit.engines.cuda.tiles import HopperTile, MmaTile, choose, choose_floats, choose_whole_rows
from qvit.engines.cuda.tuned import Choice
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines.cuda.test_products import (
    ALONE,
    CHUNK,
    HIDDEN,
    IMAGES,
    ROWS,
    SMALL,
    TOKENS,
    WIDTH,
    arrays,
    kind_of,
    launches,
    products_of,
)
from tests.engines.cuda.test_steps import CPU, Known


@pytest.fixture
def freeze(make_student: Callable[..., Any], small_vit: Callable[..., Any]) -> Callable[..., IntegerModel]:
    return lambda bits=4, **options: qvit.freeze(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits)))


def cut_of(launch: Launch) -> dict[str, int]:
    names = ("kBM", "kBN", "kBK", "kStages", "kGroups")
    return {name: launch.defines[name] for name in names if name in launch.defines}


def is_cut(launch: Launch, tile: Any, k: int) -> bool:
    """Whether its tile is this one."""
    assert launch.kernel == tile.kernel
    wanted = tile.defines(k)
    return cut_of(launch) == {name: wanted[name] for name in cut_of(launch)}


MEASURED = {
    "proj": Choice("floats", ROWS, WIDTH, WIDTH, False, HopperTile(1, 64, 2, row_stages=2, piece=32, slots=2, overlaps=True)),
    "fc1": Choice("codes", ROWS, HIDDEN, WIDTH, False, HopperTile(1, 128, 2)),
    "fc2": Choice("floats", ROWS, WIDTH, HIDDEN, False, HopperTile(1, 64, 3, row_stages=2, piece=32, slots=2, overlaps=True)),
    "qkv": Choice("codes", ROWS, 3 * WIDTH, WIDTH, False, MmaTile(64, 64, 64, 3, 4, 1)),
}


@pytest.mark.parametrize("size", [0, CHUNK])
def test_measured_tiles_are_those_of_the_whole_pass(
    size: int, freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows at once, or chunks of a fifth of them."""
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: size)
    model = freeze()
    plan = VitPlan(model, ModelConstants.of(model, CPU), IMAGES, Known(choices=(*MEASURED.values(), *ALONE)), all_tokens=True)  # type: ignore[arg-type]
    found = {(one.values["n"], one.values["k"], kind_of(one)): one for one in launches(plan) if "n" in one.values}
    rows = {one.values["m"] for one in launches(plan) if one.values.get("residual") is not None}
    assert rows == {size or ROWS}
    for name, n, k, kind in (
        ("proj", WIDTH, WIDTH, "floats"),
        ("fc1", HIDDEN, WIDTH, "activation"),
        ("fc2", WIDTH, HIDDEN, "floats"),
        ("qkv", 3 * WIDTH, WIDTH, "heads"),
    ):
        tile = MEASURED[name].tile
        assert is_cut(found[n, k, kind], tile, k), name


def test_what_was_measured_of_as_many_rows_as_a_chunk_has_does_not_count(
    freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: CHUNK)
    model = freeze()

    def cuts(*choices: Choice) -> list[dict[str, int]]:
        plan = VitPlan(model, ModelConstants.of(model, CPU), IMAGES, Known(choices=choices), all_tokens=True)  # type: ignore[arg-type]
        return [cut_of(one) for one in launches(plan)]

    of_chunk = [Choice(one.kind, CHUNK, one.n, one.k, False, one.tile) for one in (*MEASURED.values(), *ALONE)]
    assert cuts(*of_chunk) == cuts()
    assert cuts(*MEASURED.values(), *ALONE) != cuts()


def test_whole_rows_where_they_were_measured(freeze: Callable[..., IntegerModel]) -> None:
    """LayerNorm behind a product by all rows of the pass, for a chunk too; by the rule where nothing was measured."""
    model, whole = freeze(), choose_whole_rows(ROWS, WIDTH, WIDTH, 4, bits=False)
    assert whole is not None
    narrow = HopperTile(1, WIDTH, 1, row_stages=2, direct=True, keeps_rows=False)
    for rows, choice, tile in ((ROWS, None, None), (ROWS, narrow, narrow), (CHUNK, narrow, None)):
        products, block = products_of(model, IMAGES, Known(choices=(Choice("rows", rows, WIDTH, WIDTH, False, choice),)))
        wanted = tile if rows == ROWS else whole
        assert products._norm_behind(block["proj"], CHUNK) == wanted
    products, block = products_of(model, IMAGES, Known(hopper=False))
    assert products._norm_behind(block["proj"], ROWS) is None


def test_tiles_by_rule(freeze: Callable[..., IntegerModel]) -> None:
    """Few rows take many small blocks, many take the largest tiles that leave no multiprocessor idle."""
    model = freeze()
    for images, hopper, tile in (
        (IMAGES, True, choose_floats(ROWS, WIDTH, HIDDEN, 4, bits=False)),
        (IMAGES, False, choose(ROWS, WIDTH, HIDDEN, 4, hopper=False)),
    ):
        products, block = products_of(model, images, Known(hopper=hopper))
        _, x, _ = arrays(products, ROWS)
        products._linear(block["fc2"], products._codes(ROWS, HIDDEN), x, ROWS, residual=x)
        (launch,) = launches(products)
        assert tile is not None
        assert is_cut(launch, tile, HIDDEN)
        assert launch.threads == tile.threads()
        assert launch.grid == (tile.blocks(ROWS, WIDTH, 4), 1, 1)
    products, block = products_of(model, 1, Known(multiprocessors=132))
    few = products._few(block["fc2"], products._codes(TOKENS, HIDDEN), TOKENS, 8)
    assert isinstance(few, FewTile)
    assert not few.normed


def test_floats_of_both_types_have_tiles_of_their_own(freeze: Callable[..., IntegerModel]) -> None:
    """By the type of what is written where that is a product's own, by that of the residual stream where a norm follows."""
    narrow = HopperTile(1, 64, 2, row_stages=2, piece=16, slots=1)
    known = Known(
        choices=(
            Choice("floats", ROWS, WIDTH, HIDDEN, False, narrow, half=True),
            Choice("rows", ROWS, WIDTH, HIDDEN, False, None, half=True),
        )
    )
    products, block = products_of(freeze(), IMAGES, known)
    fc2 = block["fc2"]
    for half in (False, True):
        rule = choose_floats(ROWS, WIDTH, HIDDEN, 4, bits=False, half=half)
        assert rule not in (None, narrow)
        assert products._of_floats(fc2, ROWS, ROWS, bits=False, half=half) == (narrow if half else rule)
        assert products._of_floats(fc2, ROWS, 2 * ROWS, bits=False, half=half) == rule
        products._stream = torch.float16 if half else torch.float32
        assert (products._norm_behind(fc2, ROWS) is None) == half


def test_few_rows_make_the_norm_that_was_put_off(freeze: Callable[..., IntegerModel]) -> None:
    products, block = products_of(freeze(), 1, Known(multiprocessors=132))
    _, x, codes = arrays(products, TOKENS)
    products._norm(block["norm2"], x, codes, TOKENS, WIDTH, block["fc1"])
    for a, normed in ((codes, True), (products._codes(TOKENS, WIDTH), False)):
        few = products._few(block["fc1"], a, TOKENS, 16)
        assert few is not None
        assert few.normed == normed
        assert products._tile(block["fc1"], a, 16, 0, TOKENS) == (few, False)
