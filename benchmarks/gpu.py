"""The CUDA engine beside PyTorch and torchao on one GPU: speed, memory, and how near its kernels come to what the GPU can do.

    pip install '.[train,bench]'
    python benchmarks/gpu.py --minutes 20 --json gpu.json

    python benchmarks/gpu.py --tables benchmarks/results/gpu-float16-h100.json        # prints the tables again

How the committed files were made: `docs/performance-gpu.md`.

Measures what the GPU can do, then DeiT-S at batch 256 beside torch.compile and where its time goes, DeiT-S at batch 1, DeiT-T
and DeiT-B beside torch.compile, DeiT-S at all widths beside the other peers, at last where the time goes at 2 bits, multiplied
as planes of bits and as bytes; in this order, as far as `--minutes` go: what would not fit any more is left out, and said.
Widths of one model, with a residual stream of float16 and of float32, and their peers take turns in one comparison, so what a
peer compiles is compiled once. Nothing else may run meanwhile. Models have random weights. Images lie on the GPU, uint8 for
the engine and normalised floats for its peers; a call ends when the GPU is done.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qvit.bench.ceilings import Ceilings, measure_ceilings
from qvit.bench.peers import peers_on
from qvit.bench.run import Settings, compare, make_random_model
from qvit.errors import QvitError
from qvit.report_file import write_report
from qvit.spec import RESIDUALS

TINY, SMALL, BASE = (f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
_MAKERS, _THREADS_OF_A_MAKER = 8, "2"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # the second has the last word where it is set


@dataclass(frozen=True)
class Job:
    """Widths of one model that are measured together.

    Attributes:
        model: timm's name.
        batch: images a call.
        bits: of weights and activations.
        peers: to compare with, the most important first.
        kernels: whether the engine's kernels are timed: at the first width behind the comparison, at others behind all; with
            the first type of the residual stream.
        floats: whether float32 images are timed too, at the first width.
    """

    model: str
    batch: int
    bits: tuple[int, ...] = (4, 2)
    peers: tuple[str, ...] = ("compile",)
    kernels: bool = False
    floats: bool = False


JOBS = (
    Job(SMALL, 256, kernels=True, floats=True),
    Job(SMALL, 1, kernels=True),
    Job(TINY, 256),
    Job(BASE, 256),
    Job(SMALL, 256, (4, 2, 3, 8), ("torchao", "eager-bf16", "tf32", "eager")),
)


@dataclass(frozen=True, order=True)
class Variant:
    """What a file of random weights is made of: a model, its width, and the type of its residual stream."""

    model: str
    bits: int
    residual: str


class Clock:
    """The time that is left, and what a comparison will take, from those that were."""

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes
        self._each = 0.0  # seconds that a contestant took at most

    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()

    def affordable(self, own: int, peers: Sequence[str]) -> list[str] | None:
        """Those peers, from the first on, that there is time for; nothing where there is none for the engine beside one."""
        count = int(self.left() / self._each) - own if self._each else len(peers)
        return list(peers[:count]) if count >= min(1, len(peers)) and self.left() > 0 else None

    def took(self, seconds: float, contestants: int) -> None:
        """Remembers a comparison."""
        self._each = max(self._each, seconds / contestants)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints and writes; returns the rows."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    if options.tables:
        rows = json.loads(options.tables.read_text())["rows"]
        print(_tables(rows))
        return rows
    rows = []
    with tempfile.TemporaryDirectory(prefix="qvit-bench-") as scratch:
        for row in _measured(options, Path(scratch)):
            rows.append(row)
            print(_line(row), flush=True)
            if options.json:  # after every row, so that a run that is cut short leaves what it measured
                write_report(options.json, rows, ["python", "benchmarks/gpu.py", *arguments])
    print(_tables(rows))
    return rows


def _measured(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    clock = Clock(options.minutes)
    jobs = [job for job in JOBS if job.model in options.models and job.batch in options.batches]
    if options.vs is not None:  # the last job would be the first once more
        jobs = [job for job in jobs if job is not JOBS[-1]]
    variants = {
        job: [Variant(job.model, bits, residual) for residual in options.residual for bits in options.bits or job.bits]
        for job in jobs
    }
    files = _files(sorted({one for of_job in variants.values() for one in of_job}), scratch)
    ceilings = apart(_ceilings, options.device)
    if ceilings is not None:
        yield {"part": "ceilings", "device": _name(options.device), **ceilings.to_row()}
    later: list[tuple[Job, Variant, Path, bool]] = []
    for job in jobs:
        made = [variant for variant in variants[job] if variant in files]
        if not made:
            continue
        paths = [files[variant] for variant in made]
        names = list(job.peers if options.vs is None else options.vs)
        own = len(paths) + job.floats
        affordable = clock.affordable(own, names)
        if affordable is None:
            _note(f"{_title(job)} is left out: {max(0.0, clock.left()):.0f} s are left.")
            continue
        if affordable != names:
            _note(f"{_title(job)} beside {' and '.join(names[len(affordable) :])} is left out: {clock.left():.0f} s are left.")
        before = time.perf_counter()
        yield from _compared(job, paths, affordable, options, scratch)
        clock.took(time.perf_counter() - before, own + len(affordable))
        if job.kernels and ceilings is not None:
            first, *others = [variant for variant in made if variant.residual == made[0].residual]
            yield from _timed(job, first, files[first], True, ceilings, options, clock)
            later += [(job, variant, files[variant], True) for variant in others]
            later += [(job, variant, files[variant], False) for variant in (first, *others) if variant.bits == 2]
    for job, variant, path, one_bit in later:
        assert ceilings is not None
        yield from _timed(job, variant, path, one_bit, ceilings, options, clock)


def _timed(
    job: Job, variant: Variant, path: Path, one_bit: bool, ceilings: Ceilings, options: argparse.Namespace, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Rows of the kernels of a forward pass, if there is time; two-bit codes as planes of bits where ``one_bit``."""
    if clock.left() <= 0:
        return
    facts = {"part": "kernels", "model": job.model, "weight_bits": variant.bits, "act_bits": variant.bits, "batch": job.batch}
    facts["residual"] = variant.residual
    facts |= {} if one_bit else {"codes": "bytes"}
    for row in apart(_kernels, path, job.batch, ceilings, options.device, one_bit) or []:
        yield {**facts, "engine": "cuda", **row}


