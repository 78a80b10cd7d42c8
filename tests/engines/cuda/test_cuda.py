"""The CUDA engine against the reference engine, code by code: on a GPU where there is one, else in emulation on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, attention_blocks, constants, few_tiles, plan_vit, step_tables, tiles
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.folded import margins
from qvit.engines.cuda.layout import pad
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError, SlowerWarning, UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines import cases
from tests.engines.cuda.emulator import Emulated, open_gpu

Factory = Callable[..., Any]
# Heads that the kernels know, in models small enough for emulation.
SMALL = cases.SMALL | {"embed_dim": 64, "num_heads": 2, "img_size": 24, "patch_size": 8}
CPU = constants.Constants(torch.device("cpu"))
UNKNOWN = ("per token", "q, k offset", "q offset per channel", "map per row", "q unsigned half step")


@pytest.fixture(scope="session")
def gpu() -> Any:
    """With the kernels that every GPU runs."""
    return open_gpu(hopper=False)


@pytest.fixture(scope="session", params=["every GPU's", "Hopper's"])
def either(request: pytest.FixtureRequest) -> Any:
    """With these, and with Hopper's own products."""
    return open_gpu(hopper=request.param == "Hopper's")


def pixels_for(model: IntegerModel, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, *model.preprocessing.input_size), dtype=torch.uint8)


def check(model: IntegerModel, gpu: Any, count: int = 3, images_too: bool = True) -> None:
    """Every code and every logit is the reference engine's; also of float images, where they are wanted."""
    pixels = pixels_for(model, count)
    images = torch.from_numpy(model.preprocessing.normalise(pixels.numpy()))
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(model).forward(images, wanted)
    engine = CudaEngine(model, gpu, all_tokens=True)
    assert torch.equal(engine.forward(pixels, codes).cpu(), logits)
    assert wanted.keys() == codes.keys()
    for name in wanted:
        assert torch.equal(codes[name].cpu(), wanted[name]), name
    for same in (pixels, images, images.double()) if images_too else (pixels,):  # buffers are used again
        assert torch.equal(engine.forward(same).cpu(), logits)
    engine = CudaEngine(model, gpu)
    for _ in range(2):
        assert torch.equal(engine.forward(pixels).cpu(), logits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width(bits: int, either: Any, make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    check(qvit.freeze(perturb(make_student(small_vit(**SMALL), spec=ModelSpec.of_bits(bits)))), either)


@pytest.mark.parametrize("name", cases.GRANULARITIES)
def test_granularities(name: str, gpu: Any, make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL), **cases.GRANULARITIES[name])))
    if any(part in name for part in UNKNOWN):
        with pytest.raises(UnsupportedModelError, match=r"yet: use engine='reference' on device='cuda'\.$"):
            CudaEngine(model, gpu)
    else:
        check(model, gpu, 2)


# All of them on a GPU. In emulation another number of tokens is another kernel to compile: those that differ in launches.
ARCHITECTURES = (
    cases.ARCHITECTURES
    if torch.cuda.is_available()
    else cases.ARCHITECTURES.keys()
    & {
        "distilled",
        "average of patches, no class token",
        "average with prefix",
        "average without fc_norm",
        "norm before the blocks",
        "LayerScale",
    }
)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architectures(name: str, gpu: Any, make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    timm_name, options = cases.ARCHITECTURES[name]
    options = SMALL | {"depth": 1} | options
    options["embed_dim"] = 32 * options["num_heads"]
    check(qvit.freeze(perturb(make_student(small_vit(timm_name, **options)))), gpu, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 128, "num_heads": 2, "img_size": 40, "num_classes": 71},  # heads of 64, 26 tokens, two tiles of classes
        {"embed_dim": 96, "num_heads": 3, "mlp_ratio": 2.5, "img_size": 56},  # 50 tokens; q, k and v end within a tile
        {
            "embed_dim": 64,
            "num_heads": 1,
            "patch_size": 4,
            "img_size": 72,
            "depth": 1,
        },  # 325 tokens: scores are computed thrice
    ],
)
def test_odd_shapes(options: dict[str, Any], gpu: Any, make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    check(qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(3)))), gpu, 1)


