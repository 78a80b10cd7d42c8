"""Tuning: which tiles are tried, the fastest right one is kept, so is the time, and the package finds the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tune_gpu

import qvit
from qvit.engines.cuda import CudaEngine, tiles, tuned
from qvit.engines.cuda.tiles import (
    MOST_SHARED,
    HopperTile,
    MmaTile,
    choose,
    choose_bits,
    choose_floats,
    choose_norm_behind,
    with_nibbles,
)
from qvit.engines.cuda.tuned import Choice, Tuned, tuned_for
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.spec import RESIDUALS, ModelSpec

NAME = "NVIDIA X1 80GB"
BATCH = 256  # images of 10 tokens
# Heads read an average, so one block computes all tokens to its end.
SMALL = {"embed_dim": 64, "num_heads": 2, "img_size": 24, "patch_size": 8, "depth": 1, "global_pool": "avg", "fc_norm": False}


class Machine:
    """Plays a GPU: tiles have times, and logits, that a test gives them; a forward pass without any of them takes 10 ms."""

    device = torch.device("cpu")
    multiprocessors, most_shared, hopper, architecture, name = 4, MOST_SHARED, True, "sm_90a", NAME

    def __init__(self) -> None:
        self.tuned = Tuned()
        self.now = 0.0
        self.times: dict[Any, float] = {}
        self.wrong: set[Any] = set()
        self.refused: set[Any] = set()
        self.compiled: list[tuple[str, dict[str, int]]] = []
        self.timed: list[tuple[int, list[Any]]] = []  # calls, tiles

    def tiles(self) -> list[Any]:
        return [choice.tile for choice in self.tuned.all()]

    def forward(self, _engine: CudaEngine, images: torch.Tensor) -> torch.Tensor:
        if self.refused & {*self.tiles()}:
            raise UnsupportedModelError("The CUDA kernel gemm_hopper does not run.")
        return torch.full((len(images), 1), float(bool(self.wrong & {*self.tiles()})))

    def milliseconds(self, call: Callable[[], object], _device: torch.device, calls: int = 10, rounds: int = 5) -> float:
        call()
        self.timed.append((calls * rounds, self.tiles()))
        self.now += 1.0
        return 10.0 + sum(self.times.get(tile, 0.0) for tile in self.tiles())

    def compile_kernel(self, kernel: str, defines: dict[str, int], architecture: str) -> bytes:
        assert architecture == "sm_90a"
        self.compiled.append((kernel, defines))
        if not self.compiled[1:]:
            raise UnsupportedModelError("What does not compile says so where it is used.")
        return b""


class Here(Executor):
    """Does at once what it is asked."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments, **options))
        return done


@pytest.fixture(scope="module")
def files(make_student: Callable[..., Any], small_vit: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for bits in (2, 4):
        for residual in RESIDUALS:
            student = make_student(small_vit(**SMALL), spec=ModelSpec.of_bits(bits, residual=residual))
            qvit.freeze(student).save(folder / file_of(bits, residual))
    return folder


def file_of(bits: int, residual: str = "float32") -> str:
    return f"{bits}-{residual}.qvit"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, files: Path, tmp_path: Path) -> Machine:
    played = Machine()

    @contextmanager
    def compilers() -> Iterator[Executor]:
        yield Here()

    monkeypatch.setattr(tuned, "FILES", tmp_path / "tuned")
    for name, value in {
        "FILES": tmp_path / "tuned",
        "Gpu": lambda device: played,
        "make_random_model": lambda _name, bits, path, residual: shutil.copy(files / file_of(bits, residual), path),
        "milliseconds": played.milliseconds,
        "compile_kernel": played.compile_kernel,
        "_compilers": compilers,
        "time": SimpleNamespace(perf_counter=lambda: played.now),
    }.items():
        monkeypatch.setattr(tune_gpu, name, value)
    monkeypatch.setattr(CudaEngine, "forward", lambda engine, images: played.forward(engine, images))
    return played


def tune(machine: Machine, *options: str, bits: int = 4) -> None:
    tune_gpu.main(["--models", "deit", "--bits", str(bits), "--batches", str(BATCH), *options])


def tried(machine: Machine, files: Path, bits: int = 4, residual: str = "float32") -> dict[tune_gpu.Site, list[Choice]]:
    model = IntegerModel.load(files / file_of(bits, residual))
    return dict(tune_gpu.Tuner(machine, model, BATCH).options())  # type: ignore[arg-type]


