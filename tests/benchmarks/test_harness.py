"""What the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest

from qvit.sources import open_source
from qvit.training.recipe import Recipe


def test_command_lines_lose_their_folders_alone() -> None:
    assert harness.public(["--data", "/a/b/val.tar", "--set", "model.checkpoint=/a/t.safetensors", "optim.lr=1e-3"]) == [
        "--data",
        "val.tar",
        "--set",
        "model.checkpoint=t.safetensors",
        "optim.lr=1e-3",
    ]
    assert harness.short(["/a/b.tar", "c.tar"]) == "b.tar, c.tar"
    assert harness.short("digits") == "digits"
    assert harness.short(3) == 3


@pytest.mark.parametrize("name", harness.METHODS)
def test_every_method_is_a_recipe(name: str) -> None:
    recipe = Recipe.load("imagenette", harness.METHODS[name])
    assert name == "ours" or recipe.method == name
    assert name in harness.TITLES


def test_another_model() -> None:
    assert harness.model_overrides(None, None) == []
    changes = harness.model_overrides("vit_tiny_patch16_224", "{img_size: 32, num_classes: 3}")
    model = Recipe.load("imagenette", changes).model
    assert model is not None
    assert (model.name, model.args) == ("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 3})


@pytest.mark.parametrize(("channels", "count"), [(3, 5), (1, 2)])
def test_random_images_suit_the_model(tmp_path: Path, channels: int, count: int) -> None:
    args = f"{{img_size: 8, patch_size: 4, in_chans: {channels}, embed_dim: 24, depth: 1, num_heads: 2, num_classes: 3}}"
    changes = harness.model_overrides("vit_tiny_patch16_224", args)
    changes += ["data.mean=[0.5]", "data.std=[0.5]"] if channels == 1 else []
    source = open_source(harness.write_random_images(tmp_path, Recipe.load("imagenette", changes), count), "train")
    assert len(source) == max(count, 3)
    assert len(source.classes) == 3
    image, _ = source[0]
    assert image.size == (8, 8)
    assert len(image.getbands()) == channels
