"""What the training benchmarks share: the methods that are compared, random images, command lines without folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from qvit.training.models import build_model
from qvit.training.recipe import Recipe

# What the paper trains with, in its own weights: the rows of its ablation differ in ``method`` alone.
_PAPER = ["distill.label=0.5", "distill.hard=0.5", "distill.soft=0", "distill.dgd=1.0"]
METHODS: dict[str, list[str]] = {
    "float": ["method=float"],
    "baseline": ["method=baseline", *_PAPER],
    "irm": ["method=irm", *_PAPER],
    "dgd": ["method=dgd", *_PAPER],
    "qvit": ["method=qvit", *_PAPER],
    # What the recipe says, which holds the best that was measured.
    "ours": [],
}
PAPER_METHODS = ("baseline", "irm", "dgd", "qvit")
TITLES = {
    "float": "float",
    "baseline": "baseline (LSQ)",
    "irm": "+IRM",
    "dgd": "+DGD",
    "qvit": "Q-ViT (both)",
    "ours": "ours",
}


def public(arguments: Sequence[str]) -> list[str]:
    """A command line without the folders of this machine."""

    def without_folder(part: str) -> str:
        key, equals, value = part.rpartition("=")
        return key + equals + (Path(value).name if "/" in value else value)

    return [without_folder(argument) for argument in arguments]


def short(value: Any) -> Any:
    """A list of paths, or one, without its folders; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(short(item)) for item in value)
    return Path(value).name if isinstance(value, (str, Path)) and "/" in str(value) else value


def model_overrides(name: str | None, arguments: str | None) -> list[str]:
    """The recipe's overrides for ``--model`` and ``--model-args``; none where the recipe's own model is kept."""
    if name is None:
        return []
    values = {"name": name, "args": yaml.safe_load(arguments) if arguments else {}}
    return [f"model={yaml.safe_dump(values, default_flow_style=True, width=10**6).strip()}"]


def write_random_images(folder: Path, recipe: Recipe, count: int) -> Path:
    """``folder/<class>/<n>.jpg``: noise of the size and for as many classes as the recipe's model takes; at least ``count``."""
    model, preprocessing = build_model(recipe.model, recipe.data)
    channels, height, width = preprocessing.input_size
    rng = np.random.default_rng(0)
    for number in range(max(count, model.num_classes)):
        label = number % model.num_classes
        pixels = rng.integers(0, 256, (height, width, 3) if channels == 3 else (height, width), dtype=np.uint8)
        place = folder / f"{label:05d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.jpg")
    return folder