@pytest.mark.parametrize(("width", "bits"), [(64, 3), (192, 2), (384, 4)])
def test_more_rows_than_tiles(
    width: int, bits: int, either: Any, make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    """Blocks with several tiles, the last not full; on Hopper LayerNorm behind the products, and one-bit products at 2 bits."""
    if either.device.type == "cpu" and not either.hopper and width > 64:
        pytest.skip("in emulation the kernels of every GPU, which know no rows of a certain width, run with one width")
    options = {"embed_dim": width, "num_heads": width // 32, "depth": 2, "mlp_ratio": 0.5, "img_size": 16}
    student = perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits)))
    check(qvit.freeze(student), either, 27)


def test_rows_wider_than_a_warp_has_words(make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    """Of 1,088 channels, as those of a ViT-H are wider than 1,024: on Hopper two-bit codes of LayerNorm are bytes there."""
    gpu = open_gpu(hopper=True)
    options = {"embed_dim": 1088, "num_heads": 17, "depth": 1, "mlp_ratio": 0.06, "img_size": 16}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(2))))
    if gpu.device.type == "cpu":
        gpu.multiprocessors = 1
        launches = CudaEngine(model, gpu, all_tokens=True).launches(20)
        norms = [one.defines for one in launches if one.kernel == "norm" and one.defines["CHANNELS"] == 1088]
        assert norms
        assert not any(one["OUT_BITS"] for one in norms)
        planes = [(one.values["n"], one.values["k"]) for one in launches if one.defines.get("BITS")]
        assert planes == [(1088, 1088)]  # proj, whose codes are not LayerNorm's
    else:  # in emulation it is right, too, but its compiler takes half a minute for so many registers
        check(model, gpu, 20)


