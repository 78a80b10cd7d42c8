"""A residual stream of float16 in every kernel that reads or writes it: every code and logit is the reference engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import qvit
from qvit.engines.cuda import CudaEngine, tiles
from qvit.engines.cuda.tiles import HopperTile
from qvit.engines.cuda.tuned import Choice, Tuned
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines import cases
from tests.engines.cuda.emulator import open_gpu
from tests.engines.cuda.test_cuda import SMALL, check

Factory = Callable[..., Any]


@pytest.fixture
def hopper() -> Any:
    """With Hopper's own products, and so few multiprocessors that blocks have several tiles."""
    gpu = open_gpu(hopper=True)
    gpu.multiprocessors = 2
    return gpu


@pytest.fixture
def model_of(make_student: Factory, small_vit: Factory, perturb: Factory) -> Callable[..., IntegerModel]:
    """``model_of(bits, name=.., **options)``: a frozen ViT whose residual stream is float16."""

    def make(bits: int, name: str = "vit_tiny_patch16_224", **options: Any) -> IntegerModel:
        spec = ModelSpec.of_bits(bits, residual="float16")
        return qvit.freeze(perturb(make_student(small_vit(name, **SMALL | options), spec=spec)))

    return make


def defines_of(model: IntegerModel, gpu: Any, count: int) -> list[dict[str, Any]]:
    return [{"kernel": one.kernel, **one.defines} for one in CudaEngine(model, gpu, all_tokens=True).launches(count)]


@pytest.mark.parametrize(
    ("width", "bits", "own"),
    [(64, 3, False), (64, 3, True), (192, 4, True), (384, 2, True)],
    ids=["every GPU's", "Hopper's, 64", "Hopper's, 192", "Hopper's, planes of bits"],
)
def test_blocks(width: int, bits: int, own: bool, model_of: Callable[..., IntegerModel]) -> None:
    """Sums through shared memory and straight from registers, the position in float32, LayerNorm behind and alone."""
    either = open_gpu(hopper=own)
    either.multiprocessors = 2
    model = model_of(bits, embed_dim=width, num_heads=width // 32, depth=1, mlp_ratio=0.5, img_size=16)
    launches = defines_of(model, either, 27)
    assert all(one["OUT_HALF"] for one in launches if one.get("EPILOGUE") in (0, 3) and one["RESIDUAL"])
    assert any(one["OUT_HALF"] and one["POSITION"] for one in launches if one.get("EPILOGUE") == 0)
    check(model, either, 27, images_too=False)


@pytest.mark.parametrize("bits", [2, 8])
def test_few_rows(bits: int, model_of: Callable[..., IntegerModel]) -> None:
    """LayerNorm of half rows in front of a product, and sums of four halves a thread."""
    gpu = open_gpu(hopper=False)
    model = model_of(bits)
    assert any(one.get("NORM") and one["X_HALF"] for one in defines_of(model, gpu, 1))
    check(model, gpu, 1)


@pytest.mark.parametrize("name", ["average without fc_norm", "LayerScale", "norm before the blocks"])
def test_architectures(name: str, hopper: Any, model_of: Callable[..., IntegerModel]) -> None:
    timm_name, options = cases.ARCHITECTURES[name]
    shape = SMALL | {"depth": 1, "img_size": 16} | options
    shape["embed_dim"] = 32 * shape["num_heads"]
    check(model_of(4, timm_name, **shape), hopper, 27, images_too=False)


@pytest.mark.parametrize("width", [128, 640])
def test_planes_of_a_norm_alone(
    width: int, hopper: Any, model_of: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two-bit codes of one and of five times 128 channels."""
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 0)
    hopper.multiprocessors = 1
    model = model_of(2, embed_dim=width, num_heads=width // 32, depth=1, mlp_ratio=0.2, img_size=16)
    norms = [one for one in defines_of(model, hopper, 9) if one["kernel"] == "norm" and one["OUT_BITS"]]
    assert {one["CHANNELS"] for one in norms} == {width}
    check(model, hopper, 9, images_too=False)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_tile_of_columns_that_is_not_full(bits: int, hopper: Any, model_of: Callable[..., IntegerModel]) -> None:
    """Of 128 columns 32 are there, of which a piece of 64 has half; with LayerScale, and the position in float32."""
    shape = {"embed_dim": 160, "num_heads": 5, "depth": 1, "mlp_ratio": 0.8, "img_size": 16, "init_values": 0.5}
    model = model_of(bits, **shape)
    floats = [one for one in defines_of(model, hopper, 27) if one.get("OUT_HALF") and one.get("STAGED")]
    assert {(one["LDO"], one["kBN"], one["kPiece"]) for one in floats} == {(160, 128, 64)}
    assert {(one["GAMMA"], one["POSITION"]) for one in floats} == {(1, 0), (0, 1)}
    check(model, hopper, 27, images_too=False)


@pytest.mark.parametrize("of", ["wide", "long", "longest"])
def test_tiles_of_wide_and_of_long_rows(
    of: str, hopper: Any, model_of: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rules keep for DeiT-B, and for DeiT-S's fc2 at two bits, of a model small enough for emulation."""
    monkeypatch.setattr(tiles, "_LEAST_WIDE", 256)
    monkeypatch.setattr(tiles, "_LEAST_LONG", 256)
    if of == "longest":
        monkeypatch.setattr(tiles, "_LONG_HALVES_OF_BITS", ())
        monkeypatch.setattr(tiles, "_HALVES_OF_BITS", tiles._FLOATS_OF_BITS[-1:])
    bits, cut = (4, (2, 128, 5, 0, 0)) if of == "wide" else (2, (3, 64, 4, 1, 1) if of == "long" else (2, 64, 2, 1, 0))
    model = model_of(bits, embed_dim=256, num_heads=8, depth=1, mlp_ratio=2, img_size=16)
    floats = [one for one in defines_of(model, hopper, 27) if one.get("STAGED") and one["RESIDUAL"]]
    assert {tuple(one[name] for name in ("kGroups", "kBN", "kStages", "HELD", "TWICE")) for one in floats} == {cut}
    assert len(floats) == 2
    assert bits == 2 or {one["A_NIBBLES"] for one in floats} == {0, 1}
    check(model, hopper, 27, images_too=False)


@pytest.mark.parametrize(("piece", "slots"), [(16, 2), (64, 1), (128, 1)])
def test_slots_of_every_length(piece: int, slots: int, hopper: Any, model_of: Callable[..., IntegerModel]) -> None:
    """Units of a row are permuted by the row in another way for each length."""
    tile = HopperTile(2, 128, 4, row_stages=4, piece=piece, slots=slots, overlaps=True)
    product = 135, 384, 384, False
    hopper.tuned = Tuned((Choice("rows", *product, None, half=True), Choice("floats", *product, tile, half=True)))
    model = model_of(4, embed_dim=384, num_heads=6, depth=1, mlp_ratio=1, img_size=16)
    assert piece in {one.get("kPiece") for one in defines_of(model, hopper, 27)}
    check(model, hopper, 27, images_too=False)
