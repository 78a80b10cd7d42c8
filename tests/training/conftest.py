"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qvit.training.recipe import Recipe

from .helpers import TRAIN, VAL, tiny_values, write_images


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in the same order in every process, and no contention between them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` (40) and ``val`` (11) images of three classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", TRAIN, 0)
    write_images(root / "val", VAL, 1)
    return root


@pytest.fixture
def tiny_recipe(image_folder: Path) -> Callable[..., Recipe]:
    """``tiny_recipe(**changes)``; see `tiny_values`."""
    return lambda **changes: Recipe.from_dict(tiny_values(image_folder, **changes))