@pytest.mark.parametrize("where", ["behind", "alone"])
def test_where_norms_are_computed(
    where: str, make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the products of floats, or in launches of their own.

    Floats come from whole rows, or from narrow tiles whose epilogues do not overlap the next tile's products.
    """
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 128 if where == "behind" else 0)
    narrow = tuple(replace(tile, overlaps=False) for tile in tiles._FLOATS)
    monkeypatch.setattr(tiles, "_FLOATS", () if where == "behind" else narrow)
    gpu = open_gpu(hopper=True)
    options = {"embed_dim": 128, "num_heads": 4, "depth": 1, "mlp_ratio": 0.5, "img_size": 16}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(3))))
    if gpu.device.type == "cpu":
        launches = CudaEngine(model, gpu, all_tokens=True).launches(27)
        assert any(one.defines.get("EPILOGUE") == 3 for one in launches) == (where == "behind")
        floats = [one.defines for one in launches if one.kernel == "gemm_hopper" and one.defines["EPILOGUE"] == 0]
        assert {(one["DIRECT"], one["STAGED"]) for one in floats if one["RESIDUAL"]} == {
            (1, 0) if where == "behind" else (0, 1)
        }
    check(model, gpu, 27)


@pytest.mark.parametrize("bits", [2, 3])
def test_rows_that_registers_do_not_hold_whole_pass_through_shared_memory(
    bits: int, make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    """Of 96 channels, with what is added to them; the last tile of rows and that of columns are not full."""
    gpu = open_gpu(hopper=True)
    options = {"embed_dim": 96, "num_heads": 3, "depth": 1, "mlp_ratio": 1.0, "img_size": 16}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits))))
    if gpu.device.type == "cpu":
        staged = [one.defines for one in CudaEngine(model, gpu, all_tokens=True).launches(33) if one.defines.get("STAGED")]
        assert [(one["POSITION"], one["RESIDUAL"], one["BITS"]) for one in staged] == [(1, 0, 0), *[(0, 1, int(bits == 2))] * 2]
    check(model, gpu, 33)


def test_the_longest_tables_pass_through_shared_memory(
    make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks with more tiles of columns than there are buffers for their tables."""
    monkeypatch.setattr(step_tables, "CELLS", (128,))
    monkeypatch.setattr(tiles, "_HOPPER", (tiles.HopperTile(3, 128, 4),))
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 0)
    gpu, count = open_gpu(hopper=True), 78
    options = {"depth": 1, "mlp_ratio": 6.0, "img_size": 16}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(4))))
    if gpu.device.type == "cpu":
        (fc1,) = (one for one in CudaEngine(model, gpu, all_tokens=True).launches(count) if one.defines.get("CELLS"))
        each = -(-5 * count // (64 * fc1.defines["kGroups"])) * -(-384 // fc1.defines["kBN"]) // fc1.grid[0]
        assert (fc1.defines["CELLS"], fc1.defines["COLUMN_STAGES"], each) == (128, 2, 4)
    check(model, gpu, count)


@pytest.mark.parametrize(("heads", "patch", "bits"), [(3, 8, 4), (1, 16, 2)])
def test_heads_go_through_a_ring_on_hopper(
    heads: int,
    patch: int,
    bits: int,
    make_student: Factory,
    small_vit: Factory,
    perturb: Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 50 tokens, and of fewer than a warp takes at a time; more heads than there are stages; with and without much doubt."""
    gpu = open_gpu(hopper=True)
    image = 56 if patch == 8 else 32
    options = {"embed_dim": 64 * heads, "num_heads": heads, "depth": 1, "patch_size": patch, "img_size": image}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits))))
    count = 9 * max(1, gpu.multiprocessors // heads) + 1
    (launch,) = (one for one in CudaEngine(model, gpu, all_tokens=True).launches(count) if one.kernel == "attention")
    images = -(-count // max(1, gpu.multiprocessors // heads))
    assert 2 < launch.defines["RING"] < images
    assert launch.grid == (heads * -(-count // images), 1, 1)
    check(model, gpu, count)
    (block,) = model.blocks
    least = float(constants.AttentionConstants.of(block.attention, CPU).score_scale.min())
    monkeypatch.setattr(margins, "ULPS", 1e-6 * 2**24 * least / 600)
    assert all(
        one.defines["ROW_CHECK"] for one in CudaEngine(model, gpu, all_tokens=True).launches(count) if one.kernel == "attention"
    )
    check(model, gpu, count, images_too=False)


@pytest.mark.parametrize(("bits", "doubt"), [(2, 0.0), (4, 1 / 600), (4, 1e9), (8, 0.0)])
def test_few_heads_share_keys_among_all_warps_of_a_block(
    bits: int, doubt: float, make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 50 tokens, two warps; with margins of that many distances of scores, and where every row is computed thrice."""
    monkeypatch.setattr(attention_blocks, "_SPLIT_MOST", 100)
    gpu = open_gpu(hopper=False)
    options = {"embed_dim": 64, "num_heads": 2 if bits == 8 else 1, "depth": 1, "img_size": 56}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits))))
    if doubt:
        least = float(constants.AttentionConstants.of(model.blocks[0].attention, CPU).score_scale.min())
        monkeypatch.setattr(margins, "ULPS", min(1e-6 * 2**24 * least * doubt, 1.0))
    (launch,) = (one for one in CudaEngine(model, gpu, all_tokens=True).launches(2) if one.kernel == "attention")
    assert (launch.defines["SPLIT"], launch.defines["WARPS"], launch.grid[0]) == (1, 2, 8 * options["num_heads"])
    check(model, gpu, 2)


