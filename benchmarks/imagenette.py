"""A trained ViT-S/14 on real images without any training: IRM inserted, and eight bits from calibration alone.

    python benchmarks/imagenette.py --teacher vit_small_patch14_224_imagenette.safetensors \
        --train imagenette224-train-0.tar imagenette224-train-1.tar --val imagenette224-val.tar \
        --json benchmarks/results/imagenette-h100.json

Steps (all by default, in this order): `rectify`, IRM inserted and initialised, nothing quantized; `w8a8`, calibration alone,
without IRM, evaluated twice: the fake-quantized graph in float32 and the frozen integers on the reference engine. Training is
measured by `benchmarks/ablation.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import qvit
from qvit.analyze.agreement import agreement
from qvit.engines.reference import ReferenceEngine
from qvit.layers.points import float_mode
from qvit.report_file import write_report
from qvit.spec import ModelSpec
from qvit.training.data import evaluation_loader, open_split
from qvit.training.evaluate import evaluate
from qvit.training.models import build_model
from qvit.training.recipe import Recipe

STEPS = ("rectify", "w8a8")


def main() -> None:
    options = _options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe.load(
        "imagenette",
        [
            f"model.checkpoint={options.teacher}",
            f"data.train=[{', '.join(options.train)}]",
            f"data.val={options.val}",
            f"data.workers={options.workers}",
        ],
    )
    teacher, preprocessing = build_model(recipe.model, recipe.data)
    teacher.to(device).eval()
    train, val = open_split(recipe.data, "train"), open_split(recipe.data, "val")
    images = list(evaluation_loader(val, preprocessing, 100, options.workers))
    few = list(evaluation_loader(train, preprocessing, 32, indices=range(0, len(train), len(train) // 64)))
    float_top1 = evaluate(teacher, images, device).top1
    base = {"model": "vit_small_patch14_224", "data": "imagenette224-val", "float_top1": float_top1, "images": len(val)}
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append({**base, **row})
        print(rows[-1], flush=True)
        if options.json:  # after every row, so that a run that is cut short leaves what it measured
            write_report(options.json, rows, ["python", "benchmarks/imagenette.py", *_public(sys.argv[1:])])

    for step in options.steps:
        if step == "rectify":
            student = qvit.quantize(teacher, bits=4, preprocessing=preprocessing)
            qvit.calibrate(student, few, images=64)
            with float_mode(student):
                report(
                    {
                        "method": "float with IRM",
                        "weight_bits": 32,
                        "act_bits": 32,
                        "fake_top1": evaluate(student.eval(), images, device).top1,
                    }
                )
        else:
            student = qvit.quantize(teacher, spec=ModelSpec.of_bits(8, rectify=False), preprocessing=preprocessing)
            qvit.calibrate(student, few, images=64)
            report({"method": "calibration alone", **_measure(student, images, device, options.runs / "w8a8.qvit")})


def _measure(student: torch.nn.Module, images: Sequence[Any], device: str, path: Path) -> dict[str, Any]:
    """Freezes a student; top-1 of both forms, their agreement and the file's size."""
    model = qvit.freeze(student.to(device).eval())
    engine = ReferenceEngine(model, device)
    return {
        "weight_bits": student.qvit.spec.weight_bits,
        "act_bits": student.qvit.spec.act_bits,
        "fake_top1": evaluate(student, images, device).top1,
        "integer_top1": evaluate(engine.forward, images, device).top1,
        **agreement(student, engine, images).to_row(),
        "engine": engine.name,
        "file_bytes": model.save(path),
    }


def _public(arguments: Sequence[str]) -> list[str]:
    """The command line without the folders of this machine."""
    return [Path(argument).name if "/" in argument else argument for argument in arguments]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="state dict of the float ViT-S/14")
    parser.add_argument("--train", required=True, nargs="+", help="tar files or folders of training images")
    parser.add_argument("--val", required=True, help="tar file or folder of validation images")
    parser.add_argument("--workers", type=int, default=12, help="loader processes")
    parser.add_argument("--runs", type=Path, default=Path("runs/imagenette"), help="folder of the frozen file")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--json", type=Path, help="result file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
