"""Which launch computes a layer, with what in front and behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import plan_vit
from qvit.engines.cuda import products as p
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.layout import chunks
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.engines.cuda.plan_vit import VitPlan
from qvit.engines.cuda.products import Products
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.tiles import HopperTile
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


# Chunks of 640 rows are too far from 3,200 for what was measured of one to count for the other.
IMAGES, CHUNK = 640, 640
ROWS = IMAGES * TOKENS
ALONE = tuple(Choice("rows", ROWS, WIDTH, k, False, None) for k in (WIDTH, HIDDEN))  # LayerNorm has a launch of its own


@pytest.mark.parametrize("stays", [True, False])
def test_rows_of_fc1_are_held_where_they_stay(
    stays: bool, freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measured tile whose rows stream has no rows to hold: its kernel would not compile."""
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 0)
    choice = Choice("codes", ROWS, HIDDEN, WIDTH, False, HopperTile(1, 128, 2, keeps_rows=stays))
    model = freeze()
    plan = VitPlan(model, ModelConstants.of(model, CPU), IMAGES, Known(choices=(choice,)), all_tokens=True)  # type: ignore[arg-type]
    made = [one.defines for one in launches(plan) if kind_of(one) == "activation"]
    assert made
    assert {(one["RESIDENT"], one["HELD"]) for one in made} == {(int(stays), int(stays))}


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


def test_names_of_activations_are_the_kernels_numbers() -> None:
    source = (p.__file__ or "").replace("products.py", "src/rounding.cuh")
    with open(source) as file:
        assert "enum Activation { kGelu = 0, kGeluTanh = 1, kQuickGelu = 2 };" in file.read()
    assert p._ACTIVATIONS == ("gelu", "gelu_tanh", "quick_gelu")