def heads_alone(model: IntegerModel, gpu: Any, count: int) -> list[Launch]:
    """Launches of the last block from its attention to fc2, of those tokens alone that heads read."""
    launches = CudaEngine(model, gpu).launches(count)
    first = max(i for i, one in enumerate(launches) if one.kernel == "attention")
    end = max(i for i, one in enumerate(launches) if one.defines.get("RESIDUAL") and not one.defines["HALVED"])
    assert launches[first].defines["QUERIES"] == len(model.architecture.heads)
    return launches[first : end + 1]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_last_block_of_two_heads(
    bits: int, either: Any, make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    """Rows are gathered from and scattered to those of several images, but not of one; LayerScale.

    Of the only block they are added to those of the embedding. Codes are seen of all tokens.
    """
    options = {"depth": 1, "img_size": 16, "init_values": 0.5} if bits == 2 else {"depth": 2, "img_size": 16}
    student = make_student(small_vit("deit_tiny_distilled_patch16_224", **SMALL | options), spec=ModelSpec.of_bits(bits))
    model = qvit.freeze(perturb(student))
    for count in (3, 1):
        scattered = {one.defines["SCATTER"] for one in heads_alone(model, either, count) if "SCATTER" in one.defines}
        assert scattered == {int(count > 1)}
        check(model, either, count, images_too=False)
    pixels = pixels_for(model)
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(model).forward(torch.from_numpy(model.preprocessing.normalise(pixels.numpy())), wanted)
    assert torch.equal(CudaEngine(model, either).forward(pixels, codes).cpu(), logits)
    assert wanted.keys() == codes.keys()
    assert all(torch.equal(codes[name].cpu(), wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("bits", "residual", "scaled"), [(2, "float32", False), (2, "float16", True), (4, "float16", False), (4, "float32", True)]
)
def test_many_rows_of_the_last_block_on_hopper(
    bits: int, residual: str, scaled: bool, make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    """As many as have Hopper's own products, of bytes or as planes of bits: two tiles of rows, of which the second is not full.

    Sums go through shared memory to rows that do not follow each other; with and without LayerScale.
    """
    gpu, count = open_gpu(hopper=True), 66
    gpu.multiprocessors = 1
    options = {"embed_dim": 96, "num_heads": 3, "depth": 1, "mlp_ratio": 1.0, "img_size": 16}
    options |= {"init_values": 0.5} if scaled else {}
    spec = ModelSpec.of_bits(bits, residual=residual)
    model = qvit.freeze(perturb(make_student(small_vit("deit_tiny_distilled_patch16_224", **SMALL | options), spec=spec)))
    attention, *behind = heads_alone(model, gpu, count)
    assert (attention.defines["SPLIT"], attention.defines["OUT_BITS"]) == (1, int(bits == 2))
    proj, norm, fc1, fc2 = (one.defines for one in behind)
    assert (norm["GATHER"], norm["OUT_BITS"], norm["X_HALF"]) == (1, int(bits == 2), int(residual == "float16"))
    assert (fc1["EPILOGUE"], fc1["BITS"], fc1["OUT_BITS"]) == (1, int(bits == 2), int(bits == 2))
    for one in (proj, fc2):
        assert (one["STAGED"], one["SCATTER"], one["GAMMA"], one["BITS"]) == (1, 1, int(scaled), int(bits == 2))
        assert one["OUT_HALF"] == int(residual == "float16")
    assert {one.values["m"] for one in behind if "m" in one.values} == {2 * count}
    check(model, gpu, count, images_too=False)


def queries_apart(model: IntegerModel, gpu: Any, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What k and v of all rows are compiled with, and q of those alone that heads read, which are other launches."""
    launches = CudaEngine(model, gpu).launches(count)
    heads = len(model.architecture.heads)
    (rest,) = (one for one in launches if one.defines.get("FIRST"))
    few = [one for one in launches if one.defines.get("EPILOGUE") == 2][-1]
    attention = heads_alone(model, gpu, count)[0].defines
    assert attention["Q_ROWS"] == attention["QUERIES"] == heads < attention["TOKENS"]
    width = model.architecture.embed_dim
    assert (rest.defines["FIRST"], rest.values["n"]) == (width, 3 * width)
    assert (few.kernel, few.values["m"], few.values["n"]) == ("gemm_few", count * heads, width)
    return rest.defines, few.defines


@pytest.mark.parametrize(
    ("bits", "residual", "heads", "depth", "narrow"),
    [
        (4, "float32", 1, 1, True),
        (4, "float16", 2, 2, False),
        (2, "float16", 1, 1, True),
        (2, "float32", 2, 2, False),
    ],
)
def test_queries_of_the_last_block_apart_on_hopper(
    bits: int,
    residual: str,
    heads: int,
    depth: int,
    narrow: bool,
    make_student: Factory,
    small_vit: Factory,
    perturb: Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one head and of two. Of narrow tiles blocks have several, and go on from one block of rows to the next."""
    if narrow:
        monkeypatch.setattr(tiles, "_HOPPER", (tiles.HopperTile(1, 64, 4),))
        monkeypatch.setattr(tiles, "_BITS", (tiles.HopperTile(1, 64, 2, bits=True),))
    gpu, count = open_gpu(hopper=True), 52 if narrow else 33
    gpu.multiprocessors = 7 if narrow else 8  # so many that rows of q are too few for planes
    name = "vit_tiny_patch16_224" if heads == 1 else "deit_tiny_distilled_patch16_224"
    options = {"embed_dim": 128, "num_heads": 4 if narrow else 2, "depth": depth, "mlp_ratio": 0.5, "img_size": 16}
    spec = ModelSpec.of_bits(bits, residual=residual)
    model = qvit.freeze(perturb(make_student(small_vit(name, **SMALL | options), spec=spec)))
    rest, _ = queries_apart(model, gpu, count)
    assert (rest["kGroups"], rest["kBN"], rest["BITS"]) == (1 if narrow else 2, 64, int(bits == 2))
    check(model, gpu, count, images_too=False)


def test_queries_of_one_image_apart_on_hopper(make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    """Of so many tokens that their k and v are a large product; q has the tile that decided so, without LayerNorm."""
    gpu = open_gpu(hopper=True)
    gpu.multiprocessors = 3
    options = {"embed_dim": 128, "num_heads": 2, "depth": 1, "mlp_ratio": 0.5, "img_size": 56}  # 50 tokens
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(4))))
    _, few = queries_apart(model, gpu, 1)
    assert few["NORM"] == 0
    check(model, gpu, 1, images_too=False)


def test_queries_of_long_sequences_apart_on_hopper(
    make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 325 tokens, whose scores are computed thrice, one asks, and has a row of q."""
    monkeypatch.setattr(tiles, "_HOPPER", (tiles.HopperTile(2, 64, 4),))
    gpu = open_gpu(hopper=True)
    gpu.multiprocessors = 3
    options = {"embed_dim": 64, "num_heads": 1, "patch_size": 4, "img_size": 72, "depth": 1}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(3))))
    queries_apart(model, gpu, 2)
    pixels = pixels_for(model, 2)
    logits = ReferenceEngine(model).forward(torch.from_numpy(model.preprocessing.normalise(pixels.numpy())))
    assert torch.equal(CudaEngine(model, gpu).forward(pixels).cpu(), logits)


def test_the_last_block_of_long_sequences(make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    """Of 325 tokens, whose scores are computed thrice, one asks; of two images, whose rows follow each other."""
    gpu = open_gpu(hopper=False)
    options = {"embed_dim": 64, "num_heads": 1, "patch_size": 4, "img_size": 72, "depth": 1}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(3))))
    attention, *_ = heads_alone(model, gpu, 2)
    assert (attention.defines["LONG"], attention.defines["SPLIT"], attention.grid[1]) == (1, 0, 1)
    pixels = pixels_for(model, 2)
    logits = ReferenceEngine(model).forward(torch.from_numpy(model.preprocessing.normalise(pixels.numpy())))
    assert torch.equal(CudaEngine(model, gpu).forward(pixels).cpu(), logits)


@pytest.mark.parametrize(("rows", "columns", "spread"), [(32, (96,), True), (16, (32,), False)])
def test_tiles_of_few_rows(
    rows: int,
    columns: tuple[int, ...],
    spread: bool,
    gpu: Any,
    make_student: Factory,
    small_vit: Factory,
    perturb: Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads with several rows of a tile, or none; k in several rounds; warps that have no share of it; LayerScale."""
    monkeypatch.setattr(few_tiles, "_ROWS", (rows,))
    monkeypatch.setattr(few_tiles, "_COLUMNS", columns)
    monkeypatch.setattr(few_tiles, "_MOST_PIECES", 8)
    monkeypatch.setattr(few_tiles, "_MOST_WARPS", 6 if spread else 2)
    monkeypatch.setattr(few_tiles, "SPREAD", spread)
    monkeypatch.setattr(few_tiles, "_NORMED_WARPS", 7 if spread else 2)
    few_tiles.choose_few.cache_clear()
    try:
        options = {"embed_dim": 96, "num_heads": 3, "depth": 1, "mlp_ratio": 1.5, "num_classes": 8, "init_values": 1e-2}
        model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(4))))
        few = [one.defines for one in CudaEngine(model, gpu, all_tokens=True).launches(2) if one.kernel == "gemm_few"]
        assert {(one["kBM"], one["SPREAD"]) for one in few} == {(rows, int(spread))}
        assert {one["NORM"] for one in few} == {0, 1}
        assert {one["kRounds"] > 1 for one in few} == {False, True}
        assert not spread or any(one["kSplit"] * one["kWarpsN"] < one["kWarps"] for one in few)
        check(model, gpu, 2)
    finally:
        few_tiles.choose_few.cache_clear()


