"""Which launch computes a layer, with what in front and behind; measured tiles go by the rows of the whole pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import plan_vit
from qvit.engines.cuda import products as p
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.few_tiles import FewTile
from qvit.engines.cuda.layout import chunks
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.engines.cuda.plan_vit import VitPlan
from qvit.engines.cuda.products import Products
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.tiles import HopperTile, MmaTile, choose, choose_floats, choose_whole_rows
from qvit.engines.cuda.tuned import Choice
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines import cases
from tests.engines.cuda.test_steps import CPU, Known

SMALL = cases.SMALL | {"embed_dim": 128, "num_heads": 4, "img_size": 16, "patch_size": 8, "depth": 2, "mlp_ratio": 2.0}
TOKENS, WIDTH, HIDDEN = 5, 128, 256
EPILOGUES = {0: "floats", 1: "activation", 2: "heads", 3: "floats and codes"}


@pytest.fixture
def freeze(make_student: Callable[..., Any], small_vit: Callable[..., Any]) -> Callable[..., IntegerModel]:
    return lambda bits=4, **options: qvit.freeze(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits)))


def products_of(model: IntegerModel, images: int, gpu: Any, late: bool = True) -> tuple[Products, dict[str, Any]]:
    """For blocks of so many images; and the constants of the first block."""
    products = Products(gpu, CPU, one_bit=True, poison=True, activation="gelu", may_be_late=late)
    products._shape = Shape(images, TOKENS, WIDTH, 4, HIDDEN)
    return products, ModelConstants.of(model, CPU).blocks[0]


def launches(products: Products) -> list[Launch]:
    return [step.launch for step in products.steps]


def kind_of(launch: Launch) -> str:
    return EPILOGUES.get(launch.defines.get("EPILOGUE", -1), launch.kernel)


def cut_of(launch: Launch) -> dict[str, int]:
    names = ("kBM", "kBN", "kBK", "kStages", "kGroups")
    return {name: launch.defines[name] for name in names if name in launch.defines}


def is_cut(launch: Launch, tile: Any, k: int) -> bool:
    """Whether its tile is this one."""
    assert launch.kernel == tile.kernel
    wanted = tile.defines(k)
    return cut_of(launch) == {name: wanted[name] for name in cut_of(launch)}


# Chunks of 640 rows are too far from 3,200 for what was measured of one to count for the other.
IMAGES, CHUNK = 640, 640
ROWS = IMAGES * TOKENS
MEASURED = {
    "proj": Choice("floats", ROWS, WIDTH, WIDTH, False, HopperTile(1, 64, 2, row_stages=2, piece=32, slots=2, overlaps=True)),
    "fc1": Choice("codes", ROWS, HIDDEN, WIDTH, False, HopperTile(1, 128, 2)),
    "fc2": Choice("floats", ROWS, WIDTH, HIDDEN, False, HopperTile(1, 64, 3, row_stages=2, piece=32, slots=2, overlaps=True)),
    "qkv": Choice("codes", ROWS, 3 * WIDTH, WIDTH, False, MmaTile(64, 64, 64, 3, 4, 1)),
}
ALONE = tuple(Choice("rows", ROWS, WIDTH, k, False, None) for k in (WIDTH, HIDDEN))  # LayerNorm has a launch of its own


@pytest.mark.parametrize("size", [0, CHUNK])
def test_measured_tiles_are_those_of_the_whole_pass(
    size: int, freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows at once, or chunks of a fifth of them."""
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: size)
    model = freeze()
    plan = VitPlan(model, ModelConstants.of(model, CPU), IMAGES, Known(choices=(*MEASURED.values(), *ALONE)))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("stays", [True, False])
