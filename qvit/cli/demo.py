"""``qvit demo``: the whole road on scikit-learn's handwritten digits, in a few minutes on a laptop."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from qvit.cli import options
from qvit.cli.results import write_results
from qvit.cli.show import count, progress, show_table
from qvit.errors import InputError
from qvit.report_file import usable_cores

# Two bits with three seeds, since one run in 360 images says little there.
_SEEDS = {4: (0,), 3: (0,), 2: (0, 1, 2)}
_METHODS = ("baseline", "qvit")
_TITLES = {"float": "float", "baseline": "baseline", "qvit": "Q-ViT"}


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the runs and the .qvit files.")] = Path("demo"),
    json: options.Json = None,
) -> None:
    """Train, quantize, freeze and run a small vision transformer on handwritten digits.

    Trains a float ViT, quantizes it at 4, 3 and 2 bits as baseline (LSQ) and as Q-ViT, freezes each to integers, loads the
    file and classifies the 360 validation images with the integers.

    Example:

        qvit demo --json demo_report.json
    """
    if output.exists() and any(output.iterdir()):
        raise InputError(f"The folder {output} is not empty: remove it, or name another one with -o.")
    start = time.perf_counter()
    parent = _train_float(output / "float")
    jobs = [
        (bits, method, seed, output, parent["float_top1"]) for bits in _SEEDS for method in _METHODS for seed in _SEEDS[bits]
    ]
    # Each run is too small for more than one thread, so the cores share the runs.
    with ProcessPoolExecutor(min(usable_cores(), len(jobs)), mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        rows = list(progress(pool.map(_run, *zip(*jobs, strict=True)), len(jobs), "quantizing"))
    rows = [parent, *rows]
    _show(rows, time.perf_counter() - start)
    write_results(json, rows)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _train_float(output: Path) -> dict[str, Any]:
    """Trains the float parent; its row of the report."""
    import torch

    from qvit.training.engine import fit
    from qvit.training.recipe import Recipe

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = Recipe.load("digits_float")
    print("training the float model")
    result = fit(recipe, output)
    torch.set_num_threads(threads)
    return {
        "model": "vit_digits",
        "data": "digits",
        "method": "float",
        "weight_bits": 32,
        "act_bits": 32,
        "seed": recipe.seed,
        "float_top1": result.top1,
        "images": result.images,
        "epochs": result.epochs,
        "train_seconds": result.train_seconds,
        "file_bytes": 4 * sum(p.numel() for p in result.model.parameters()),
    }


def _run(bits: int, method: str, seed: int, output: Path, float_top1: float) -> dict[str, Any]:
    """Quantizes, trains, freezes, saves, loads and evaluates once; its row of the report."""
    import qvit
    from qvit.analyze.agreement import agreement
    from qvit.training.checkpoint import LAST
    from qvit.training.data import evaluation_loader, open_split
    from qvit.training.engine import fit
    from qvit.training.evaluate import evaluate
    from qvit.training.recipe import Recipe

    name = f"w{bits}a{bits}_{method}_{seed}"
    changes = [f"quant.bits={bits}", f"method={method}", f"seed={seed}", f"model.checkpoint={output / 'float' / LAST}"]
    recipe = Recipe.load("digits", changes)
    result = fit(recipe, output / name, progress=False)
    val = open_split(recipe.data, "val")
    path = output / f"{name}.qvit"
    file_bytes = qvit.freeze(result.model, val.classes, {"float_top1": float_top1, "data": "digits"}).save(path)
    runner = qvit.load(path)
    images = list(evaluation_loader(val, runner.model.preprocessing, 120))
    return {
        "model": "vit_digits",
        "data": "digits",
        "method": method,
        "weight_bits": bits,
        "act_bits": bits,
        "seed": seed,
        "float_top1": float_top1,
        "fake_top1": evaluate(result.model, images).top1,
        "integer_top1": evaluate(runner, images).top1,  # type: ignore[arg-type]
        **agreement(result.model, runner.engine, images).to_row(),
        "images": len(val),
        "epochs": result.epochs,
        "train_seconds": result.train_seconds,
        "engine": runner.engine.name,
        "file_bytes": file_bytes,
    }


def _show(rows: list[dict[str, Any]], seconds: float) -> None:
    """The table: one line a method and width, means over seeds."""
    parent, trained = rows[0], rows[1:]
    lines: list[tuple[object, ...]] = [
        ("float", "32/32", 1, f"{parent['float_top1']:.2f}", "", "", count(parent["file_bytes"]), "1.0x", _s(parent))
    ]
    for bits in _SEEDS:
        for method in _METHODS:
            group = [row for row in trained if (row["weight_bits"], row["method"]) == (bits, method)]
            mean = {
                key: fmean(row[key] for row in group)
                for key in ("fake_top1", "integer_top1", "agreement", "file_bytes", "train_seconds")
            }
            lines.append(
                (
                    _TITLES[method],
                    f"{bits}/{bits}",
                    len(group),
                    f"{mean['fake_top1']:.2f}",
                    f"{mean['integer_top1']:.2f}",
                    f"{mean['agreement']:.1f} %",
                    count(mean["file_bytes"]),
                    f"{parent['file_bytes'] / mean['file_bytes']:.1f}x",
                    _s(mean),
                )
            )
    columns = ("method", "bits W/A", "seeds", "top-1", "integer top-1", "agreement", "bytes", "smaller", "training")
    title = f"Digits, {parent['images']} validation images (top-1 in percent, means over seeds), {seconds:.0f} s in all"
    show_table(title, columns, lines)


def _s(row: dict[str, Any]) -> str:
    return f"{row['train_seconds']:.1f} s"
