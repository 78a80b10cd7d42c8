"""``qvit predict``: the most likely classes of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from qvit.cli import options
from qvit.cli.images import at_least_one
from qvit.cli.results import write_results
from qvit.cli.show import progress, show_table
from qvit.errors import InputError


def command(
    file: Annotated[Path, typer.Argument(help="A .qvit file.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    top: Annotated[int, typer.Option("--top", help="Classes to show for each image.")] = 5,
    batch: options.Batch = 32,
    engine: options.Engine = "reference",
    device: options.Device = None,
    json: options.Json = None,
) -> None:
    """Classify images with a frozen model.

    All images are read before anything is printed.

    Example:

        qvit predict deit_small_w4a4.qvit cat.jpg dog.png --top 3
    """
    from qvit.engines import Runner, create_engine
    from qvit.integer.model import IntegerModel
    from qvit.preprocessing import open_image

    at_least_one("--top", top)
    at_least_one("--batch", batch)
    model = IntegerModel.load(file)
    # Pixels take a quarter of normalised floats, so many files fit into memory.
    pixels = []
    for path in progress(images, len(images), "reading"):
        try:
            pixels.append(model.preprocessing.pixels(open_image(path)))
        except InputError:
            raise
        except (OSError, ValueError, MemoryError) as error:
            raise InputError(f"{path} cannot be prepared for the model ({error}): use another image.") from None
    runner = Runner(model, create_engine(model, engine, device))
    parts = range(0, len(pixels), batch)
    logits = [runner(np.stack(pixels[i : i + batch])) for i in progress(parts, len(parts), "classifying")]
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


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [B, classes] -> probabilities [B, classes], float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