def test_two_bits_are_multiplied_as_planes_on_hopper(make_student: Factory, small_vit: Factory) -> None:
    gpu = open_gpu(hopper=True)
    for bits in (2, 3):
        model = qvit.freeze(make_student(small_vit(**SMALL), spec=ModelSpec.of_bits(bits)))
        launches = CudaEngine(model, gpu, all_tokens=True).launches(2048 if gpu.device.type == "cuda" else 48)
        used = {launch.defines["BITS"] for launch in launches if launch.kernel == "gemm_hopper"}
        assert (1 in used) == (bits == 2)
        bytes_alone = CudaEngine(model, gpu, one_bit=False, all_tokens=True).launches(48)
        assert all(not launch.defines.get("BITS") for launch in bytes_alone)
        assert {launch.defines["OUT_BITS"] for launch in launches if launch.kernel == "attention"} == {int(bits == 2)}


@pytest.mark.parametrize(
    ("step", "columns", "counts", "holds"),
    [
        (None, 128, (3, 0), False),
        (None, 128, (3, 0), True),
        (0.15, 64, (3, 1), False),
        (0.15, 64, (3, 1), True),
        (0.08, 128, (0, 0), False),
    ],
    ids=["rising", "rising, rows in registers", "one falls", "one falls, rows in registers", "too many for comparisons"],
)
def test_two_bits_behind_an_activation_are_compared_on_hopper(
    step: float | None,
    columns: int,
    counts: tuple[int, int],
    holds: bool,
    make_student: Factory,
    small_vit: Factory,
    perturb: Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks with several tiles; the last tile of rows is not full, nor that of columns.

    With ``step`` zero lies one or two codes above the least value of GELU, so that codes fall before they rise.
    """
    monkeypatch.setattr(tiles, "_BITS", (tiles.HopperTile(2, columns, 2, bits=True),))
    monkeypatch.setitem(tiles.MOST_HELD, True, 512 if holds else 0)
    gpu = open_gpu(hopper=True)
    options = {"embed_dim": 96, "num_heads": 3, "depth": 1, "mlp_ratio": 3.0, "img_size": 16}
    if step is None and holds:  # planes of more than one product
        options |= {"embed_dim": 288, "num_heads": 9, "mlp_ratio": 1.0}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(2))))
    if step is not None:
        reads = model.blocks[0].fc2.input
        object.__setattr__(reads, "scale", np.full_like(reads.scale, step))
        object.__setattr__(reads, "offset", np.full_like(reads.scale, -0.17))
    count = 39 if gpu.device.type == "cpu" else 3500
    (fc1,) = (one for one in CudaEngine(model, gpu, all_tokens=True).launches(count) if one.defines.get("EPILOGUE") == 1)
    assert (fc1.kernel, fc1.defines["OUT_BITS"], fc1.defines["kBN"]) == ("gemm_hopper", 1, columns)
    assert (fc1.defines["RISING"], fc1.defines["FALLING"]) == counts
    assert (fc1.defines["CELLS"] > 0) == (counts == (0, 0))
    assert fc1.defines["HELD"] == int(holds)
    check(model, gpu, count, images_too=False)


def test_products_read_no_rows_beyond_their_buffers(make_student: Factory, small_vit: Factory) -> None:
    """Tiles of 192 rows too, the last of which may begin at any multiple of 64."""
    model = qvit.freeze(make_student(small_vit(**SMALL | {"depth": 1, "img_size": 16}), spec=ModelSpec.of_bits(4)))
    launches = CudaEngine(model, Emulated(hopper=True), all_tokens=True).launches(40)  # 200 rows
    products = [one for one in launches if one.kernel == "gemm_hopper"]
    assert any(one.defines["kGroups"] == 3 for one in products)
    for one in products:
        height = 64 * one.defines["kGroups"]
        assert one.values["a"].numel() >= pad(one.values["m"], height) * pad(one.values["k"], 128)


@pytest.mark.parametrize("bits", [2, 8])
def test_where_every_value_is_in_doubt(
    bits: int, either: Any, make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With margins of a whole step, all float steps are computed as they are defined."""
    monkeypatch.setattr(margins, "ULPS", 1.0)
    options = SMALL | {"depth": 2, "mlp_ratio": 0.5, "img_size": 16}
    check(qvit.freeze(perturb(make_student(small_vit(**options), spec=ModelSpec.of_bits(bits)))), either, 27)


@pytest.mark.parametrize("bits", [2, 4])
def test_where_many_boundaries_of_the_map_are_next_to_a_score(
    bits: int, gpu: Any, make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With margins of some hundredths of the distance of scores: such scores are decided, not their rows computed again."""
    student = perturb(make_student(small_vit(**SMALL), spec=ModelSpec.of_bits(bits)))
    model = qvit.freeze(student)
    least = min(float(constants.AttentionConstants.of(block.attention, CPU).score_scale.min()) for block in model.blocks)
    monkeypatch.setattr(margins, "ULPS", 1e-6 * 2**24 * least / 600)
    assert all(
        one.defines["ROW_CHECK"] for one in CudaEngine(model, gpu, all_tokens=True).launches(1) if one.kernel == "attention"
    )
    check(model, gpu)


def test_boundaries_are_checked_where_scores_are_close_together(
    gpu: Any, make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As close as in DeiT-T at 4 bits and closer; with margins as above."""
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL), spec=ModelSpec.of_bits(4))))
    monkeypatch.setattr(margins, "ULPS", 1e-6 * 2**24 * 3e-4 / 600)
    for block in model.blocks:
        least = float(constants.AttentionConstants.of(block.attention, CPU).score_scale[: block.attention.heads].min())
        object.__setattr__(block.attention, "factor", block.attention.factor * 3e-4 / least)
    assert all(
        one.defines["ROW_CHECK"] for one in CudaEngine(model, gpu, all_tokens=True).launches(1) if one.kernel == "attention"
    )
    check(model, gpu)