def _compared(
    job: Job, paths: list[Path], names: list[str], options: argparse.Namespace, scratch: Path
) -> Iterator[dict[str, Any]]:
    folder = scratch / job.model
    folder.mkdir(exist_ok=True)
    settings = Settings(
        engine="cuda",
        batches=(job.batch,),
        device=options.device,
        float_images=job.floats,
        rounds=options.rounds,
        seconds=0.2,
        starts=1,
    )
    try:
        yield from compare(paths, peers_on("cuda", names), settings, folder, _quietly, _note)
    except QvitError as error:
        _note(f"{_title(job)} is left out: {error}")


def _files(wanted: Sequence[Variant], scratch: Path) -> dict[Variant, Path]:
    """The integers with random weights, made several at once; without those that cannot be made."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, _THREADS_OF_A_MAKER))

    def make(of: Variant) -> Path | None:
        path = scratch / f"{of.model}_{of.residual}_w{of.bits}a{of.bits}.qvit"
        try:
            make_random_model(of.model, of.bits, path, of.residual)
        except QvitError as error:
            _note(str(error))
            return None
        return path

    with ThreadPoolExecutor(_MAKERS) as pool:
        paths = list(pool.map(make, wanted))
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return {key: path for key, path in zip(wanted, paths, strict=True) if path is not None}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, whose memory is free afterwards; nothing, and a note, where that fails."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except Exception as error:  # a GPU that has failed raises whatever it likes; the rest of the table is worth having
        _note(f"{function.__name__.lstrip('_')} are left out: {' '.join(f'{type(error).__name__}: {error}'.split())}")
        return None


def _ceilings(device: str) -> Ceilings:
    return measure_ceilings(torch.device(device))


def _kernels(file: Path, batch: int, ceilings: Ceilings, device: str, one_bit: bool) -> list[dict[str, Any]]:
    from qvit.bench.kernels import kernel_rows
    from qvit.engines.cuda import CudaEngine
    from qvit.integer.model import IntegerModel

    return kernel_rows(CudaEngine(IntegerModel.load(file), device, one_bit), batch, ceilings)


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else device


def _quietly(items: Iterable[Any], _total: int, _what: str) -> Iterator[Any]:
    yield from items


def _note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr, flush=True)


def _title(job: Job) -> str:
    return f"{job.model} at batch {job.batch}"


def _line(row: dict[str, Any]) -> str:
    if row.get("part") == "ceilings":
        return (
            f"{row['device']}: copies {row['gb_per_s']:.0f} GB/s, bf16 {row['bf16_tflops']:.0f} TFLOP/s, "
            f"int8 {row['int8_tops']:.0f} TOP/s"
        )
    head = f"{_head(row)} batch {row['batch']}"
    if row.get("part") == "kernels":
        return (
            f"{head}: {row['launches']} x {row['kernel']} {row['shape']}: {row['ms']:.3f} ms ({row['percent']:.0f} %), "
            f"{row['tops']:.0f} TOP/s, {row['gb_per_s']:.0f} GB/s, {row['share_of_bound']:.2f} of its {row['bound']} bound"
        )
    ratio = f", ratio {row['ratio_to_peer']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})" if "peer" in row else ""
    return (
        f"{head}, {row['input']} images: {row.get('peer', 'qvit')} {row['ms_median']:.3f} ms ({row['ms_p10']:.3f} to "
        f"{row['ms_p90']:.3f}), {row['images_per_s']:.0f} images/s, {row.get('gpu_mb', 0):.0f} MB, "
        f"start {row['start_seconds']:.1f} s{ratio}"
    )


def _head(row: dict[str, Any]) -> str:
    stream = ", float16" if row.get("residual") == "float16" else ""
    return f"{row['model']} W{row['weight_bits']}A{row['act_bits']}{' as bytes' if row.get('codes') == 'bytes' else ''}{stream}"


def _tables(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result file as Markdown: comparisons, then kernels, then ceilings."""
    lines = ["| | batch | | images | ms (10 to 90 %) | images/s | ratio (10 to 90 %) | GPU memory, MB |", "|" + "---|" * 8]
    for row in rows:
        if "part" in row:
            continue
        ratio = f"{row['ratio_to_peer']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})" if "peer" in row else ""
        lines.append(
            f"| {_head(row)} | {row['batch']} "
            f"| {row['title'] if 'peer' in row else '**qvit**'} | {row['input']} "
            f"| {row['ms_median']:.3f} ({row['ms_p10']:.3f} to {row['ms_p90']:.3f}) | {row['images_per_s']:.0f} | {ratio} "
            f"| {row.get('gpu_mb', 0):.0f} |"
        )
    kernels = [row for row in rows if row.get("part") == "kernels"]
    if kernels:
        lines += ["", "| | batch | kernel | launches | ms | share | TOP/s | GB/s | of its bound |", "|" + "---|" * 9]
    for row in kernels:
        lines.append(
            f"| {_head(row)} | {row['batch']} | {row['kernel']} {row['shape']} "
            f"| {row['launches']} | {row['ms']:.3f} | {row['percent']:.1f} % | {row['tops']:.0f} | {row['gb_per_s']:.0f} "
            f"| {row['share_of_bound']:.2f} ({row['bound']}) |"
        )
    return "\n".join([*lines, "", *(_line(row) for row in rows if row.get("part") == "ceilings")])


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[TINY, SMALL, BASE], choices=[TINY, SMALL, BASE])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 256], choices=[1, 256])
    parser.add_argument("--bits", nargs="+", type=int, help="widths of every model; by default 4 and 2, and at last 3 and 8")
    parser.add_argument(
        "--residual", nargs="+", default=["float16", "float32"], choices=RESIDUALS, help="types of the residual stream"
    )
    parser.add_argument("--vs", nargs="*", help="peers of every model; by default torch.compile, at last the others")
    parser.add_argument("--minutes", type=float, default=6.0, help="the whole run, about")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--tables", type=Path, help="result file to print as tables, instead of measuring")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
