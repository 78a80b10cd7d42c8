"""What each lever beyond the paper's method does on the digits, at 2 bits: means over seeds that chose nothing.

    python benchmarks/digits_levers.py --work FOLDER --seeds 100 101 102 --json benchmarks/results/digits-levers.json

Every variant is the recipe `digits` with `COMMON` and its own changes, from one float model (recipe `digits_float`, trained
first). On 360 images top-1 moves by 0.28 an image, so each row also has the mean cross-entropy of the validation labels. One
CPU thread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn import functional as F

from qvit.report_file import write_report
from qvit.training.checkpoint import LAST
from qvit.training.data import evaluation_loader, open_split
from qvit.training.engine import fit
from qvit.training.recipe import Recipe

COMMON = ["quant.bits=2", "schedule.epochs=5", "eval_every=5"]
HALF = "quant.overrides={'blocks.*.weight': {offset: half_step}}"
STATSQ = "quant.weight_quantizer=statsq"
ALL_BLOCKS = ["distill.feature=1", "distill.feature_blocks=all"]
VARIANTS: dict[str, list[str]] = {
    "Q-ViT (learned steps)": [],
    "learned steps, odd half steps": [HALF],
    "StatsQ": [STATSQ],
    "annealing": ["anneal.share=0.1"],
    "StatsQ, annealing": [STATSQ, "anneal.share=0.1"],
    "oscillation 0.01": ["oscillation.weight=0.01"],
    "oscillation 0.1": ["oscillation.weight=0.1"],
    "activations first, 1 of 5 epochs": ["activations_first.epochs=1"],
    "features throughout": ["distill.feature=1"],
    "soft targets alone": ["distill.label=0", "distill.hard=0", "distill.soft=1"],
    "soft targets, features": ["distill.label=0", "distill.hard=0", "distill.soft=1", "distill.feature=1"],
    "features of all blocks": ALL_BLOCKS,
    "cascade, 2 of 5 epochs at 4 bits": ["cascade.share=0.4"],
    "features of all blocks, weight 10": [*ALL_BLOCKS, "distill.feature=10"],
    "features of all blocks, weight 30": [*ALL_BLOCKS, "distill.feature=30"],
    "features of all blocks, weight 30, half the learning rate": [*ALL_BLOCKS, "distill.feature=30", "optim.lr=1.0e-3"],
    "the same, cascade": [*ALL_BLOCKS, "distill.feature=30", "optim.lr=1.0e-3", "cascade.share=0.4"],
}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    parent = options.work / "float"
    if not (parent / LAST).exists():
        fit(Recipe.load("digits_float"), parent, progress=False)
    names = [name for name in VARIANTS if not options.only or name in options.only]
    rows: list[dict[str, Any]] = []
    # Seed by seed, so that a run that is cut short has compared all variants on the same ones.
    for seed in options.seeds:
        for name in names:
            rows.append(_run(name, seed, options.work, parent / LAST))
            print(rows[-1], flush=True)
            if options.json:
                write_report(options.json, rows, ["python", "benchmarks/digits_levers.py", *_public(sys.argv[1:])])
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        top1, loss = [row["fake_top1"] for row in own], [row["val_loss"] for row in own]
        spread = stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else 0.0
        print(f"{name:36} {fmean(top1):6.2f} (standard error {spread:.2f})  loss {fmean(loss):.4f}  {len(own)} seeds")


def _run(name: str, seed: int, work: Path, parent: Path) -> dict[str, Any]:
    output = work / f"{list(VARIANTS).index(name)}_{seed}"
    recipe = Recipe.load("digits", [*COMMON, f"seed={seed}", f"model.checkpoint={parent}", *VARIANTS[name]])
    result = fit(recipe, output, progress=False, resume=True)
    val = open_split(recipe.data, "val")
    model: Any = result.model
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(images), labels, reduction="sum").item()
            for images, labels in evaluation_loader(val, model.qvit.preprocessing, 120)
        ]
    return {
        "variant": name,
        "changes": " ".join([*COMMON, *VARIANTS[name]]),
        "model": "vit_digits",
        "data": "digits",
        "weight_bits": 2,
        "act_bits": 2,
        "seed": seed,
        "fake_top1": result.top1,
        "val_loss": sum(losses) / len(val),
        "images": len(val),
        "epochs": result.epochs,
        "train_seconds": result.train_seconds,
    }


def _public(arguments: list[str]) -> list[str]:
    """Arguments with files named without their folders."""
    return [Path(a).name if "/" in a else a for a in arguments]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; finished ones in it are not run again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
