"""Finds the fastest tiles of the CUDA engine's products on the GPU at hand, and writes them for that kind of GPU.

    python benchmarks/tune_gpu.py                                    # writes qvit/engines/cuda/tuned/<gpu>.json
    python benchmarks/tune_gpu.py --models deit_small_patch16_224 --batches 256 64 --minutes 5

For every model, width and batch, product after product: each tile that fits is compiled, as many at once as there are cores,
the whole forward pass is timed with it (CUDA graph, images on the GPU), and the fastest stays if it gains more than noise. A
tile with other logits than those of the rules is left out, and said. When `--minutes` are over, what has been found so far is
kept: the file is written after every product. Models have random weights. Choices that are in the file already are kept for
other shapes, and for the other type of the residual stream: `--residual float16` is measured, and found, apart from float32.
Hundreds of tiles fit DeiT-S at 4 bits and batch 256, and thousands all that is tuned by default: begin with
one model.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qvit.architecture import VitArchitecture
from qvit.bench.on_device import milliseconds
from qvit.bench.run import make_random_model
from qvit.engines.cuda import CudaEngine
from qvit.engines.cuda.compiler import compile_kernel
from qvit.engines.cuda.constants import COLUMN_PAD
from qvit.engines.cuda.device import Gpu
from qvit.engines.cuda.layout import chunks, has_rest, pad
from qvit.engines.cuda.tiles import HopperTile, MmaTile
from qvit.engines.cuda.tuned import FILES, Choice, Tuned, file_name, tuned_for, write
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.report_file import usable_cores, versions
from qvit.spec import RESIDUALS

_GAIN = 0.997  # of the time, below which a change is no noise
_HOPELESS = 1.04  # times the fastest, in a few calls: not worth more of them


@dataclass(frozen=True)
class Site:
    """A product that tiles are tried for; see `qvit.engines.cuda.tuned.Choice`.

    Attributes:
        kind, n, k, bits, half: see there.
        permuted: columns are in the order of tiles, as those in front of GELU, so that tiles divide what is padded to.
    """

    kind: str
    n: int
    k: int
    bits: bool
    half: bool = False
    permuted: bool = field(default=False, compare=False)


def sites(model: IntegerModel, planes: bool) -> list[Site]:
    """Every product of a ViT's blocks, the largest first, and its patch embedding."""
    a = _architecture(model)
    width, hidden = a.embed_dim, a.mlp_hidden
    kind, half = "planes" if planes else "codes", model.residual == "float16"
    of_codes = planes and half  # what a product of bytes writes is the same for both types of the stream
    found = [
        Site(kind, hidden, width, planes, of_codes, permuted=True),
        Site("rows", width, hidden, planes, half),
        Site(kind, 3 * width, width, planes, of_codes),
        Site("rows", width, width, planes, half),
        Site("floats", width, hidden, planes, half),
        Site("floats", width, width, planes, half),
        Site("floats", width, a.patch_features, False, half and model.norm_pre is None),
    ]
    return list(dict.fromkeys(found))  # a patch embedding may have the shape of fc2 or proj


def _architecture(model: IntegerModel) -> VitArchitecture:
    assert isinstance(model.architecture, VitArchitecture)
    return model.architecture


def candidates(site: Site) -> list[MmaTile | HopperTile | None]:
    """Tiles to try, whether they fit or not; ``None``: planes as bytes, or LayerNorm in a launch of its own."""
    floats = site.kind in ("rows", "floats")
    tiles: list[MmaTile | HopperTile | None] = [None] if site.kind in ("rows", "planes") else []
    if site.kind == "codes":
        tiles += [MmaTile(128, 128, 64, 4, 2, 2), MmaTile(128, 64, 64, 4, 4, 1)]
        tiles += [MmaTile(64, 64, 64, 4, 4, 1), MmaTile(32, 64, 64, 4, 2, 1)]
    if floats:
        tiles += _whole_rows(site)
    if site.kind == "rows":
        return tiles
    for groups in (2, 3, 4) if site.kind == "planes" else (2, 3):
        for bn in (64, 128, 192, *([384] if floats else [])):
            base = HopperTile(groups, bn, 4, bits=site.bits)
            if not floats:
                kinds = (True, False) if site.permuted else (False,)  # nothing is made twice in front of heads
                cuts = [(stages, twice) for stages in (1, 2, 3, 4) for twice in kinds] if site.bits else []
                cuts = cuts or [(stages, False) for stages in (3, 4, 6, 8)]
                tiles += [replace(base, stages=stages, twice=twice) for stages, twice in cuts]
                continue
            rings = [(32, 1), (32, 2), (32, 3), (32, 4), (16, 1), (64, 2), *([(64, 1)] if site.half or site.bits else [])]
            rings = [(piece, slots) for piece, slots in rings if bn % (piece * slots) == 0]
            streams = [(2, 3), (4, 3)] if site.bits else [(3, 2), (3, 3), (4, 3), (4, 4), *([(5, 4)] if site.half else [])]
            stays = [True] if bn < 128 or site.bits else [False, True] if bn <= 192 else [False]
            tiles += [
                replace(
                    base,
                    stages=stages,
                    row_stages=row_stages,
                    piece=piece,
                    slots=slots,
                    overlaps=overlaps,
                    keeps_rows=keeps_rows,
                    twice=twice,
                    holds=holds,
                )
                for twice in ((False, True) if site.bits else (False,))
                for holds in ((False, True) if site.bits else (False,))
                for keeps_rows in stays
                for stages, row_stages in streams
                for piece, slots in rings
                for overlaps in ((False, True) if bn <= 192 else (False,))
            ]
    return tiles


