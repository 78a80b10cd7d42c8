"""``qvit predict``: the most likely classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from qvit.batches import in_batches, map_ahead, prepare
from qvit.cli import options
from qvit.cli.engines import open_runner
from qvit.cli.images import at_least_one, workers_of
from qvit.cli.results import write_results
from qvit.cli.show import progress, show_table
from qvit.errors import InputError
from qvit.preprocessing import open_image
from qvit.sample import SAMPLE


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="A .qvit file and image files; without a .qvit file, the model that comes with qvit.",
            metavar="[FILE] IMAGE...",
        ),
    ],
    top: Annotated[int, typer.Option("--top", help="Classes to show for each image.")] = 5,
    batch: options.Batch = 32,
    workers: options.Workers = None,
    engine: options.Engine = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = None,
) -> None:
    """Classify images with a frozen model.

    Images are read while others are computed. Nothing is printed before all are done.

    Example:

        qvit predict deit_small_w4a4.qvit cat.jpg dog.png --top 3

        qvit predict church.jpg
    """
    file, images = _model_and_images(paths)
    at_least_one("--top", top)
    at_least_one("--batch", batch)
    readers = workers_of(workers)
    runner = open_runner(file, engine, device, threads)
    model = runner.model

    def pixels(path: Path) -> np.ndarray:
        return prepare(model.preprocessing, open_image(path), path)

    shown = progress(map_ahead(pixels, images, readers, ahead=2 * batch), len(images), "classifying")
    logits = [runner(np.stack(part)) for part in in_batches(shown, batch)]
    probabilities = softmax(np.concatenate(logits))  # type: ignore[arg-type]
    rows = [
        {"model": model.name, "image": str(path), "rank": rank + 1, "class": model.classes[i], "probability": float(values[i])}
        for path, values in zip(images, probabilities, strict=True)
        for rank, i in enumerate(np.argsort(-values, kind="stable")[:top])
    ]
    show_table(
        f"{model.name}, {runner.engine.name} engine",
        ["image", "class", "probability"],
        [(row["image"] if row["rank"] == 1 else "", row["class"], f"{100 * row['probability']:.2f} %") for row in rows],
        left=2,
    )
    write_results(json, rows)


def _model_and_images(paths: Sequence[Path]) -> tuple[Path, Sequence[Path]]:
    """The first path where it is a frozen file, else the sample model; and the others."""
    file, images = (paths[0], paths[1:]) if paths[0].suffix == ".qvit" else (SAMPLE, paths)
    if not images:
        raise InputError(f"There is no image to classify: name one behind {file}.")
    return file, images


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [B, classes] -> probabilities [B, classes], float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
