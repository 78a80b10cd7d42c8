"""What a frozen file takes over from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qvit.convert import preprocessing_of
from qvit.training.checkpoint import Metadata
from qvit.training.provenance import provenance_of, without_folders

RECIPE: dict[str, Any] = {
    "method": "qvit",
    "data": {"train": ["/data/a.tar", "/data/b.tar"], "val": "/data/val.tar", "mean": [0.5]},
    "model": {"name": "vit", "checkpoint": "/runs/float/best.safetensors"},
    "teacher": {"name": None, "checkpoint": "/runs/teacher/best.safetensors"},
    "quant": {"bits": 2, "start_from": "/runs/first/last.safetensors", "sensitivities": "/runs/s.json"},
}


@pytest.fixture
def metadata(small_vit: Callable[..., Any]) -> Metadata:
    metrics = {"top1": 71.0, "best_top1": 72.0, "float_top1": 80.0, "images": 100}
    vit = small_vit()
    return Metadata.of(vit, preprocessing_of(vit), ["a"], RECIPE, epochs=7, metrics=metrics)


def test_files_are_named_without_their_folders() -> None:
    recipe = without_folders(RECIPE)
    assert "/" not in str(recipe)
    assert recipe["data"] == {"train": ["a.tar", "b.tar"], "val": "val.tar", "mean": [0.5]}
    assert recipe["quant"] == {"bits": 2, "start_from": "last.safetensors", "sensitivities": "s.json"}
    assert RECIPE["model"]["checkpoint"] == "/runs/float/best.safetensors"


def test_what_is_known_of_a_run(metadata: Metadata) -> None:
    facts = provenance_of(metadata)
    assert (facts["float_top1"], facts["fake_top1"], facts["images"], facts["epochs"]) == (80.0, 71.0, 100, 7)
    assert (facts["data"], facts["method"], facts["recipe"]) == ("val.tar", "qvit", without_folders(RECIPE))
    assert facts["versions"].keys() == {"torch", "timm"}
    measured = replace(metadata, metrics={**metadata.metrics, "fake_top1": 70.5})
    assert provenance_of(measured)["fake_top1"] == 70.5


def test_epochs_of_a_cascade_are_those_of_both_stages(metadata: Metadata) -> None:
    cascade = replace(metadata, metrics={**metadata.metrics, "first_stage_epochs": 3})
    assert provenance_of(cascade)["epochs"] == 10


def test_what_is_not_known_is_left_out(metadata: Metadata) -> None:
    facts = provenance_of(replace(metadata, metrics={}, recipe={"data": {"train": "digits", "val": None}}))
    assert facts.keys() == {"data", "epochs", "metrics", "recipe", "versions"}
    assert facts["data"] == "digits"
