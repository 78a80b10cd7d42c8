"""Do quantized features transfer? Nearest neighbours on CIFAR-10, which the model has never seen.

    python benchmarks/transfer_knn.py --model runs/ablation/imagenette-ours-w4a4-seed0-*.qvit \\
        --json benchmarks/results/transfer-h100.json

The features of an image are what the classification head reads: the pooled output of the last LayerNorm. CIFAR-10's images are
resized to the model's 224 x 224 (bicubic, Pillow's) and normalised as the model's own. An image of the test set is given the
class for which its 20 nearest training images vote, by cosine similarity, each with the weight exp(similarity / 0.07), as DINO
is evaluated (Caron et al. 2021); a plain majority is reported as well. Rows: the float teacher, and each frozen file, whose
features come from its integers on the reference engine.

`--train-images` and `--test-images` take evenly spaced images, the same number of every class.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiments import DATA_SETS, Bench
from harness import public
from torch.nn import functional as F

from qvit.cli.images import spaced
from qvit.cli.show import show_table
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError, QvitError
from qvit.integer.model import IntegerModel
from qvit.preprocessing import Preprocessing
from qvit.report_file import write_report
from qvit.sources import open_source
from qvit.training.device_data import AsStored, Normaliser
from qvit.training.models import build_model
from qvit.training.pixels import PixelStore, load_pixels
from qvit.training.recipe import Recipe
from qvit.training.resample import resized_crops

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the votes
_ROWS = 1000  # test images compared with all training images at once

Features = Callable[[torch.Tensor], torch.Tensor]


def knn_top1(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, classes: int
) -> tuple[float, float]:
    """Top-1 in percent of nearest neighbours: by weighted vote, and by majority (of classes with as many votes, the nearer).

    Args:
        train, test: features [n, C] and [m, C].
        train_labels, test_labels: class indices [n] and [m].
        classes: how many there are.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    neighbours = min(NEIGHBOURS, len(train))
    right = [0, 0]
    for first in range(0, len(test), _ROWS):
        similarity, index = (test[first : first + _ROWS] @ train.t()).topk(neighbours, dim=1)
        votes = F.one_hot(train_labels[index], classes).to(train.dtype)
        weighted = (votes * (similarity / TEMPERATURE).exp()[..., None]).sum(1)
        # Less than a vote in all, so it only decides between equals.
        majority = (votes * (1 + (similarity + 1) / (4 * neighbours))[..., None]).sum(1)
        labels = test_labels[first : first + _ROWS]
        for kind, score in enumerate((weighted, majority)):
            right[kind] += int((score.argmax(1) == labels).sum())
    return 100 * right[0] / len(test), 100 * right[1] / len(test)


