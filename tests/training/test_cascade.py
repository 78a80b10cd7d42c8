"""A student that starts from another one: what it takes over, what it calibrates anew, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit.training.setup
from qvit.errors import RecipeError, WeightsError
from qvit.training.checkpoint import LAST, load_student
from qvit.training.engine import fit
from qvit.training.provenance import provenance_of
from qvit.training.recipe import Recipe

from .test_engine import RANDOM, metrics, same_tensors

MakeRecipe = Callable[..., Recipe]
ARGS = RANDOM["model"]["args"]


@pytest.fixture
def start(tiny_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A student at 4 bits."""
    recipe = tiny_recipe(quant={"bits": 4}, schedule={"epochs": 6}, optim={"lr": 5e-3})
    fit(recipe, tmp_path / "start", progress=False)
    return tmp_path / "start" / LAST


@pytest.mark.parametrize("kind", ["lsq", "statsq"])
def test_weights_and_irm_are_taken_over_and_scales_are_new(
    kind: str, start: Path, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    original = qvit.training.setup.calibrate

    def watching(model: Any, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        begun.append({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(qvit.training.setup, "calibrate", watching)
    changes: dict[str, Any] = {"quant": {"bits": 2, "weight_quantizer": kind, "start_from": str(start)}}
    result = fit(tiny_recipe(**changes), tmp_path / "low", progress=False)
    theirs, low = load_student(start)[0].state_dict(), begun[0]
    for name, value in low.items():
        if "_quantizer." not in name:
            assert torch.equal(value, theirs[name]), name
    assert low["blocks.0.attn.rectify_q.weight"].std() > 0
    scale = "blocks.0.mlp.fc1.input_quantizer.scale"
    assert low[scale] > 1.5 * theirs[scale], "the scale is still that of 4 bits"
    assert result.model.qvit.spec.weight_bits == 2
    # What comes from a trained student starts with less to learn than what comes from the float model, which was not trained.
    fit(tiny_recipe(quant={"bits": 2, "weight_quantizer": kind}), tmp_path / "plain", progress=False)
    first, plain = metrics(tmp_path / "low", "train")[0], metrics(tmp_path / "plain", "train")[0]
    assert first["label"] < 0.9 * plain["label"]


def test_it_resumes_without_the_start(start: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"quant": {"bits": 2, "start_from": str(start)}}
    fit(tiny_recipe(**changes), tmp_path / "b", progress=False)
    fit(tiny_recipe(**changes), tmp_path / "a", progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
    start.rename(tmp_path / "elsewhere.safetensors")
    fit(tiny_recipe(**changes), tmp_path / "a", resume=True, progress=False)
    _, metadata = load_student(tmp_path / "a" / LAST)
    assert provenance_of(metadata)["recipe"]["quant"]["start_from"] == LAST


def test_what_does_not_fit_is_refused(start: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    def refused(words: str, error: type[Exception] = RecipeError, **changes: Any) -> None:
        recipe = tiny_recipe(**{"quant": {"bits": 2, "start_from": str(start)}} | changes)
        with pytest.raises(error, match=words) as caught:
            fit(recipe, tmp_path / "run", progress=False)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    refused("another architecture", model={"args": ARGS | {"depth": 3}})
    refused("has IRM and this student lacks it", method="baseline")
    refused("another preprocessing", data={"mean": [0.1, 0.2, 0.3]})
    refused("There is no checkpoint", WeightsError, quant={"start_from": str(tmp_path / "none.safetensors")})
    fit(tiny_recipe(method="float", schedule={"epochs": 1}), tmp_path / "float", progress=False)
    refused("holds a float model", WeightsError, quant={"start_from": str(tmp_path / "float" / LAST)})