def _whole_rows(site: Site) -> list[HopperTile]:
    """Tiles as wide as a row, which need no room for floats: b stays, or streams as far ahead as fits."""
    if site.n not in (64, 128, 192, 384):
        return []
    all_of_b = chunks(site.k) * (2 if site.n > 256 else 1)
    streams = [(1, 3)] if site.bits else [(all_of_b, 2), (all_of_b, 3), (4, 3), (4, 4), (5, 4)]
    base = HopperTile(2, site.n, 4, direct=True, bits=site.bits, keeps_rows=site.bits)
    return [
        replace(base, stages=stages, row_stages=row_stages, ahead=ahead, early=early)
        for stages, row_stages in dict.fromkeys(streams)
        for ahead in (4, 6, 8)
        for early in (False, True)
    ]


def fits(tile: MmaTile | HopperTile | None, site: Site, m: int, multiprocessors: int) -> bool:
    """Whether a product may be cut so."""
    if not isinstance(tile, HopperTile):
        return True
    if pad(site.n, tile.bn) > pad(site.n, COLUMN_PAD):  # no weights lie there
        return False
    if site.permuted and COLUMN_PAD % tile.bn:
        return False
    if tile.piece and site.n % (8 if site.half else 4):  # rows begin at a multiple of 16 bytes
        return False
    if tile.piece and tile.holds and tile.twice and has_rest(site.k):  # weights do not lie twice there
        return False
    registers = tile.bn // (1 if tile.overlaps else 2) + 40  # of a thread: its sums, and what it works with
    registers += pad(site.k, 256) // 32 if tile.holds else 0
    room = 65536 // (128 * (tile.groups + 1)) * (tile.groups + 1) // tile.groups
    return tile.suits(m, site.n, site.k, multiprocessors) and registers <= min(room, 240)


class Tuner:
    """One model at one batch size."""

    def __init__(self, gpu: Gpu, model: IntegerModel, batch: int) -> None:
        self.gpu, self.model, self.batch = gpu, model, batch
        self.engine = CudaEngine(model, gpu)
        size = model.preprocessing.input_size
        self.images = torch.randint(0, 256, (batch, *size), dtype=torch.uint8, device=gpu.device)
        a = _architecture(model)
        self._rows = {True: batch * a.num_patches, False: batch * a.num_tokens}
        self._expected: torch.Tensor | None = None

    def choice(self, site: Site, tile: MmaTile | HopperTile | None) -> Choice:
        """A site's tile as a choice."""
        patches = site.kind == "floats" and site.k == self.model.architecture.patch_features and not site.bits
        return Choice(site.kind, self._rows[patches], site.n, site.k, site.bits, tile, site.half)

    def kernels(self, choices: Sequence[Choice]) -> set[Any]:
        """What a forward pass with these choices compiles."""
        self.gpu.tuned = Tuned(choices)
        return {(launch.kernel, tuple(sorted(launch.defines.items()))) for launch in self.engine.launches(self.batch)}

    def time(self, choices: Sequence[Choice], fastest: float = float("inf")) -> float:
        """Milliseconds of a forward pass: of a few calls where it is far from the fastest, infinite where it is not right.

        The first call, without choices, gives the logits that all others must have.
        """
        self.gpu.tuned = Tuned(choices)
        self.engine._plans.clear()

        def call() -> torch.Tensor:
            return self.engine.forward(self.images)

        try:
            logits = call()
            self._expected = logits if self._expected is None else self._expected
            if not torch.equal(logits, self._expected):
                print(f"note: other logits with {choices[-1]}", file=sys.stderr)
                return float("inf")
            soon = milliseconds(call, self.gpu.device, calls=3, rounds=2)
            return soon if soon > _HOPELESS * fastest else milliseconds(call, self.gpu.device)
        except UnsupportedModelError as error:
            print(f"note: {error}", file=sys.stderr)
            return float("inf")

    def options(self) -> Iterator[tuple[Site, list[Choice]]]:
        """Sites, with their choices."""
        planes = self.model.block_bits() == (2, 2) and self.gpu.hopper
        for site in sites(self.model, planes):
            tiles = [tile for tile in candidates(site) if self.gpu.hopper or not isinstance(tile, HopperTile)]
            choices = [self.choice(site, tile) for tile in tiles]
            fitting = [one for one in choices if fits(one.tile, site, one.m, self.gpu.multiprocessors)]
            if fitting:
                yield site, fitting


