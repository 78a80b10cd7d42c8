"""A small run with its teacher, and what a page must hold, for the tests of `qvit report`."""

from __future__ import annotations

from pathlib import Path

from qvit.sources import DigitsSource
from qvit.training.engine import fit
from qvit.training.recipe import Recipe

FIGURES = ("results", "training", "distributions", "distance", "maps", "similarity", "sensitivity")


def few_digits(folder: Path) -> Path:
    """Images of four training and three validation digits a class, in class folders."""
    for split, each in (("train", 4), ("val", 3)):
        source = DigitsSource(split)  # type: ignore[arg-type]
        for index, label in enumerate(source.labels):
            target = folder / split / str(label)
            target.mkdir(parents=True, exist_ok=True)
            if len(list(target.iterdir())) < each:
                source[index][0].save(target / f"{index}.png")
    return folder


def train_run(folder: Path, images: Path, weights: Path, method: str = "qvit") -> Path:
    """A quantized run of two epochs, from the float checkpoint ``weights`` of the fixture `checkpoints`."""
    model = "{name: vit_tiny_patch16_224, args: {img_size: 8, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 12, "
    changes = [
        f"model={model}num_heads: 3, depth: 1}}, checkpoint: {weights}}}",
        f"data.train={images}",
        "schedule={epochs: 2}",
        "quant={bits: 2, calibration_images: 16}",
        "batch_size=20",
        "log_every=1",
        "eval_every=1",
        f"method={method}",
    ]
    fit(Recipe.load("digits", changes), folder, progress=False)
    return folder


def expected_panels(blocks: int, baseline: bool) -> set[str]:
    """Identifiers of all panels of a full report of a model with IRM, latency apart."""
    stages = ("teacher", "before", "after", "codes")
    return {
        "results-bytes-0",
        *(f"training-{name}" for name in ("top1", "loss", "label", "hard", "dgd", "lr")),
        *(f"entropy-{name}" for name in "qk"),
        *(f"distributions-{block}-{name}-{stage}" for block in range(blocks) for name in "qk" for stage in stages),
        *(f"distance-{name}" for name in ("means", "teacher", "student", *(["baseline"] if baseline else []))),
        *(f"similarity-{name}" for name in "qk"),
        *(f"sensitivity-{kind}-{state}" for kind in ("parts", "layers") for state in ("before", "after")),
    }
