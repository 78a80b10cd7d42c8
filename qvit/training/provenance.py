"""What a frozen file takes over from the checkpoint that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvit.training.checkpoint import Metadata


def provenance_of(metadata: Metadata) -> dict[str, Any]:
    """What a frozen file says about where it comes from: accuracies in percent, on what data, recipe, library versions."""
    metrics = dict(metadata.metrics)
    recipe = without_folders(metadata.recipe)
    data = recipe.get("data") or {}
    facts = {
        "float_top1": metrics.get("float_top1"),
        "fake_top1": metrics.get("fake_top1", metrics.get("top1")),
        "images": metrics.get("images"),
        "data": data.get("val") or data.get("train"),
        "epochs": metadata.epochs + int(metrics.get("first_stage_epochs", 0)),  # of both stages of a cascade
        "method": recipe.get("method"),
    }
    return {
        **{key: value for key, value in facts.items() if value is not None},
        "metrics": metrics,
        "recipe": recipe,
        "versions": dict(metadata.versions),
    }


def without_folders(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the files in it named without their folders, which tell more of a machine than of a model."""
    out = {key: without_folders(value) if isinstance(value, Mapping) else value for key, value in recipe.items()}
    for key in ("train", "val", "checkpoint", "start_from", "sensitivities"):
        value = out.get(key)
        if isinstance(value, str):
            out[key] = Path(value).name
        elif isinstance(value, list):
            out[key] = [Path(str(item)).name for item in value]
    return out