def compiled(job: tuple[str, Any, str]) -> None:
    """Compiles a kernel into the cache; a kernel that does not compile says so where it is used."""
    kernel, defines, architecture = job
    with contextlib.suppress(UnsupportedModelError):
        compile_kernel(kernel, dict(defines), architecture)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes, prints, writes."""
    options = _options(arguments)
    gpu = Gpu(options.device)
    known = {_place(choice): choice for choice in tuned_for(gpu.name).all()}
    path = options.output or FILES / f"{file_name(gpu.name)}.json"
    end = time.perf_counter() + 60 * options.minutes

    def keep(choices: Sequence[Choice]) -> None:
        known.update({_place(choice): choice for choice in choices})
        if known:
            measured = {"command": "python benchmarks/tune_gpu.py", "residual": options.residual, **versions()}
            write(path, gpu.name, sorted(known.values(), key=_place), measured)

    with _compilers() as pool, tempfile.TemporaryDirectory(prefix="qvit-tune-") as scratch:
        for name, bits, batch in ((n, b, c) for n in options.models for b in options.bits for c in options.batches):
            title = f"{name} W{bits}A{bits} batch {batch}"
            if time.perf_counter() > end:
                print(f"note: {title} is left out: no time is left.", file=sys.stderr)
                continue
            file = Path(scratch) / f"{name}_{bits}.qvit"
            if not file.exists():
                make_random_model(name, bits, file, options.residual)
            tuner = Tuner(gpu, IntegerModel.load(file), batch)
            first, fastest = tune(tuner, title, pool, end, keep)
            print(f"{title}: {first:.3f} -> {fastest:.3f} ms", flush=True)


@contextlib.contextmanager
def _compilers() -> Iterator[Executor]:
    """A process a core. Not forked: when they start, this one has threads and the GPU."""
    pool = ProcessPoolExecutor(usable_cores(), multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def tune(tuner: Tuner, title: str, pool: Executor, end: float, keep: Callable[[Sequence[Choice]], None]) -> tuple[float, float]:
    """Product after product, until the time is over.

    Args:
        tuner: of one model and batch size.
        title: of it, for notes.
        pool: compiles.
        end: of the time, on `time.perf_counter`'s clock.
        keep: called with the choices so far, after each product.

    Returns:
        Milliseconds of a forward pass before and after.
    """

    def make(kernels: set[Any]) -> None:
        jobs = [pool.submit(compiled, (*kernel, tuner.gpu.architecture)) for kernel in sorted(kernels)]
        wait(jobs, timeout=max(0.0, end - time.perf_counter()))

    best: list[Choice] = []
    make(tuner.kernels(best))
    first = fastest = tuner.time(best)
    for site, choices in tuner.options():
        make(set().union(*(tuner.kernels([*best, choice]) for choice in choices)))
        before, tried, chosen = fastest, 0, None
        for choice in choices:
            if time.perf_counter() > end:
                break
            took = tuner.time([*best, choice], fastest)
            tried += 1
            if took < min(fastest, _GAIN * before):
                fastest, chosen = took, choice
        said = "no gain" if chosen is None else f"{fastest:.3f} ms with {chosen.tile}"
        print(f"  {site}: {said}; {tried} of {len(choices)} tiles tried", flush=True)
        best += [] if chosen is None else [chosen]
        keep(best)
        if time.perf_counter() > end:
            print(f"note: {title} is not tuned to its end: no time is left.", file=sys.stderr)
            break
    return first, fastest


def _place(choice: Choice) -> tuple[Any, ...]:
    return choice.kind, choice.n, choice.k, choice.bits, choice.half, choice.m


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    models = [f"deit_{size}_patch16_224" for size in ("small", "tiny", "base")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models, help="timm's names of ViTs")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--residual", default="float32", choices=RESIDUALS, help="type of the residual stream")
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 32])
    parser.add_argument("--minutes", type=float, default=20.0, help="the whole run, about")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--output", type=Path, help="file to write; by default that of the GPU, in the package")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