@pytest.mark.parametrize("bits", [3, 8])
def test_scores_beyond_the_range_of_float32s_exponentials(
    bits: int, gpu: Any, make_student: Factory, small_vit: Factory, perturb: Factory
) -> None:
    """Sums of exponentials would overflow in some rows, and vanish in others."""
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL), spec=ModelSpec.of_bits(bits))))
    for block in model.blocks:
        object.__setattr__(block.attention, "factor", 100.0 * block.attention.factor)
    check(model, gpu)


def test_what_is_not_finite_or_not_there(gpu: Any, make_student: Factory, small_vit: Factory) -> None:
    model = qvit.freeze(make_student(small_vit(**SMALL | {"depth": 1})))
    engine = CudaEngine(model, gpu)
    images = torch.from_numpy(model.preprocessing.normalise(pixels_for(model, 2).numpy()))
    expected = engine.run(images.numpy())
    for bad in (np.nan, np.inf, -np.inf):
        images[1, 2, -1, -1] = bad
        with pytest.raises(InputError, match="not finite"):
            engine.forward(images)
    images[1, 2, -1, -1] = 0.0
    assert np.array_equal(engine.run(images.numpy())[0], expected[0])
    assert engine.run(images[:0].numpy()).shape == (0, 5)


def test_heads_of_another_width_are_refused(gpu: Any, frozen: IntegerModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"heads of 4 channels, only of 32 or 64 yet: use engine='reference'"):
        CudaEngine(frozen, gpu)


