"""The CPU engine beside its peers, all that docs/performance-cpu.md quotes: speed, memory, cold start, and where the time goes.

    pip install '.[train,bench]'
    python benchmarks/cpu.py --ceiling 233 --json benchmarks/results/cpu-epyc-zen4-2cores.json

    python benchmarks/cpu.py --tables benchmarks/results/cpu-epyc-zen4-2cores.json       # prints the tables of the docs

Takes about a quarter of an hour on two cores; nothing else may run meanwhile. Models have random weights. `--parts` takes some
of: `small`, DeiT-S at 4 and 2 bits; `widths`, at 3 and 8; `torch`, against PyTorch; `others`, DeiT-T and DeiT-B; `profile`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvit.analyze.cost import model_cost
from qvit.bench.peers import peer_named
from qvit.bench.run import Settings, compare, make_random_model
from qvit.engines import create_engine
from qvit.integer.model import IntegerModel
from qvit.report_file import usable_cores, write_report

_PROFILED_CALLS = 60


@dataclass(frozen=True)
class Part:
    """Models that are measured the same way.

    Attributes:
        models: timm's names.
        bits: of weights and activations.
        peers: to compare with.
        batches: images a call.
        all_threads: whether only all cores are used, or one core as well.
    """

    models: tuple[str, ...]
    bits: tuple[int, ...]
    peers: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    all_threads: bool = False


SMALL = "deit_small_patch16_224"
PARTS = {
    "small": Part((SMALL,), (4, 2), ("openvino", "openvino-bf16", "onnxruntime"), (1, 8)),
    "widths": Part((SMALL,), (3, 8), ("openvino",)),
    "torch": Part((SMALL,), (4,), ("torch", "torch-bf16"), all_threads=True),
    "others": Part(("deit_tiny_patch16_224", "deit_base_patch16_224"), (4, 2), ("openvino", "openvino-bf16")),
}


def main() -> None:
    options = _options()
    if options.tables:
        print(_tables(json.loads(options.tables.read_text())["rows"]))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qvit-bench-") as scratch:
        for name in options.parts:
            measured = _profiles if name == "profile" else _compared
            for row in measured(name, Path(scratch), options):
                rows.append(row)
                print(_line(row), flush=True)
                if options.json:  # after every row, so that a run that is cut short leaves what it measured
                    write_report(options.json, rows, ["python", "benchmarks/cpu.py", *sys.argv[1:]])


def _compared(name: str, scratch: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    part, cores = PARTS[name], usable_cores()
    threads = [cores] if part.all_threads else sorted({1, cores})
    for model in part.models:
        folder = scratch / name / model
        folder.mkdir(parents=True)
        for bits in part.bits:
            settings = Settings("cpu", part.batches, threads, options.rounds)
            peers = [peer_named(peer) for peer in part.peers]
            yield from compare(_file(model, bits, scratch), peers, settings, folder, _quietly, _note)


def _file(model: str, bits: int, scratch: Path) -> Path:
    """The integers with random weights, made once."""
    path = scratch / f"{model}_{bits}.qvit"
    if not path.exists():
        make_random_model(model, bits, path)
    return path


def _profiles(_name: str, scratch: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Share of each phase of DeiT-S in the time of one thread at batch 1, and the rate of the linear layers' products."""
    os.environ["QVIT_PROFILE"] = "1"
    for bits in (4, 2, 8):
        model = IntegerModel.load(_file(SMALL, bits, scratch))
        engine = create_engine(model, "cpu", threads=1)
        images = np.random.default_rng(0).standard_normal((1, *model.preprocessing.input_size), dtype=np.float32)
        for _ in range(5):
            engine.run(images)
        engine.profile()
        for _ in range(_PROFILED_CALLS):
            engine.run(images)
        seconds = {phase: value / _PROFILED_CALLS for phase, value in engine.profile().items()}
        total = sum(seconds.values())
        products = model_cost(model.architecture, model.specs).products
        gmacs = sum(p.multiplies for p in products if p.name.startswith("blocks.") and p.parameters) / 1e9
        facts = {"model": model.name, "weight_bits": bits, "act_bits": bits, "engine": "cpu", "batch": 1, "threads": 1}
        facts["isa"] = engine.isa
        for phase, value in seconds.items():
            row = {**facts, "phase": phase, "ms": 1e3 * value, "percent": 100 * value / total}
            if phase == "integer products":
                row |= {"kernel": engine.kernels["fc1"], "gmac_per_s": gmacs / value}
                if options.ceiling:
                    row["of_vpdpbusd_ceiling"] = gmacs / value / options.ceiling
            yield row
    del os.environ["QVIT_PROFILE"]


