"""Finds the fastest tiles of the CUDA engine's products on the GPU at hand, and writes them for that kind of GPU.

    python benchmarks/tune_gpu.py                                    # writes qvit/engines/cuda/tuned/<gpu>.json
    python benchmarks/tune_gpu.py --models deit_small_patch16_224 --batches 256 64 --minutes 5

For every model, width and batch, product after product: each tile that fits is compiled, the whole forward pass is timed with
it (CUDA graph, images on the GPU), and the fastest stays if it gains more than noise. All kernels are compiled first, as many
at once as there are cores. Models have random weights. Choices that are in the file already are kept for other shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qvit.architecture import VitArchitecture
from qvit.bench.on_device import milliseconds
from qvit.bench.run import make_random_model
from qvit.engines.cuda import CudaEngine
from qvit.engines.cuda.compiler import compile_kernel
from qvit.engines.cuda.device import Gpu
from qvit.engines.cuda.layout import chunks
from qvit.engines.cuda.tiles import HopperTile, MmaTile
from qvit.engines.cuda.tuned import FILES, Choice, Tuned, file_name, tuned_for, write
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.report_file import versions

_GAIN = 0.997  # of the time, below which a change is no noise


@dataclass(frozen=True)
class Site:
    """A product that tiles are tried for; see `qvit.engines.cuda.tuned.Choice`."""

    kind: str
    n: int
    k: int
    bits: bool


def sites(model: IntegerModel, planes: bool) -> list[Site]:
    """Every product of a ViT's blocks, the largest first, and its patch embedding."""
    a = _architecture(model)
    width, hidden = a.embed_dim, a.mlp_hidden
    kind = "planes" if planes else "codes"
    return [
        Site(kind, hidden, width, planes),
        Site("rows", width, hidden, planes),
        Site(kind, 3 * width, width, planes),
        Site("rows", width, width, planes),
        Site("floats", width, hidden, planes),
        Site("floats", width, width, planes),
        Site("floats", width, a.patch_features, False),
    ]


def _architecture(model: IntegerModel) -> VitArchitecture:
    assert isinstance(model.architecture, VitArchitecture)
    return model.architecture


def candidates(site: Site) -> list[MmaTile | HopperTile | None]:
    """Tiles to try, whether they fit or not; ``None``: planes as bytes, or LayerNorm in a launch of its own."""
    floats = site.kind in ("rows", "floats")
    tiles: list[MmaTile | HopperTile | None] = [None] if site.kind in ("rows", "planes") else []
    if site.kind == "codes":
        tiles += [MmaTile(128, 128, 64, 4, 2, 2), MmaTile(128, 64, 64, 4, 4, 1)]
    if floats:
        tiles += _whole_rows(site)
    if site.kind == "rows":
        return tiles
    for groups in (2, 3):
        for bn in (64, 128, 192, *([384] if floats else [])):
            base = HopperTile(groups, bn, 4, bits=site.bits)
            if not floats:
                tiles += [replace(base, stages=stages) for stages in ((1, 2, 3) if site.bits else (3, 4, 6, 8))]
                continue
            rings = [(32, 1), (32, 2), (32, 3), (32, 4), (16, 1), (64, 2)]
            rings = [(piece, slots) for piece, slots in rings if bn % (piece * slots) == 0]
            streams = [(2, 3)] if site.bits else [(3, 2), (3, 3), (4, 3), (4, 4)]
            tiles += [
                replace(
                    base,
                    stages=stages,
                    row_stages=row_stages,
                    piece=piece,
                    slots=slots,
                    overlaps=overlaps,
                    keeps_rows=bn < 192 or site.bits,
                )
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
    registers = tile.bn // (1 if tile.overlaps else 2) + 40  # of a thread: its sums, and what it works with
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

    def choice(self, site: Site, tile: MmaTile | HopperTile | None) -> Choice:
        """A site's tile as a choice."""
        patches = site.kind == "floats" and site.k == self.model.architecture.patch_features and not site.bits
        return Choice(site.kind, self._rows[patches], site.n, site.k, site.bits, tile)

    def kernels(self, choices: Sequence[Choice]) -> set[Any]:
        """What a forward pass with these choices compiles."""
        self.gpu.tuned = Tuned(choices)
        return {(launch.kernel, tuple(sorted(launch.defines.items()))) for launch in self.engine.launches(self.batch)}

    def time(self, choices: Sequence[Choice]) -> float:
        """Milliseconds of a forward pass; infinite where a kernel does not run."""
        self.gpu.tuned = Tuned(choices)
        self.engine._plans.clear()
        try:
            return milliseconds(lambda: self.engine.forward(self.images), self.gpu.device)
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
    tuners = []
    with tempfile.TemporaryDirectory(prefix="qvit-tune-") as scratch:
        for name in options.models:
            for bits in options.bits:
                file = Path(scratch) / f"{name}_{bits}.qvit"
                make_random_model(name, bits, file)
                tuners += [(name, bits, Tuner(gpu, IntegerModel.load(file), batch)) for batch in options.batches]
    kernels: set[Any] = set()
    for *_, tuner in tuners:
        for _, choices in tuner.options():
            for choice in choices:
                kernels |= tuner.kernels([choice])
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, [(kernel, defines, gpu.architecture) for kernel, defines in sorted(kernels)]))
    print(f"{len(kernels)} kernels compiled, {end - time.perf_counter():.0f} s left", flush=True)
    for name, bits, tuner in tuners:
        if time.perf_counter() > end:
            print(f"note: {name} W{bits}A{bits} is left out: no time is left.", file=sys.stderr)
            continue
        best: list[Choice] = []
        first = fastest = tuner.time(best)
        for site, choices in tuner.options():
            times = [(tuner.time([*best, choice]), choice) for choice in choices]
            took, choice = min(times, key=lambda timed: timed[0])
            gained = took < _GAIN * fastest
            print(f"  {site}: {took:.3f} ms, {choice.tile}{'' if gained else ', no gain'}", flush=True)
            if gained:
                fastest, best = took, [*best, choice]
        known |= {_place(choice): choice for choice in best}
        print(f"{name} W{bits}A{bits} batch {tuner.batch}: {first:.3f} -> {fastest:.3f} ms", flush=True)
        write(path, gpu.name, sorted(known.values(), key=_place), {"command": "python benchmarks/tune_gpu.py", **versions()})


def _place(choice: Choice) -> tuple[Any, ...]:
    return choice.kind, choice.n, choice.k, choice.bits, choice.m


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    models = [f"deit_{size}_patch16_224" for size in ("small", "tiny", "base")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models, help="timm's names of ViTs")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 32])
    parser.add_argument("--minutes", type=float, default=20.0, help="no model begins later than that")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--output", type=Path, help="file to write; by default that of the GPU, in the package")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