class Images:
    """CIFAR-10, or a part of it, on the device.

    Args:
        location: tar file or folder.
        counts: images of the training and the test set; all where ``None``.
        device: where to keep them.
        workers: processes that decode.
    """

    def __init__(self, location: Path, counts: tuple[int | None, int | None], device: torch.device, workers: int) -> None:
        self.sets: dict[str, PixelStore] = {}
        for split, count in zip(("train", "val"), counts, strict=True):
            source = open_source(location, "train" if split == "train" else "val")
            indices = None if count is None else spaced(len(source), count)
            self.sets[split] = load_pixels(source, AsStored(3), device, workers, indices, what=split, progress=True)
            self.classes = len(source.classes)

    def features(self, split: str, model: Features, preprocessing: Preprocessing, batch: int) -> torch.Tensor:
        """Features [n, C] of the images, resized to what the model takes."""
        store = self.sets[split]
        device = store.pixels.device
        normalise = Normaliser(preprocessing, device)
        height, width = store.pixels.shape[2:]
        found = []
        for first in range(0, len(store), batch):
            pixels = store.pixels[first : first + batch]
            boxes = torch.tensor([[0, 0, height, width]], device=device).expand(len(pixels), 4)
            flips = torch.zeros(len(pixels), dtype=torch.bool, device=device)
            resized = resized_crops(pixels, boxes, flips, preprocessing.input_size[1:], "bicubic")  # type: ignore[arg-type]
            found.append(model(normalise(resized)).float())
        return torch.cat(found)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = _options(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(options.data_dir, options.runs, options.workers)
    images = Images(bench.located("cifar10.tar"), (options.train_images, options.test_images), device, options.workers)
    rows: list[dict[str, Any]] = []

    def measure(facts: dict[str, Any], model: Features, preprocessing: Preprocessing) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            train, test = (images.features(split, model, preprocessing, options.batch) for split in ("train", "val"))
        labels = images.sets["train"].labels, images.sets["val"].labels
        top1, majority = knn_top1(train, labels[0], test, labels[1], images.classes)
        row = {
            **facts,
            "data": "cifar10 (upscaled)",
            "neighbours": NEIGHBOURS,
            "knn_top1": top1,
            "knn_top1_majority": majority,
            "train_images": len(train),
            "images": len(test),
            "seconds": time.perf_counter() - start,
        }
        if rows:
            row |= {"peer": "float teacher", "difference": top1 - rows[0]["knn_top1"]}
        rows.append(row)
        if options.json:
            write_report(options.json, rows, ["python", "benchmarks/transfer_knn.py", *options.command])

    measure(*_teacher(options, device))
    for path in options.model:
        measure(*_frozen(path, device))
    _show(rows)
    return rows


def _teacher(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Features, Preprocessing]:
    data = DATA_SETS["imagenette"]
    checkpoint = options.teacher or options.data_dir / (data.teacher or "")
    recipe = Recipe.load(data.recipe, [f"model.checkpoint={checkpoint}", *options.set])
    model, preprocessing = build_model(recipe.model, recipe.data)  # type: ignore[arg-type]
    model.to(device).eval()
    facts = {"model": recipe.model.name if recipe.model else None, "method": "float", "weight_bits": 32, "act_bits": 32}
    return (
        facts | {"file": checkpoint.name},
        lambda x: model.forward_head(model.forward_features(x), pre_logits=True),
        preprocessing,
    )


def _frozen(path: Path, device: torch.device) -> tuple[dict[str, Any], Features, Preprocessing]:
    model = IntegerModel.load(path)
    engine = ReferenceEngine(model, device)
    weight_bits, act_bits = model.block_bits()
    facts = {"model": model.name, "method": "integers", "weight_bits": weight_bits, "act_bits": act_bits, "file": path.name}
    return facts | {"engine": engine.name}, engine.features, model.preprocessing


def _show(rows: list[dict[str, Any]]) -> None:
    lines = [
        (
            row["file"],
            f"{row['weight_bits']}/{row['act_bits']}",
            f"{row['knn_top1']:.2f}",
            f"{row['knn_top1_majority']:.2f}",
            f"{row['difference']:+.2f}" if "difference" in row else "",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    title = f"{NEIGHBOURS} nearest neighbours on CIFAR-10: {rows[0]['train_images']} training, {rows[0]['images']} test images"
    show_table(title, ("features of", "bits", "top-1, weighted", "majority", "against float", "seconds"), lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", type=Path, default=[], help="frozen .qvit files")
    parser.add_argument("--teacher", type=Path, help="float weights; by default the Imagenette teacher of the data folder")
    parser.add_argument("--set", nargs="+", default=[], help="key=value that changes the recipe that describes the teacher")
    parser.add_argument("--train-images", type=int, help="training images, all by default")
    parser.add_argument("--test-images", type=int, help="test images, all by default")
    parser.add_argument("--batch", type=int, default=250, help="images at a time")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode images")
    parser.add_argument("--device", help="cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("QVIT_DATA", "../shared/data")), help="folder of the data"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that cifar10.tar.xz is unpacked into")
    parser.add_argument("--json", type=Path, help="result file to write")
    options = parser.parse_args(arguments)
    options.command = public(sys.argv[1:] if arguments is None else arguments)
    for name in ("train_images", "test_images", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for path in options.model:
        if not path.exists():
            raise InputError(f"There is no {path}: freeze a model first.")
    return options


if __name__ == "__main__":
    try:
        main()
    except QvitError as error:
        sys.exit(f"error: {error}")