def test_rows_of_fc1_are_held_where_they_stay(
    stays: bool, freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measured tile whose rows stream has no rows to hold: its kernel would not compile."""
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 0)
    choice = Choice("codes", ROWS, HIDDEN, WIDTH, False, HopperTile(1, 128, 2, keeps_rows=stays))
    model = freeze()
    plan = VitPlan(model, ModelConstants.of(model, CPU), IMAGES, Known(choices=(choice,)))  # type: ignore[arg-type]
    made = [one.defines for one in launches(plan) if kind_of(one) == "activation"]
    assert made
    assert {(one["RESIDENT"], one["HELD"]) for one in made} == {(int(stays), int(stays))}


def test_what_was_measured_of_as_many_rows_as_a_chunk_has_does_not_count(
    freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: CHUNK)
    model = freeze()

    def cuts(*choices: Choice) -> list[dict[str, int]]:
        plan = VitPlan(model, ModelConstants.of(model, CPU), IMAGES, Known(choices=choices))  # type: ignore[arg-type]
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


def arrays(products: Products, rows: int) -> tuple[torch.Tensor, ...]:
    """Codes that come in, floats, and codes that go out."""
    return products._codes(rows, WIDTH), products._floats(rows, WIDTH), products._codes(rows, WIDTH)


@pytest.mark.parametrize("behind", [False, True])
def test_floats_and_the_norm_behind_them(behind: bool, freeze: Callable[..., IntegerModel]) -> None:
    """One launch or two; of as many rows as are given, added to what is given."""
    choice = () if behind else ALONE
    products, block = products_of(freeze(), IMAGES, Known(choices=choice), late=False)
    a, x, codes = arrays(products, ROWS)
    following = block["norm2"], block["fc1"]
    products._linear_norm(block["proj"], a, x[:CHUNK], x[:CHUNK], None, following, codes, rows=CHUNK)
    made = launches(products)
    assert [kind_of(one) for one in made] == (["floats and codes"] if behind else ["floats", "norm"])
    product, last = made[0], made[-1]
    assert product.values["m"] == CHUNK
    assert product.values["residual"].data_ptr() == product.values["out"].data_ptr() == x.data_ptr()
    assert product.values["ldo"] == product.defines["LDO"] == WIDTH
    direct = bool(product.defines["DIRECT"])
    assert direct == behind
    assert product.values["b"] is (block["proj"].b_by_fours if direct else block["proj"].b)
    assert last.values["out_k" if behind else "out"].data_ptr() == codes.data_ptr()
    assert last.values["chunks" if behind else "ldo"] == chunks(WIDTH)
    norm = block["norm2"]
    assert last.values["margin"] == (norm.margin if behind else norm.place_margins[0])
    if not behind:
        assert last.values["rows"] == CHUNK
        assert last.grid == (CHUNK // 4, 1, 1)


def test_a_norm_of_few_rows_is_put_off_until_its_codes_are_read(freeze: Callable[..., IntegerModel]) -> None:
    model, gpu = freeze(), Known(multiprocessors=132)
    for late in (True, False):
        products, block = products_of(model, 1, gpu, late)
        _, x, codes = arrays(products, TOKENS)
        products._norm(block["norm2"], x, codes, TOKENS, WIDTH, block["fc1"])
        assert len(products.steps) == int(not late)
        out = products._codes(TOKENS, HIDDEN)
        products._activation(block, codes, out)
        *norms, product = launches(products)
        assert [one.kernel for one in norms] == ([] if late else ["norm"])
        assert (product.kernel, product.defines["NORM"]) == ("gemm_few", int(late))
        assert ("norm" in product.values) == late
        if late:
            norm = product.values["norm"]
            assert norm["x"].data_ptr() == x.data_ptr()
            assert norm["gain"] is block["norm2"].place_gain
            assert (norm["margin"], norm["slope"]) == block["norm2"].place_margins
            assert product.defines["WIDE"] == 0
        assert not products._late


def test_a_norm_that_was_put_off_comes_before_a_product_that_does_not_make_it(freeze: Callable[..., IntegerModel]) -> None:
    products, block = products_of(freeze(), IMAGES, Known())
    _, x, codes = arrays(products, ROWS)
    products._norm(block["norm1"], x, codes, ROWS, WIDTH, block["qkv"])
    assert not products.steps
    q_k_v = tuple(products._bytes(IMAGES, 4, TOKENS, 32) for _ in range(3))
    products._heads(block, codes, q_k_v, "blocks.0")
    assert [kind_of(one) for one in launches(products)] == ["norm", "heads"]
    assert set(products.steps[-1].taps) == {"blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v"}


def test_norms_of_eight_bits_keep_fewer_places(freeze: Callable[..., IntegerModel]) -> None:
    products, block = products_of(freeze(bits=8), 1, Known(multiprocessors=132))
    _, x, codes = arrays(products, TOKENS)
    products._norm(block["norm1"], x, codes, TOKENS, WIDTH, block["qkv"])
    products._heads(block, codes, tuple(products._bytes(1, 4, TOKENS, 32) for _ in range(3)), "blocks.0")
    (launch,) = launches(products)
    assert (launch.defines["NORM"], launch.defines["WIDE"]) == (1, 1)


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


def test_names_of_activations_are_the_kernels_numbers() -> None:
    source = (p.__file__ or "").replace("products.py", "src/rounding.cuh")
    with open(source) as file:
        assert "enum Activation { kGelu = 0, kGeluTanh = 1, kQuickGelu = 2 };" in file.read()
    assert p._ACTIVATIONS == ("gelu", "gelu_tanh", "quick_gelu")
