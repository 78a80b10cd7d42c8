"""Parity of the CPU engine with the reference engine on real images: codes at every quantization point, logits, top-1.

    python benchmarks/cpu_parity.py --checkpoint vit_small_patch14_224_imagenette.safetensors --train A.tar --val V.tar \
        --json benchmarks/results/cpu-parity-epyc-zen4-2cores.json

The models are the ViT-S/14 teacher quantized by calibration alone at 8, 4, 3 and 2 bits. At 2 bits that classifies badly and
amplifies every difference, which makes it the hardest case.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qvit
from qvit.batches import PixelBatches
from qvit.cli.images import as_tensors, spaced
from qvit.engines import create_engine
from qvit.report_file import write_report
from qvit.sources import ImageSource, open_source
from qvit.training.models import build_model
from qvit.training.sections import DataSection, ModelSection

MODEL = {"name": "vit_small_patch16_224", "args": {"patch_size": 14, "num_classes": 10}}
DATA = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 1.0}
_CALIBRATION_IMAGES = 16


def main() -> None:
    options = _options()
    train, val = open_source(options.train, "train"), open_source(options.val, "val")
    rows = []
    for bits in options.bits:
        rows.append(_row(bits, options, train, val))
        print(rows[-1], flush=True)
        if options.json:
            command = [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
            write_report(options.json, rows, ["python", "benchmarks/cpu_parity.py", *command])


def _row(bits: int, options: argparse.Namespace, train: ImageSource, val: ImageSource) -> dict[str, Any]:
    model, preprocessing = build_model(ModelSection(**MODEL, checkpoint=options.checkpoint), DataSection(**DATA))
    student = qvit.quantize(model.eval(), bits=bits, preprocessing=preprocessing)
    drawn = spaced(len(train), _CALIBRATION_IMAGES)
    calibration = PixelBatches(train, preprocessing, _CALIBRATION_IMAGES, indices=drawn)
    qvit.calibrate(student, as_tensors(calibration, preprocessing), images=_CALIBRATION_IMAGES)
    frozen = qvit.freeze(student, val.classes)
    engine, reference = create_engine(frozen, "cpu"), create_engine(frozen, "reference")
    equal: dict[str, int] = {}
    total: dict[str, int] = {}
    logits: list[tuple[np.ndarray, np.ndarray]] = []
    labels: list[np.ndarray] = []
    for pixels, targets in PixelBatches(val, preprocessing, options.batch, indices=spaced(len(val), options.images)):
        expected: dict[str, torch.Tensor] = {}
        codes: dict[str, np.ndarray] = {}
        wanted = reference.forward(torch.from_numpy(preprocessing.normalise(pixels)), expected).numpy()
        logits.append((wanted, np.asarray(engine.forward(pixels, codes))))
        labels.append(targets)
        for point, values in expected.items():
            equal[point] = equal.get(point, 0) + int((values.numpy() == codes[point]).sum())
            total[point] = total.get(point, 0) + values.numel()
    wanted, got = (np.concatenate(part) for part in zip(*logits, strict=True))
    classes = np.concatenate(labels)
    worst = min(total, key=lambda point: equal[point] / total[point])
    return {
        "model": frozen.name,
        "data": Path(options.val).name,
        "method": "calibration",
        "weight_bits": bits,
        "act_bits": bits,
        "engine": engine.name,
        "isa": engine.isa,
        "images": len(classes),
        "codes": sum(total.values()),
        "codes_that_differ": sum(total.values()) - sum(equal.values()),
        "codes_agreement": 100 * equal[worst] / total[worst],
        "worst_point": worst,
        "logits_difference": float(np.abs(wanted - got).max() / wanted.std()),
        "agreement": 100 * float((wanted.argmax(1) == got.argmax(1)).mean()),
        "integer_top1": 100 * float((got.argmax(1) == classes).mean()),
        "reference_top1": 100 * float((wanted.argmax(1) == classes).mean()),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="state dict of the float ViT-S/14")
    parser.add_argument("--train", required=True, help="tar file or folder of calibration images")
    parser.add_argument("--val", required=True, help="tar file or folder of images to compare on")
    parser.add_argument("--images", type=int, default=500, help="to compare on")
    parser.add_argument("--batch", type=int, default=10, help="images at once")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--json", type=Path, help="result file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
