"""Mixed widths against one width for all: the same bytes, or the same bytes and bit operations, trained alike.

    python benchmarks/mixed.py --data digits --bits 3 --seeds 100 101 102 103 104 --workers 0 \
        --json benchmarks/results/mixed-digits-epyc-2cores.json
    python benchmarks/mixed.py --data imagenette --bits 3 --seeds 0 1 2 --json benchmarks/results/mixed-imagenette-h100.json

For every seed: a student with all blocks at `--bits`; one whose widths are chosen among 2, 3, 4 and 8 so that its file has no
more bytes and an image takes no more bit operations; and one that is held to the bytes alone, which leaves attention at 8 bits.
Sensitivities are measured anew for every seed, on its calibration images. Training, freezing and evaluation are those of
`benchmarks/ablation.py` (the last epoch's model, integers on all validation images); the data folder is described there. The
budget is what the uniform model's file would have by `qvit.analyze.file_size`, with everything beside the weights as in the
mixed one's; the rows have the real files' sizes. Finished seeds in the result file are not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from experiments import DATA_SETS, Bench, Experiment
from harness import public
from torch.nn import functional as F

from qvit.analyze.budget import file_template
from qvit.analyze.cost import model_cost
from qvit.analyze.file_size import file_bytes
from qvit.analyze.products import products_of, specs_of
from qvit.analyze.units import units_of
from qvit.cli.show import show_table
from qvit.engines.reference import ReferenceEngine
from qvit.errors import QvitError
from qvit.integer.model import IntegerModel
from qvit.report_file import read_report, write_report
from qvit.training.data import evaluation_loader, open_split
from qvit.training.mixed import expected_provenance
from qvit.training.models import build_model
from qvit.training.recipe import Recipe
from qvit.training.setup import calibration_batches

UNIFORM, BOTH, BYTES = "uniform", "mixed: bytes and bit operations", "mixed: bytes alone"
COMPARED = ("integer_top1", "val_loss")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = _options(arguments)
    command = ["python", "benchmarks/mixed.py", *public(sys.argv[1:] if arguments is None else list(arguments))]
    rows = read_report(options.json)["rows"] if options.json.exists() else []
    bench = Bench(options.data_dir, options.runs, options.workers, options.agreement_images)
    parent = Experiment(options.data, "float", 32, 0, tuple(options.set_float))
    if DATA_SETS[options.data].float_recipe and not bench.float_checkpoint(options.data).exists():
        rows.append({"comparison": "float", **bench.run(parent)})
        write_report(options.json, rows, command)
    for seed in options.seeds:
        uniform = Experiment(options.data, options.variant, options.bits, seed, tuple(options.set))
        size, operations = uniform_cost(bench.recipe(uniform))
        measured = f"quant.sensitivities={options.runs / f'sensitivities-{options.data}-seed{seed}.json'}"
        limit = [f"quant.budget_mb={size / 1e6}", measured]
        for name, changes in (
            (UNIFORM, []),
            (BOTH, [*limit, f"quant.budget_bops={operations}"]),
            (BYTES, limit),
        ):
            if any((row["comparison"], row["seed"], row["weight_bits"]) == (name, seed, options.bits) for row in rows):
                continue
            rows.append({"comparison": name, **run(bench, uniform, tuple(changes))})
            write_report(options.json, rows, command)  # after every run, so that one that is cut short leaves its rows
    _show(rows)
    return rows


def uniform_cost(recipe: Recipe) -> tuple[int, int]:
    """Bytes of the file, as a budget counts them, and bit operations of the model that the recipe describes."""
    assert recipe.model is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocessing = build_model(recipe.model, recipe.data)
    source = open_split(recipe.data, "train")
    spec = recipe.model_spec()
    # The keys of a budget are in the mixed run's recipe, and so in its file.
    provenance = expected_provenance(recipe.override("quant.budget_mb=0.123456", "quant.budget_bops=123456789012"))
    batches = calibration_batches(recipe, source, preprocessing)
    template = file_template(
        model.to(device), batches, spec, preprocessing, source.classes, provenance, recipe.quant.calibration_images
    )
    specs = specs_of(products_of(template.architecture), spec)
    return file_bytes(template, specs), model_cost(template.architecture, specs).bit_operations


def run(bench: Bench, uniform: Experiment, changes: tuple[str, ...]) -> dict[str, Any]:
    """The row of one run: the uniform experiment with changes."""
    experiment = Experiment(uniform.data, uniform.variant, uniform.bits, uniform.seed, (*uniform.overrides, *changes))
    row = bench.run(experiment)
    model = IntegerModel.load(bench.runs / f"{experiment.name()}.qvit")
    cost = model_cost(model.architecture, model.specs)
    return {
        **row,
        "val_loss": _val_loss(model, bench.recipe(experiment)),
        "bit_operations": cost.bit_operations,
        "packed_bytes": cost.weight_bytes,
        "widths": _widths(model),
    }


def _widths(model: IntegerModel) -> str:
    """``blocks.0 qkv 3 attention 2 ..``, block after block."""
    words: list[str] = []
    block = ""
    for unit in units_of(products_of(model.architecture)):
        name, _, last = unit.name.rsplit(".", 2)
        words += ([] if name == block else [name]) + [last, str(model.specs[unit.points[0]].bits)]
        block = name
    return " ".join(words)


def _val_loss(model: IntegerModel, recipe: Recipe) -> float:
    """Mean cross-entropy of the integers' logits with the validation labels: finer than top-1, which moves image by image."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = ReferenceEngine(model, device)
    source = open_split(recipe.data, "val")
    with torch.no_grad():
        losses = [
            F.cross_entropy(engine.forward(images.to(device)), labels.to(device), reduction="sum").item()
            for images, labels in evaluation_loader(source, model.preprocessing, 100)
        ]
    return sum(losses) / len(source)