def test_the_fastest_right_tile_is_kept_and_found_by_the_package(
    machine: Machine, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = tried(machine, files)
    fc1 = next(site for site in sites if site.kind == "codes" and site.n == 256)
    floats = next(site for site in sites if site.kind == "floats")
    small, large = MmaTile(128, 64, 64, 4, 4, 1), HopperTile(2, 64, 4)
    wrong, refused = HopperTile(2, 64, 6), HopperTile(2, 64, 8)
    assert {small, large, wrong, refused} <= {choice.tile for choice in sites[fc1]}
    machine.times = {small: -1.0, large: -2.0, wrong: -5.0, refused: -5.0}
    machine.times |= {choice.tile: -0.01 for choice in sites[floats]}  # within the noise
    machine.wrong, machine.refused = {wrong}, {refused}
    tune(machine)
    captured = capsys.readouterr()
    assert f"note: other logits with {Choice('codes', 10 * BATCH, 256, 64, False, wrong)}" in captured.err
    assert "note: The CUDA kernel gemm_hopper does not run." in captured.err
    kept = tuned_for(NAME)
    assert kept.all()
    assert {choice.tile for choice in kept.all()} == {large}
    choice = kept.find("codes", 10 * BATCH, 256, 64, bits=False, half=False)
    assert choice == Choice("codes", 10 * BATCH, 256, 64, False, large)
    assert "10.000 -> " in captured.out
    assert f"{len(sites[fc1])} of {len(sites[fc1])} tiles tried" in captured.out
    assert "no gain" in captured.out
    # What is far from the fastest is not timed for long.
    calls = {tiles[-1]: count for count, tiles in machine.timed if tiles}
    assert (calls[small], calls[large]) == (50, 50)
    slow = next(choice.tile for choice in sites[fc1] if choice.tile not in machine.times)
    assert calls[slow] in (6, 50)
    # The engine, with the file, launches the tile.
    machine.tuned = kept
    launches = CudaEngine(IntegerModel.load(files / file_of(4)), machine).launches(BATCH)  # type: ignore[arg-type]
    # Of the first block, a chunk of rows each; behind the last attention there are as few rows as images.
    found = [one for one in launches if one.defines.get("EPILOGUE") == 1 and one.values["m"] > BATCH]
    assert sum(one.values["m"] for one in found) == 10 * BATCH
    for one in found:
        assert (one.kernel, one.defines["kGroups"], one.defines["kBN"], one.defines["kStages"]) == ("gemm_hopper", 2, 64, 4)


def test_all_that_is_tried_is_compiled_before(machine: Machine, files: Path) -> None:
    tune(machine, "--minutes", "60")  # a second each time
    compiled = {(kernel, *sorted(defines.items())) for kernel, defines in machine.compiled}
    engine = CudaEngine(IntegerModel.load(files / file_of(4)), machine)  # type: ignore[arg-type]
    for choices in tried(machine, files).values():
        for choice in choices[::5]:
            machine.tuned = Tuned([choice])
            for launch in engine.launches(BATCH):
                assert (launch.kernel, *sorted(launch.defines.items())) in compiled, choice
    assert len({(kernel, *sorted(defines.items())) for kernel, defines in machine.compiled}) > 50


def test_when_the_time_is_over_what_was_found_is_kept(
    machine: Machine, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(iter(tried(machine, files).values()))
    machine.times = {first[0].tile: -3.0}
    tune(machine, "--minutes", "0.1", "-o", str(tmp_path / "out" / "x.json"))  # a second each time
    assert machine.now < 12
    captured = capsys.readouterr()
    assert f"of {len(first)} tiles tried" in captured.out
    assert "is not tuned to its end: no time is left" in captured.err
    assert not (tmp_path / "tuned").exists()
    assert first[0].tile.__class__.__name__ == "MmaTile"
    assert '"kernel": "gemm"' in (tmp_path / "out" / "x.json").read_text()
    tune_gpu.main(["--models", "deit", "--bits", "4", "2", "--batches", "256", "--minutes", "-1"])
    assert capsys.readouterr().err.count("is left out: no time is left") == 2


def test_other_shapes_choices_stay(machine: Machine, files: Path, tmp_path: Path) -> None:
    other = Choice("codes", 1000, 3072, 768, False, HopperTile(3, 128, 4))
    first = next(iter(tried(machine, files).values()))[0]
    tuned.write(tmp_path / "tuned" / "nvidia-x1-80gb.json", NAME, [other, replace(first, tile=HopperTile(2, 64, 6))], {})
    machine.times = {first.tile: -3.0}
    tune(machine)
    kept = tuned_for(NAME)
    assert kept.find("codes", 1000, 3072, 768, bits=False, half=False) == other
    assert kept.find(first.kind, first.m, first.n, first.k, bits=False, half=False) == first


def test_both_types_of_the_stream_have_choices_in_one_file(
    machine: Machine, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each found by the engine for models of its own; codes of bytes are the same for both."""
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 0)  # floats alone come out of the first block's fc2
    for site in tried(machine, files, 4, "float16"):
        assert site.half == (site.kind != "codes")
    chosen: dict[str, Choice] = {}
    for residual in RESIDUALS:
        sites = tried(machine, files, 2, residual)
        fc2 = next(site for site in sites if (site.kind, site.k) == ("floats", 256))
        chosen[residual] = next(one for one in sites[fc2] if one.tile.piece == (64 if fc2.half else 32))  # type: ignore[union-attr]
        machine.times = {chosen[residual].tile: -3.0}
        tune(machine, "--residual", residual, bits=2)
    kept = tuned_for(NAME)
    assert {choice.half for choice in kept.all()} == {False, True}
    machine.tuned = kept
    for residual, choice in chosen.items():
        assert kept.find("floats", choice.m, choice.n, choice.k, choice.bits, residual == "float16") == choice
        model = IntegerModel.load(files / file_of(2, residual))
        launches = CudaEngine(model, machine).launches(BATCH)  # type: ignore[arg-type]
        pieces = {one.defines["kPiece"] for one in launches if one.defines.get("STAGED") and one.values["k"] == 256}
        assert pieces == {choice.tile.piece}  # type: ignore[union-attr]


def test_a_patch_embedding_with_a_norm_behind_it_writes_float32(
    make_student: Callable[..., Any], small_vit: Callable[..., Any]
) -> None:
    spec = ModelSpec.of_bits(4, residual="float16")
    for norm, half in (({}, True), ({"pre_norm": True, "class_token": False, "global_pool": "avg"}, False)):
        found = tune_gpu.sites(qvit.freeze(make_student(small_vit(**SMALL | norm), spec=spec)), planes=False)
        assert [site.half for site in found if site.k == 192] == [half]
        assert {site.half for site in found if site.k != 192 and site.kind != "codes"} == {True}


@pytest.mark.parametrize("bits", [2, 4])
def test_tiles_that_are_tried_fit(bits: int, machine: Machine, files: Path) -> None:
    sites = tried(machine, files, bits)
    kinds = {site.kind for site in sites}
    assert kinds == ({"planes", "rows", "floats"} if bits == 2 else {"codes", "rows", "floats"})
    assert {site.bits for site in sites if site.kind in ("planes", "rows")} == {bits == 2}
    for site, choices in sites.items():
        assert len({repr(choice) for choice in choices}) == len(choices)
        assert all(choice.tile.shared(site.k) <= MOST_SHARED for choice in choices if choice.tile is not None)
        assert (None in {choice.tile for choice in choices}) == (site.kind in ("planes", "rows"))
        patches = site.kind == "floats" and site.k == 192 and not site.bits
        assert {choice.m for choice in choices} == {BATCH * (9 if patches else 10)}


def test_products_of_one_shape_are_tuned_once(
    machine: Machine, make_student: Callable[..., Any], small_vit: Callable[..., Any]
) -> None:
    """As those of fc2 and the patch embedding of DeiT-T; here of qkv and fc1 too, whose columns 192 does not divide evenly."""
    model = qvit.freeze(make_student(small_vit(**SMALL | {"mlp_ratio": 3.0})))
    found = tune_gpu.sites(model, planes=False)
    assert len(found) == len({*found}) == 5
    tuner = tune_gpu.Tuner(machine, model, BATCH)  # type: ignore[arg-type]
    for _, choices in tuner.options():
        for choice in choices:
            assert tuner.kernels([choice])


def test_other_gpus_try_their_own_tiles(machine: Machine, files: Path) -> None:
    machine.hopper = False
    sites = tried(machine, files)
    assert {type(choice.tile) for choices in sites.values() for choice in choices} == {MmaTile, type(None)}


def test_a_kernel_is_compiled_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvit.engines.cuda import compiler
    from qvit.errors import MissingDependencyError

    try:
        compiler._nvrtc()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("QVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tune_gpu, "usable_cores", lambda: 1)
    with tune_gpu._compilers() as pool:
        pool.submit(tune_gpu.compiled, ("pool", (), "sm_80")).result()
        pool.submit(tune_gpu.compiled, ("norm", (), "sm_80")).result()  # does not compile, and is not heard of
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["pool"]


def as_launched(rule: Any, site: tune_gpu.Site) -> Any:
    """Nothing is made twice in front of heads."""
    return replace(rule, twice=False) if site.kind == "planes" and not site.permuted else rule


@pytest.mark.parametrize("bits", [2, 4])
def test_what_the_rules_choose_for_codes_is_tried(bits: int, machine: Machine, files: Path) -> None:
    seen = 0
    for site, choices in tried(machine, files, bits).items():
        if site.kind in ("planes", "codes"):
            product, on = (choices[0].m, site.n, site.k), machine.multiprocessors
            rule = choose_bits(*product, on) if site.bits else choose(*product, on, hopper=True)
            assert as_launched(rule, site) in {choice.tile for choice in choices}
            seen += 1
    assert seen == 2


def every(cut: Callable[[int, int], tuple[HopperTile, ...]]) -> list[tuple[HopperTile, int, int]]:
    return [(tile, n, k) for n in (64, 128, 192, 384) for k in (n, 4 * n) for tile in cut(n, k)]


@pytest.mark.parametrize(
    ("kind", "bits", "half", "cuts"),
    [
        ("codes", False, False, [(tile, 384, 384) for tile in (*tiles._MMA, *tiles._HOPPER)]),
        ("planes", True, False, [(tile, 384, 384) for tile in tiles._BITS]),
        ("planes", True, True, [(tile, 384, 384) for tile in tiles._BITS]),
        ("floats", False, False, [(tile, 384, 384) for tile in tiles._FLOATS]),
        ("floats", False, True, [(tile, 384, 384) for tile in (*tiles._HALVES, *tiles._FLOATS)]),
        ("floats", True, False, [(tile, 384, 384) for tile in tiles._FLOATS_OF_BITS]),
        ("floats", True, True, [(tile, 384, 384) for tile in (*tiles._HALVES_OF_BITS, *tiles._FLOATS_OF_BITS)]),
        *[(kind, False, half, every(tiles._whole_rows)) for kind in ("rows", "floats") for half in (False, True)],
        *[
            (kind, True, half, every(lambda n, _: tiles._whole_rows_of_bits(n)))
            for kind in ("rows", "floats")
            for half in (False, True)
        ],
    ],
)
def test_every_tile_of_the_rules_is_a_candidate(
    kind: str, bits: bool, half: bool, cuts: list[tuple[HopperTile | MmaTile, int, int]]
) -> None:
    assert cuts
    for tile, n, k in cuts:
        assert tile in tune_gpu.candidates(tune_gpu.Site(kind, n, k, bits, half)), tile


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [False, True])
def test_what_the_rules_choose_for_deit_fits(bits: bool, half: bool) -> None:
    """On an H100; a rule that finds nothing leaves the product to tiles for few rows, or to bytes."""
    seen = set()
    for width in (192, 384, 768):
        for m in (197, 32 * 197, 256 * 197):
            for kind, n, k in (
                ("codes", 3 * width, width),
                ("codes", 4 * width, width),
                *[(kind, width, k) for kind in ("rows", "floats") for k in (width, 4 * width)],
            ):
                rule: HopperTile | MmaTile | None
                if kind == "codes":
                    rule = choose_bits(m, n, k, 132) if bits else choose(m, n, k, 132, hopper=True)  # type: ignore[assignment]
                elif kind == "rows":
                    rule = choose_norm_behind(m, n, k, 132, bits)
                else:
                    rule = choose_floats(m, n, k, 132, bits, half)
                site = tune_gpu.Site("planes" if bits and kind == "codes" else kind, n, k, bits, half, permuted=n == 4 * width)
                if rule is not None:
                    assert as_launched(rule, site) in tune_gpu.candidates(site), (site, rule)
                    assert tune_gpu.fits(rule, site, m, 132), (site, rule)
                    seen.add((site.kind, getattr(rule, "piece", 0)))
    pieces = {32} | ({64} if half else set())
    assert {piece for kind, piece in seen if kind == "floats"} - {0} == pieces
    assert {kind for kind, _ in seen} == {"planes" if bits else "codes", "rows", "floats"}


def test_rows_of_float16_begin_at_16_bytes() -> None:
    tile = HopperTile(2, 128, 4, piece=64, slots=1)
    for n, fit in ((384, (True, True)), (380, (True, False)), (382, (False, False))):
        sites = [tune_gpu.Site("floats", n, 384, False, half) for half in (False, True)]
        assert tuple(tune_gpu.fits(tile, site, 256 * 197, 132) for site in sites) == fit


def test_rows_of_wide_tiles_may_stay() -> None:
    """Those of fc2 of DeiT-S, whose codes lie two a byte."""
    site = tune_gpu.Site("floats", 384, 1536, False)
    staying = HopperTile(2, 192, 3, row_stages=3, piece=32, slots=2, overlaps=True, keeps_rows=True)
    found = {tile for tile in tune_gpu.candidates(site) if tune_gpu.fits(tile, site, 256 * 197, 132)}
    assert {staying, replace(staying, keeps_rows=False)} <= found
    packed = with_nibbles(staying, site.k)
    assert packed is not None
    assert packed.defines(site.k)["RESIDENT"] == 1
