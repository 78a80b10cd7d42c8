"""Launches of a forward pass: how many there are, that kernels know what they are told, and that all of it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, few_tiles, plan_vit
from qvit.engines.cuda.arguments import ARGUMENTS, Launch
from qvit.engines.cuda.layout import CHUNK, TILE_ROWS, chunks
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines import cases
from tests.engines.cuda.emulator import Emulated

Factory = Callable[..., Any]
SMALL = cases.SMALL | {"embed_dim": 64, "num_heads": 2, "img_size": 24, "patch_size": 8, "depth": 3}  # 10 tokens
WIDE = {"embed_dim": 128, "num_heads": 4, "depth": 2}  # whole tiles of 128 columns each of q, k and v
DISTILLED = "deit_tiny_distilled_patch16_224"


@pytest.fixture
def freeze(make_student: Factory, small_vit: Factory) -> Callable[..., IntegerModel]:
    return lambda name="vit_tiny_patch16_224", bits=4, **options: qvit.freeze(
        make_student(small_vit(name, **SMALL | options), spec=ModelSpec.of_bits(bits))
    )


def launches_of(model: IntegerModel, batch: int, hopper: bool, multiprocessors: int = 4, **options: Any) -> list[Launch]:
    gpu = Emulated(hopper)
    gpu.multiprocessors = multiprocessors
    return CudaEngine(model, gpu, **options).launches(batch)


def rows_of(launch: Launch) -> int:
    return launch.values["rows"] if launch.kernel == "norm" else launch.values["m"]


def parts_of(launches: list[Launch]) -> tuple[list[Launch], list[Launch], list[Launch]]:
    """What comes before the last attention, from there to fc2, and behind that: the heads."""
    first = max(i for i, one in enumerate(launches) if one.kernel == "attention")
    end = 1 + max(i for i, one in enumerate(launches) if "n" in one.values and one.values["k"] == 256)
    return launches[:first], launches[first:end], launches[end:]


@pytest.mark.parametrize(
    ("width", "batch", "hopper", "a_block"),
    [
        (64, 1, False, 5),  # few rows: the norms are within qkv and fc1
        (64, 1, True, 5),
        (64, 600, False, 7),
        (64, 600, True, 5),  # rows of 64: the norms are behind proj and fc2
        (96, 600, True, 7),
    ],
)
def test_launches_of_a_block(
    width: int, batch: int, hopper: bool, a_block: int, freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `docs/kernels.md` has it, where all rows are one chunk."""
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 0)
    counts = [
        len(launches_of(freeze(depth=depth, embed_dim=width, num_heads=width // 32), batch, hopper)) for depth in (1, 2, 3)
    ]
    assert [more - less for less, more in pairwise(counts)] == [a_block, a_block]


def named(values: Mapping[str, Any], fields: type) -> None:
    """Every value belongs to a field: ctypes itself takes any name."""
    known = {name: kind for base in fields.__mro__ for name, kind, *_ in vars(base).get("_fields_", ())}
    assert values.keys() <= known.keys()
    for name, value in values.items():
        if isinstance(value, Mapping):
            named(value, known[name])


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("batch", [1, 600])
def test_kernels_know_what_they_are_told(bits: int, batch: int, hopper: bool, freeze: Callable[..., IntegerModel]) -> None:
    launches = launches_of(freeze(bits=bits, depth=2, init_values=0.1), batch, hopper)
    for launch in launches:
        named(launch.values, ARGUMENTS[launch.kernel])
        assert all(isinstance(value, int) for value in launch.defines.values())
        assert 0 < launch.threads <= 1024
        assert min(launch.grid) > 0


def test_every_tile_of_every_product_has_a_block(freeze: Callable[..., IntegerModel]) -> None:
    """Or a share of a block's range."""
    seen = Counter()
    for hopper in (False, True):
        for batch in (1, 23, 600):
            for launch in launches_of(freeze(depth=2), batch, hopper):
                if launch.kernel not in ("gemm", "gemm_few"):
                    continue
                of, values = launch.defines, launch.values
                tiles = -(-values["m"] // of["kBM"]) * -(-values["n"] // of["kBN"])
                assert launch.grid == (tiles, 1, 1)
                seen[launch.kernel] += 1
    assert min(seen.values()) > 3


@pytest.mark.parametrize("hopper", [False, True])
def test_the_last_launch_writes_the_logits(hopper: bool, freeze: Callable[..., IntegerModel]) -> None:
    """With two heads the second adds its half to the first's."""
    launches = launches_of(freeze(DISTILLED, depth=1), 3, hopper)
    first, last = [one for one in launches if one.values.get("n") == SMALL["num_classes"]]
    assert launches[-1] is last
    assert first.values["out"].shape == (3, SMALL["num_classes"])
    assert last.values["out"] is last.values["residual"] is first.values["out"]
    assert (first.defines["HALVED"], last.defines["HALVED"]) == (0, 1)


@pytest.mark.parametrize(("name", "heads"), [("vit_tiny_patch16_224", 1), (DISTILLED, 2)])
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("batch", [3, 600])
def test_the_last_block_computes_what_heads_read(
    batch: int, hopper: bool, name: str, heads: int, freeze: Callable[..., IntegerModel]
) -> None:
    """Of its attention too only these tokens ask; behind it their rows are one after another, but not in the stream."""
    tokens = 9 + heads
    launches = launches_of(freeze(name), batch, hopper)
    queries = [one.defines["QUERIES"] for one in launches if one.kernel == "attention"]
    assert queries == [tokens, tokens, heads]
    before, (attention, *behind), heads_alone = parts_of(launches)
    assert (attention.defines["SPLIT"], attention.defines["TOKENS"]) == (1, tokens)
    assert attention.grid == (2 * batch, 1, 1)  # two heads of attention
    assert [one.defines.get("EPILOGUE", one.kernel) for one in behind] == [0, "norm", 1, 0]
    assert {rows_of(one) for one in behind} == {heads * batch}
    stream = torch.arange(batch * tokens).reshape(batch, tokens)
    proj, norm, _, fc2 = behind
    for one in (proj, norm, fc2):
        assert torch.equal(one.values["index"], stream[:, :heads].reshape(-1).int())
    assert proj.values["residual"] is fc2.values["residual"] is fc2.values["out"]
    assert norm.values["x"].data_ptr() == proj.values["out"].data_ptr() == fc2.values["out"].data_ptr()
    assert {rows_of(one) for one in heads_alone} == {batch}
    fc1s = [one.values["m"] for one in before if one.values.get("n") == 256]
    assert sum(fc1s) == 2 * batch * tokens  # of the other two blocks, in chunks of rows


@pytest.mark.parametrize(("name", "heads"), [("vit_tiny_patch16_224", 1), (DISTILLED, 2)])
@pytest.mark.parametrize("hopper", [False, True])
def test_tokens_that_heads_read_of_one_image_lie_one_behind_the_other(
    hopper: bool, name: str, heads: int, freeze: Callable[..., IntegerModel]
) -> None:
    """Nothing is gathered or scattered, and every norm is within the product that reads its codes."""
    launches = launches_of(freeze(name), 1, hopper)
    _, (attention, *behind), _ = parts_of(launches)
    assert (attention.defines["QUERIES"], attention.defines["SPLIT"], attention.grid) == (heads, 1, (2, 1, 1))
    assert [(one.kernel, one.defines["NORM"], one.values["m"]) for one in behind] == [("gemm_few", x, heads) for x in (0, 1, 0)]
    assert len(launches) == 2 + 3 * 5 + heads
    assert all(one.values.get("index") is None and not one.defines.get("SCATTER") for one in launches)


@pytest.mark.parametrize("batch", [1, 600])
def test_where_all_tokens_are_computed_to_the_end(
    batch: int, freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where heads read an average of them, and where they are wanted."""
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 0)
    blocks = []
    for pool, options in (("avg", {}), ("avg", {"all_tokens": True}), ("token", {"all_tokens": True}), ("token", {})):
        launches = launches_of(freeze(global_pool=pool), batch, True, **options)
        _, block, _ = parts_of(launches)
        blocks.append([(one.kernel, one.defines, one.grid) for one in block])
        alone = (pool, options) == ("token", {})
        assert [one.defines["QUERIES"] for one in launches if one.kernel == "attention"] == [10, 10, 1 if alone else 10]
        assert {rows_of(one) for one in block[1:]} == {batch if alone else 10 * batch}
    assert blocks[0] == blocks[1] == blocks[2] != blocks[3]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("name", "heads"), [("vit_tiny_patch16_224", 1), (DISTILLED, 2)])
def test_queries_of_the_last_block_are_apart_on_hopper(
    bits: int, name: str, heads: int, freeze: Callable[..., IntegerModel]
) -> None:
    """k and v of all rows are a launch, and q of those that heads read another, of few rows, whose LayerNorm is made again."""
    batch, tokens, width = 66 // heads, 9 + heads, 128
    launches = launches_of(freeze(name, bits, **WIDE), batch, True, multiprocessors=8)
    whole, rest, few = (one for one in launches if one.defines.get("EPILOGUE") == 2)
    assert (whole.kernel, whole.defines["FIRST"], whole.values["n"]) == ("gemm_hopper", 0, 3 * width)
    assert (rest.kernel, rest.defines["FIRST"], rest.values["n"]) == ("gemm_hopper", width, 3 * width)
    assert rest.values["m"] == whole.values["m"] == batch * tokens
    assert rest.defines["BITS"] == int(bits == 2)
    tiles_of_both = -(-batch * tokens // (64 * rest.defines["kGroups"])) * (2 * width // rest.defines["kBN"])
    assert rest.grid == (min(8, tiles_of_both), 1, 1)
    assert (few.kernel, few.values["m"], few.values["n"], few.values["tokens"]) == ("gemm_few", heads * batch, width, heads)
    assert few.defines["TILES_N"] * few.defines["kBN"] == width
    assert not few.defines.get("FIRST")

    at = launches.index(rest)
    _, norm, _, attention = launches[at : at + 4]
    assert launches[at + 2] is few
    assert (norm.kernel, norm.defines["GATHER"], norm.values["rows"]) == ("norm", 1, heads * batch)
    stream = torch.arange(batch * tokens).reshape(batch, tokens)
    assert torch.equal(norm.values["index"], stream[:, :heads].reshape(-1).int())
    before = next(one for one in reversed(launches[:at]) if one.defines.get("RESIDUAL"))  # fc2 of the block before
    assert norm.values["x"].data_ptr() == before.values["out"].data_ptr()
    assert norm.values["out"].data_ptr() == few.values["a"].data_ptr()
    assert norm.defines["OUT_BITS"] == 0  # few rows are multiplied as bytes
    first = next(one for one in launches if one.kernel == "attention")
    names = ("TOKENS", "QUERIES", "Q_ROWS")
    assert [first.defines[one] for one in names] == [tokens] * 3
    assert [attention.defines[one] for one in names] == [tokens, heads, heads]
    assert attention.values["q"].data_ptr() == few.values["out"].data_ptr()
    assert attention.values["k"].data_ptr() == rest.values["out_k"].data_ptr()
    assert attention.values["v"].data_ptr() == rest.values["out_v"].data_ptr()


@pytest.mark.parametrize(
    "why",
    ["all tokens", "an average", "another GPU", "few rows", "many queries", "columns of many rows", "columns of few rows"],
)
def test_queries_are_not_apart(why: str, freeze: Callable[..., IntegerModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are of all tokens, where neither product would be faster, and where q does not end with a tile of both."""
    batch = {"few rows": 1, "many queries": 64}.get(why, 16)
    width = 192 if why == "columns of many rows" else 128  # in tiles of 128 columns, and of few rows of 192
    if why == "columns of few rows":
        monkeypatch.setattr(few_tiles, "_COLUMNS", (96,))
    few_tiles.choose_few.cache_clear()
    try:
        options = WIDE | {"embed_dim": width, "num_heads": width // 32}
        model = freeze(**options, global_pool="avg" if why == "an average" else "token")
        launches = launches_of(model, batch, why != "another GPU", multiprocessors=3, all_tokens=why == "all tokens")
    finally:
        few_tiles.choose_few.cache_clear()
    heads = [one for one in launches if one.defines.get("EPILOGUE") == 2]
    assert [(one.values["m"], one.values["n"]) for one in heads] == [(10 * batch, 3 * width)] * 2
    if why in ("another GPU", "few rows"):
        assert not any("FIRST" in one.defines for one in launches)
    else:
        assert {one.kernel for one in heads} == {"gemm_hopper"}
        assert {one.defines["FIRST"] for one in launches if one.kernel == "gemm_hopper"} == {0}
        assert {one.defines["kBN"] for one in heads} == {128}
    attention = [one.defines for one in launches if one.kernel == "attention"]
    assert [one["Q_ROWS"] for one in attention] == [one["TOKENS"] for one in attention] == [10, 10]
    assert attention[-1]["QUERIES"] == (10 if why in ("all tokens", "an average") else 1)


@pytest.mark.parametrize("batch", [3, 400])
@pytest.mark.parametrize("bits", [2, 8])
def test_codes_behind_an_activation_have_room(bits: int, batch: int, freeze: Callable[..., IntegerModel]) -> None:
    """In every block, whole tiles of rows; also where all rows of the last block are more than a chunk of the others."""
    launches = launches_of(freeze(bits=bits, depth=2, img_size=16), batch, True, multiprocessors=1)
    written = [one for one in launches if one.defines.get("EPILOGUE") == 1]
    assert {one.values["m"] for one in written} >= {batch}
    for one in written:
        out, rows = one.values["out"], one.values["m"]
        assert -(-rows // TILE_ROWS) * TILE_ROWS * CHUNK * one.values["ldo"] <= out.numel(), rows


class Recording(Emulated):
    """Notes of each attention how many tokens ask and whether its map is shown, and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def launch(self, launch: Launch, behind: bool = False) -> None:
        if launch.kernel == "attention":
            self.seen.append((launch.defines["QUERIES"], launch.defines["SHOW"]))


def test_codes_to_be_seen_are_of_all_tokens_and_logits_of_the_plan_as_it_is(freeze: Callable[..., IntegerModel]) -> None:
    gpu = Recording()
    codes: dict[str, torch.Tensor] = {}
    engine = CudaEngine(freeze(depth=2), gpu)
    engine.forward(torch.zeros(2, 3, 24, 24, dtype=torch.uint8), codes)
    assert gpu.seen == [(10, 1), (10, 1), (10, 0), (1, 0)]
    assert codes["blocks.1.mlp.fc2.input"].shape == (2, 10, 256)
    assert codes["blocks.1.attn.map"].shape == (2, 2, 10, 10)


def test_planes_go_from_one_launch_to_the_next_as_such(freeze: Callable[..., IntegerModel]) -> None:
    """What writes codes writes planes exactly where what reads them multiplies planes."""
    launches = launches_of(freeze(bits=2, depth=2), 600, True)
    writers = {}
    for launch in launches:
        values, of = launch.values, launch.defines
        if launch.kernel == "gemm_hopper" and values["a"].data_ptr() in writers:
            writer = writers[values["a"].data_ptr()]
            assert writer.defines.get("OUT_BITS", 0) == of["BITS"], writer.kernel
            width = writer.values["chunks"] if writer.defines.get("EPILOGUE") == 3 else writer.values["ldo"]
            assert width == (1 if of["BITS"] else chunks(values["k"]))
        for name in ("out", "out_k"):
            if launch.kernel != "pixels" and isinstance(values.get(name), torch.Tensor) and values[name].dtype == torch.uint8:
                writers[values[name].data_ptr()] = launch
    assert {one.defines["BITS"] for one in launches if one.kernel == "gemm_hopper"} == {0, 1}
    assert not any(one.defines.get("BITS") for one in launches_of(freeze(bits=2, depth=2), 600, True, one_bit=False))


class Watching(Emulated):
    """Looks at where images lie, and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def launch(self, launch: Launch, behind: bool = False) -> None:
        if launch.kernel == "pixels":
            self.seen.append((launch.packed.images % 16, launch.defines["UNIT"]))


def test_pixels_are_read_in_pieces_as_large_as_they_lie_and_divide_a_row(freeze: Callable[..., IntegerModel]) -> None:
    for size, patch, unit in ((32, 16, 16), (24, 8, 8), (28, 4, 4), (30, 6, 2), (21, 7, 1)):
        model, gpu = freeze(depth=1, img_size=size, patch_size=patch), Watching()
        engine = CudaEngine(model, gpu)
        images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        memory = torch.zeros(images.numel() + 16, dtype=torch.uint8)
        for first in (0, 1, 8):  # a view into some buffer need not lie at a multiple of 16 bytes
            view = memory[first : first + images.numel()].view(images.shape)
            assert view.is_contiguous()
            engine.forward(view)
            engine.forward(view, {})
        assert gpu.seen == [(0, unit)] * 9  # a pass of its own shows codes