def _quietly(items: Iterable[Any], _total: int, _what: str) -> Iterator[Any]:
    yield from items


def _note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr, flush=True)


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']} W{row['weight_bits']}A{row['act_bits']} batch {row['batch']} threads {row['threads']}"
    if "phase" in row:
        rate = f", {row['gmac_per_s']:.0f} GMAC/s" if "gmac_per_s" in row else ""
        return f"{head}: {row['phase']} {row['ms']:.2f} ms, {row['percent']:.1f} %{rate}"
    ratio = f", ratio {row['ratio_to_peer']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})" if "peer" in row else ""
    return (
        f"{head}: {row.get('peer', 'qvit')} {row['ms_median']:.2f} ms ({row['ms_p10']:.2f} to {row['ms_p90']:.2f}), "
        f"{row['images_per_s']:.1f} images/s, {row.get('rss_mb', 0):.0f} MB, start {row['start_seconds']:.2f} s{ratio}"
    )


def _tables(rows: list[dict[str, Any]]) -> str:
    """The rows of a result file as Markdown: a comparison for each batch size and number of threads, then the phases."""
    lines = [
        "| | batch | threads | | ms (10 to 90 %) | images/s | ratio (10 to 90 %) | memory, MB | start, s | file, MB |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        if "phase" in row:
            continue
        own = "peer" not in row
        lines.append(
            f"| {row['model']} W{row['weight_bits']}A{row['act_bits']} | {row['batch']} | {row['threads']} "
            f"| {'**qvit**' if own else row['title']} | {row['ms_median']:.2f} ({row['ms_p10']:.2f} to {row['ms_p90']:.2f}) "
            f"| {row['images_per_s']:.1f} "
            + ("| " if own else f"| {row['ratio_to_peer']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f}) ")
            + f"| {row.get('rss_mb', 0):.0f} | {row['start_seconds']:.2f} | {row['file_bytes'] / 1e6:.1f} |"
        )
    profiles = [row for row in rows if "phase" in row]
    widths = list(dict.fromkeys(row["weight_bits"] for row in profiles))
    lines += ["", "| phase | " + " | ".join(f"W{bits}A{bits}, ms" for bits in widths) + " |", "|---|" + "---|" * len(widths)]
    for phase in dict.fromkeys(row["phase"] for row in profiles):
        of_phase = [row for row in profiles if row["phase"] == phase]
        lines.append(f"| {phase} | " + " | ".join(f"{row['ms']:.2f} ({row['percent']:.0f} %)" for row in of_phase) + " |")
    rates = [
        f"{row['gmac_per_s']:.0f} ({row['kernel']}, {row.get('of_vpdpbusd_ceiling', 0):.2f})"
        for row in profiles
        if "kernel" in row
    ]
    lines.append("| GMAC/s of the linear layers (kernel, share of vpdpbusd's ceiling) | " + " | ".join(rates) + " |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "profile"], choices=[*PARTS, "profile"])
    parser.add_argument("--rounds", type=int, default=21, help="turns of each")
    parser.add_argument(
        "--ceiling", type=float, help="GMAC/s of vpdpbusd on the registers of one core, as benchmarks/cpu_gemm.cpp prints it"
    )
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--tables", type=Path, help="result file to print as tables, instead of measuring")
    return parser.parse_args()


if __name__ == "__main__":
    main()
