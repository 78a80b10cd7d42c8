"""Launches of a forward pass: how many there are, that kernels know what they are told, and that all of it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, plan_vit
from qvit.engines.cuda.arguments import ARGUMENTS, Launch
from qvit.engines.cuda.layout import chunks
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines import cases
from tests.engines.cuda.emulator import Emulated

Factory = Callable[..., Any]
SMALL = cases.SMALL | {"embed_dim": 64, "num_heads": 2, "img_size": 24, "patch_size": 8, "depth": 3}  # 10 tokens


@pytest.fixture
def freeze(make_student: Factory, small_vit: Factory) -> Callable[..., IntegerModel]:
    return lambda name="vit_tiny_patch16_224", bits=4, **options: qvit.freeze(
        make_student(small_vit(name, **SMALL | options), spec=ModelSpec.of_bits(bits))
    )


def launches_of(model: IntegerModel, batch: int, hopper: bool, **options: Any) -> list[Launch]:
    gpu = Emulated(hopper)
    gpu.multiprocessors = 4
    return CudaEngine(model, gpu, **options).launches(batch)


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
    launches = launches_of(freeze(bits=bits, depth=1, init_values=0.1), batch, hopper)
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
            for launch in launches_of(freeze(depth=1), batch, hopper):
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
    launches = launches_of(freeze("deit_tiny_distilled_patch16_224", depth=1), 3, hopper)
    first, last = [one for one in launches if one.values.get("n") == SMALL["num_classes"]]
    assert launches[-1] is last
    assert first.values["out"].shape == (3, SMALL["num_classes"])
    assert last.values["out"] is last.values["residual"] is first.values["out"]
    assert (first.defines["HALVED"], last.defines["HALVED"]) == (0, 1)


def test_planes_go_from_one_launch_to_the_next_as_such(freeze: Callable[..., IntegerModel]) -> None:
    """What writes codes writes planes exactly where what reads them multiplies planes."""
    launches = launches_of(freeze(bits=2, depth=1), 600, True)
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
    assert not any(one.defines.get("BITS") for one in launches_of(freeze(bits=2, depth=1), 600, True, one_bit=False))


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
        assert gpu.seen == [(0, unit)] * 6