class Small(Emulated):
    """With memory for the kernels of one forward pass at a time, and for the buffers of two images."""

    most = 2

    def launch(self, launch: Launch, behind: bool = False) -> None:
        if launch.kernel == "pixels" and launch.values["rows"] > self.most * 9:  # patches
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().launch(launch, behind)


def test_too_little_memory(make_student: Factory, small_vit: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images go through in parts, as many at once as memory was found to hold; said once."""
    model = qvit.freeze(make_student(small_vit(**SMALL | {"depth": 1})))
    gpu = Small()
    pixels = pixels_for(model, 5)
    expected = CudaEngine(model, Emulated()).forward(pixels)
    engine = CudaEngine(model, gpu)
    with pytest.warns(SlowerWarning) as caught:
        assert torch.equal(engine.forward(pixels), expected)
    short = "The GPU's memory does not hold the buffers of {} images at once: they go through in parts of {}, which is slower."
    assert [str(one.message) for one in caught] == [short.format(5, 3), short.format(3, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine.forward(pixels), expected)
        assert np.array_equal(engine.run(pixels.numpy()), expected.numpy())
        assert torch.equal(engine.forward(pixels[:2]), expected[:2])
    with pytest.raises(InputError, match=r"does not hold the buffers of 5 images at once: use a smaller batch\.$"):
        engine.forward(pixels, {})
    gpu.most = 0
    with pytest.raises(InputError, match=r"buffers of 1 image at once: free some of it, or use engine='cpu' or another device"):
        CudaEngine(model, gpu).forward(pixels[:1])

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:  # images that come from elsewhere
        patch.setattr(torch.Tensor, "to", full)
        with pytest.raises(InputError, match="buffers of 1 image at once"):
            engine.forward(pixels[:1].float())
    monkeypatch.setattr(constants.Constants, "array", full)
    with pytest.raises(InputError, match=r"memory does not hold the model: free some of it, or use engine='cpu'"):
        CudaEngine(model, gpu)


def test_more_tokens_than_attention_has_room_for(make_student: Factory, small_vit: Factory) -> None:
    """Said when the model is loaded; with as many as there is room for, the launch asks for no more shared memory."""
    model = qvit.freeze(make_student(small_vit(**SMALL | {"depth": 1, "img_size": 72, "patch_size": 4})))  # 325 tokens
    gpu = Emulated()
    gpu.most_shared = 352 * (2 * 32 + 4)
    (launch,) = (one for one in CudaEngine(model, gpu, all_tokens=True).launches(1) if one.kernel == "attention")
    assert (launch.shared, launch.defines["HEAD_DIM"]) == (gpu.most_shared, 32)
    gpu.most_shared -= 1
    with pytest.raises(UnsupportedModelError) as caught:
        CudaEngine(model, gpu)
    assert str(caught.value) == (
        "The CUDA engine does not run 325 tokens on this GPU, only 320 with heads of 32 channels: use engine='reference' on "
        "device='cuda'."
    )
