"""The kernels' table: what is counted is what the architecture needs, and rates follow from the clock."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit
from qvit.analyze.cost import model_cost
from qvit.bench import kernels
from qvit.bench.ceilings import Ceilings
from qvit.bench.kernels import kernel_rows, work_of
from qvit.engines.cuda import CudaEngine, plan_vit, tiles
from qvit.engines.cuda.arguments import ARGUMENTS, Launch
from qvit.engines.cuda.tuned import Tuned
from qvit.spec import ModelSpec

EMULATOR = Path(__file__).parents[1] / "engines" / "cuda" / "emulator.py"
CEILINGS = Ceilings(gb_per_s=1000.0, bf16_tflops=1.0, int8_tops=2.0)
SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 24, "patch_size": 8, "num_classes": 5}


class Silent:
    """A device that computes nothing."""

    device = torch.device("cpu")
    multiprocessors, most_shared, hopper, tuned = 2, 99 * 1024, False, Tuned()

    def __init__(self) -> None:
        self.launched: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch)


@pytest.fixture
def make_engine(make_student: Callable[..., Any], small_vit: Callable[..., Any]) -> Callable[..., CudaEngine]:
    def make(device: Any, bits: int = 4, residual: str = "float32", all_tokens: bool = False, **options: Any) -> CudaEngine:
        spec = ModelSpec.of_bits(bits, residual=residual)
        model = qvit.freeze(make_student(small_vit(**SMALL | options), spec=spec))
        return CudaEngine(model, device, all_tokens=all_tokens)

    return make


def test_the_work_is_the_architectures(make_engine: Callable[..., CudaEngine]) -> None:
    engine = make_engine(Silent(), all_tokens=True)
    launches, batch = engine.launches(3), 3
    products = model_cost(engine.model.architecture, engine.model.specs).products
    linear = sum(p.multiplies for p in products if p.parameters)
    attention = sum(p.multiplies for p in products if not p.parameters)
    operations = {kernel: sum(work_of(one).operations for one in launches if one.kernel == kernel) for kernel in ARGUMENTS}
    others = dict.fromkeys(("gemm", "gemm_hopper", "norm", "pixels", "pool"), 0)
    assert operations == {"gemm_few": 2 * batch * linear, "attention": 2 * batch * attention, **others}
    # 10 tokens of 64 channels; an MLP of 256; 9 patches of 192 bytes; 5 classes
    rows = 3 * 10
    moved = {kernel: [work_of(one).bytes for one in launches if one.kernel == kernel] for kernel in ARGUMENTS}
    assert moved["pixels"] == [3 * 3 * 24 * 24 + 27 * 192]
    assert moved["attention"] == [4 * rows * 64] * 2
    assert moved["norm"] == []  # floats come into the products behind them
    assert moved["gemm_few"] == [
        27 * 192 + 64 * 192 + 4 * 27 * 64 + 4 * 9 * 64,
        *[
            4 * rows * 64 + 192 * 64 + rows * 192,
            rows * 64 + 64 * 64 + 8 * rows * 64,
            4 * rows * 64 + 256 * 64 + rows * 256,
            rows * 256 + 64 * 256 + 8 * rows * 64,
        ]
        * 2,
        4 * 3 * 64 + 5 * 64 + 4 * 3 * 5,
    ]


def test_codes_two_a_byte_are_half_the_bytes(make_engine: Callable[..., CudaEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    device = Silent()
    device.hopper, device.multiprocessors, device.most_shared = True, 1, tiles.MOST_SHARED
    monkeypatch.setattr(plan_vit, "chunk_rows", lambda *_: 0)
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 0)
    moved = []
    for bits in (8, 4):
        engine = make_engine(device, bits, all_tokens=True, embed_dim=128, depth=1)
        launches = [one for one in engine.launches(27) if one.kernel == "gemm_hopper"]
        moved.append([work_of(one).bytes for one in launches if 512 in (one.values["n"], one.values["k"])])
    rows = 270
    fc1, fc2 = rows * 128 + 128 * 512 + rows * 512, rows * 512 + 128 * 512 + 8 * rows * 128
    assert moved == [[fc1, fc2], [fc1 - rows * 256, fc2 - rows * 256]]


@pytest.mark.parametrize(("residual", "value"), [("float32", 4), ("float16", 2)])
def test_planes_are_a_quarter_of_the_bytes_and_float16_is_half(
    residual: str, value: int, make_engine: Callable[..., CudaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Silent()
    device.hopper, device.multiprocessors, device.most_shared = True, 1, tiles.MOST_SHARED
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 0)
    launches = make_engine(device, 2, residual, embed_dim=128, depth=1, global_pool="avg", fc_norm=False).launches(27)
    sums = 270 * 128
    moved = {
        kernel: [work_of(one).bytes for one in launches if one.kernel == kernel] for kernel in ("attention", "norm", "pool")
    }
    assert moved["attention"] == [3 * sums + sums // 4]
    assert moved["norm"][:2] == [value * sums + sums // 4] * 2
    assert moved["norm"][2] == value * sums + 4 * sums  # in front of the average
    assert moved["pool"] == [4 * 27 * 128 * (9 + 1)]
    proj = next(one for one in launches if one.defines.get("RESIDUAL") and one.values["k"] == 128)
    assert work_of(proj).bytes == (sums + 128 * 128) // 4 + 2 * value * sums


@pytest.mark.parametrize("bits", [2, 4])
def test_the_work_of_the_tokens_that_heads_read(bits: int, make_engine: Callable[..., CudaEngine]) -> None:
    """k and v of all rows, q of one token of each image, and its attention, where these are launches of their own."""
    device = Silent()
    device.hopper, device.multiprocessors, device.most_shared = True, 8, tiles.MOST_SHARED
    launches = make_engine(device, bits, embed_dim=128).launches(66)
    planes, packed, rate, named = (True, 4, 2.0, ", planes") if bits == 2 else (False, 1, 1.0, "")
    rows, width = 66 * 10, 128
    _, rest, few = (work_of(one) for one in launches if one.defines.get("EPILOGUE") == 2)
    moved = (rows * width + 2 * width * width) // packed + rows * 2 * width
    assert rest == kernels.Work(f"660 x 256 x 128, heads{named}", 2 * rows * 2 * width * width, moved, rate)
    assert few == kernels.Work("66 x 128 x 128, heads", 2 * 66 * width * width, 66 * width + width * width + 66 * width)
    at = next(i for i, one in enumerate(launches) if one.defines.get("FIRST"))
    norm = launches[at + 1]
    assert work_of(norm) == kernels.Work("66 x 128", 0, 66 * (4 * width + width + 4))
    whole, last = (one for one in launches if one.kernel == "attention")
    assert (whole.defines["OUT_BITS"], last.defines["OUT_BITS"]) == (int(planes), 0)  # proj of few rows is of bytes
    heads, each = 66 * 2, 64  # of so many channels
    assert work_of(whole) == kernels.Work(
        "132 heads of 10 x 64", 4 * heads * 10 * 10 * each, heads * each * 30 + heads * each * 10 // (4 if planes else 1)
    )
    moved = heads * each * (10 + 10 + 1) + heads * each
    assert work_of(last) == kernels.Work("132 heads of 10 x 64, 1 queries", 4 * heads * 1 * 10 * each, moved)


def test_the_work_of_swin_is_the_architectures(make_student: Callable[..., Any], small_swin: Callable[..., Any]) -> None:
    batch = 64  # a block of attention has several windows
    swin = small_swin(embed_dim=32, num_heads=(1, 2), depths=(2, 1))
    engine = CudaEngine(qvit.freeze(make_student(swin)), Silent())  # type: ignore[arg-type]
    launches = engine.launches(batch)
    products = model_cost(engine.model.architecture, engine.model.specs).products
    operations = {kernel: sum(work_of(one).operations for one in launches if one.kernel == kernel) for kernel in ARGUMENTS}
    assert operations["gemm"] + operations["gemm_few"] == 2 * batch * sum(p.multiplies for p in products if p.parameters)
    assert operations["attention"] == 2 * batch * sum(p.multiplies for p in products if not p.parameters)
    attention = [one for one in launches if one.kernel == "attention"]
    assert attention[0].grid[0] < 4 * batch
    # 4 windows of 16 tokens in lines of 40 numbers; the second block's windows are shifted and have 32 bytes of regions each.
    qkv_and_out, bias = 4 * batch * 64 * 32, 4 * 16 * 40
    assert [work_of(one).bytes for one in attention[:2]] == [qkv_and_out + bias, qkv_and_out + bias + 4 * 32]
    rows = batch * 64
    norms = [work_of(one).bytes for one in launches if one.kernel == "norm"]
    assert norms[:3] == [rows * 32 * 8, rows * (32 * 5 + 4), rows * 32 * 5]  # of patches; an index of windows; in front of fc1
    proj = next(one for one in launches if one.kernel == "gemm" and one.defines.get("SCATTER"))
    assert work_of(proj).bytes == rows * 32 + 32 * 32 + 8 * rows * 32 + 4 * rows


def test_pooling_is_counted(make_engine: Callable[..., CudaEngine]) -> None:
    engine = make_engine(Silent(), global_pool="avg")
    (pool,) = (one for one in engine.launches(3) if one.kernel == "pool")
    assert work_of(pool).bytes == 4 * 3 * 64 * (9 + 1)
    half = make_engine(Silent(), residual="float16", global_pool="avg")
    (pool,) = (one for one in half.launches(3) if one.kernel == "pool")
    assert work_of(pool).bytes == 3 * 64 * (2 * 9 + 4)
    assert set(kernels._WORK) >= set(ARGUMENTS)


def test_rows(make_engine: Callable[..., CudaEngine]) -> None:
    device = Silent()
    engine = make_engine(device, all_tokens=True)
    seen: list[Sequence[Launch]] = []

    def clock(launches: Sequence[Launch]) -> float:
        seen.append(launches)
        return 0.5 * len(launches)

    rows = kernel_rows(engine, 3, CEILINGS, clock)
    # norm before the blocks' layers and before the head; qkv, proj, fc1, fc2; patches; the head
    assert [row["kernel"] for row in rows].count("gemm_few") == 6
    assert sum(row["launches"] for row in rows) == len(engine.launches(3)) == sum(map(len, seen))
    assert len(device.launched) == len(rows) * len(engine.launches(3))  # a whole pass before each is timed
    assert sum(row["percent"] for row in rows) == pytest.approx(100)
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    (fc1,) = (row for row in rows if row["shape"] == "30 x 256 x 64, activation")
    operations, moved = 2 * 2 * 30 * 256 * 64, 2 * (4 * 30 * 64 + 256 * 64 + 30 * 256)
    assert (fc1["launches"], fc1["ms"]) == (2, 1.0)
    assert fc1["tops"] == pytest.approx(operations / 1e-3 / 1e12)
    assert fc1["gb_per_s"] == pytest.approx(moved / 1e-3 / 1e9)
    assert fc1["bound"] == "compute"
    assert fc1["share_of_bound"] == pytest.approx(operations / 2e12 / 1e-3)
    # With more rows norms are launches.
    (norm,) = (row for row in kernel_rows(engine, 60, CEILINGS, clock) if row["shape"] == "600 x 64")
    assert (norm["launches"], norm["bound"]) == (4, "memory")
    assert norm["share_of_bound"] == pytest.approx(4 * 600 * 64 * 5 / 1e12 / 2e-3)


def test_on_a_gpu_a_graph_of_many_launches_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Graph:
        def replay(self) -> None:
            launched.append("replay")

    class OnGpu:
        device = torch.device("cuda")

        def launch(self, launch: str) -> None:
            launched.append(launch)

    def milliseconds(call: Callable[[], None], device: torch.device) -> float:
        assert device.type == "cuda"
        call()
        return 10.0

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    streams: list[str] = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext(streams.append(stream)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(kernels, "milliseconds", milliseconds)
    clock = kernels._clock_of(OnGpu())  # type: ignore[arg-type]
    assert clock(["a", "b", "c", "d", "e"]) == 2.0  # type: ignore[list-item]
    # Launched, so that they are compiled, and recorded: five times five are the first number above 24.
    assert launched == [*"abcde"] * 10 + ["replay"]
    assert streams == ["stream of cuda"]


def test_a_kernel_that_is_not_known_counts_what_it_is_given() -> None:
    launch = Launch("pool", {}, (3, 4, 1), 128, 0, {"x": torch.zeros(5, 2), "out": torch.zeros(7, dtype=torch.uint8)})
    object.__setattr__(launch, "kernel", "another")
    assert work_of(launch) == kernels.Work("3 x 4 x 1 blocks", 0, 47)


def test_timed_in_emulation(make_engine: Callable[..., CudaEngine]) -> None:
    if torch.cuda.is_available():
        pytest.skip("test_gpu.py times real kernels")
    spec = importlib.util.spec_from_file_location("emulator", EMULATOR)
    assert spec is not None
    assert spec.loader is not None
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)
    engine = make_engine(emulator.Emulated(), depth=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_LEAST_LAUNCHES", 1)
        rows = kernel_rows(engine, 1, CEILINGS)
    assert len(rows) == 8
    assert all(row["ms"] > 0 for row in rows)