def differences(rows: Sequence[dict[str, Any]], name: str, key: str) -> list[float]:
    """Of every seed that has both rows: the value of ``name`` less that of the uniform model."""
    uniform = {row["seed"]: row[key] for row in rows if row["comparison"] == UNIFORM}
    return [row[key] - uniform[row["seed"]] for row in rows if row["comparison"] == name and row["seed"] in uniform]


def _show(rows: list[dict[str, Any]]) -> None:
    lines = []
    for name in (UNIFORM, BOTH, BYTES):
        own = [row for row in rows if row["comparison"] == name]
        if not own:
            continue
        cells = [name, len(own)]
        for key in COMPARED:
            paired = differences(rows, name, key)
            error = f" ± {stdev(paired) / len(paired) ** 0.5:.3f}" if len(paired) > 1 else ""
            cells += [f"{fmean(row[key] for row in own):.3f}", "" if name == UNIFORM else f"{fmean(paired):+.3f}{error}"]
        cells += [f"{fmean(row[key] for row in own):,.0f}" for key in ("file_bytes", "bit_operations")]
        lines.append(cells)
    columns = ["widths", "seeds", "top-1", "to uniform", "loss", "to uniform", "file, bytes", "bit operations"]
    show_table("Means over seeds; differences are paired by seed, with their standard errors", columns, lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="imagenette", choices=list(DATA_SETS))
    parser.add_argument("--bits", type=int, default=3, help="of the uniform model")
    parser.add_argument("--variant", default="ours", help="a variant of benchmarks/harness.py; ours: the recipe as it is")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], help="key=value that changes the recipe")
    parser.add_argument("--set-float", nargs="+", default=[], help="key=value that changes the float model's recipe")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode images")
    parser.add_argument("--agreement-images", type=int, default=200, help="images compared code by code")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("QVIT_DATA", "../shared/data")))
    parser.add_argument("--runs", type=Path, default=Path("runs/mixed"), help="folder of runs and frozen files")
    parser.add_argument("--json", type=Path, required=True, help="result file to write or to go on with")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except QvitError as error:
        sys.exit(f"error: {error}")
