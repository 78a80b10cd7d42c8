"""Out of memory: which batch would fit, said in one sentence, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qvit.training.loop
from qvit.errors import RecipeError, TrainingError
from qvit.training.checkpoint import LAST, read_checkpoint
from qvit.training.engine import fit
from qvit.training.memory import DeviceMemory, fitting_batch, fitting_half, is_full, rounded
from qvit.training.objective import Objective
from qvit.training.recipe import Recipe

from .test_targets import CACHED


class Fake(DeviceMemory):
    """A GPU on which an image takes ``image`` bytes."""

    def __init__(self, capacity: int, allocated: int, image: int) -> None:
        self.total, self.allocated, self.image, self.tried = capacity, allocated, image, 0

    def capacity(self) -> int:
        return self.total

    def start(self) -> int:
        return self.allocated

    def peak(self) -> int:
        return self.allocated + self.image * self.tried

    def probe(self, count: int) -> None:
        self.tried = count
        if self.peak() > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


@pytest.mark.parametrize(
    ("batch", "capacity", "image", "states", "wanted"),
    [
        (256, 100_000, 500, 1, 168),  # 93,000 - 4,000 - 4,000 bytes for images of 500
        (256, 100_000, 500, 3, 152),
        (256, 1_000_000, 500, 1, 248),  # it did not fit, whatever is said here
        (3, 1_000_000, 500, 1, 2),
        (256, 100_000, 15_000, 1, None),  # not even the eighth that is tried
        (8, 100_000, 15_000, 1, 4),
        (1, 100_000, 99_000, 1, None),
    ],
)
def test_the_batch_that_fits(batch: int, capacity: int, image: int, states: int, wanted: int | None) -> None:
    model = nn.Linear(1000, 1, bias=False)  # 4,000 bytes
    memory = Fake(capacity, 4_000, image)
    assert fitting_batch(batch, memory.probe, model, states, memory) == wanted
    assert memory.tried == max(batch // 8, 1)


@pytest.mark.parametrize(("images", "wanted"), [(-3, None), (0, None), (1, 1), (3, 2), (7, 4), (8, 8), (15, 8), (131, 128)])
def test_rounding(images: int, wanted: int | None) -> None:
    assert rounded(images) == wanted


@pytest.mark.parametrize("changes", [{}, {"activations_first": {"epochs": 1}}, CACHED], ids=["qvit", "features", "cached"])
@pytest.mark.parametrize(("image", "advice"), [(1_000_000, "batch_size=4 should fit"), (10**9, "not even one image fits")])
def test_a_full_gpu_is_one_sentence_and_the_last_checkpoint_stays(
    changes: dict[str, Any],
    image: int,
    advice: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Fake(8_000_000, 100_000, image)
    original = Objective.__call__
    steps: list[int] = []

    def losses(self: Any, images: torch.Tensor, *others: Any) -> Any:
        if len(images) < 8:  # the probe: it runs, and is counted
            memory.probe(len(images))
        elif len(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        steps.append(len(images))
        return original(self, images, *others)

    monkeypatch.setattr(Objective, "__call__", losses)
    monkeypatch.setattr(qvit.training.loop, "DeviceMemory", lambda: memory)
    recipe = tiny_recipe(**{"batch_size": 8} | changes | {"batch_size": 8, "log_every": 1})
    with pytest.raises(TrainingError, match=rf"memory is full at step 6 with batch_size=8: {advice}") as caught:
        fit(recipe, tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"the last good checkpoint is {tmp_path / LAST}.")
    assert read_checkpoint(tmp_path / LAST).metadata.step == 5
    assert memory.tried == 1
    monkeypatch.undo()
    fit(recipe, tmp_path, resume=True, progress=False)


HOST = "[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


@pytest.mark.parametrize(
    ("batch", "largest", "wanted", "tried"),
    [(100, 30, 24, [48, 24]), (9, 99, 4, [4]), (64, 2, 2, [32, 16, 8, 4, 2]), (4, 0, None, [2, 1]), (1, 9, None, [])],
)
def test_the_half_that_fits_on_a_cpu(batch: int, largest: int, wanted: int | None, tried: list[int]) -> None:
    counts: list[int] = []

    def probe(count: int) -> None:
        counts.append(count)
        if count > largest:
            raise RuntimeError(HOST)

    assert fitting_half(batch, probe) == wanted
    assert counts == tried


def test_other_errors_are_not_taken_for_full_memory() -> None:
    assert all(is_full(error) for error in (RuntimeError(HOST), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")))
    assert not any(is_full(error) for error in (RuntimeError("shapes differ"), ValueError("can't allocate memory")))

    def broken(_count: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fitting_half(8, broken)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [({}, "batch_size=1 should fit"), ({"data": {"mixup": 0.8}}, "not even two images fit beside the model")],
    ids=["plain", "mixed in pairs"],
)
def test_a_full_machine_is_one_sentence_and_the_last_checkpoint_stays(
    changes: dict[str, Any],
    advice: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down to a single image, which mixup could not take."""
    original = Objective.__call__
    steps: list[int] = []

    def losses(self: Any, images: torch.Tensor, *others: Any) -> Any:
        steps.append(len(images))
        if len(steps) > 6 and len(images) > 1:
            raise RuntimeError(HOST)
        return original(self, images, *others)

    monkeypatch.setattr(Objective, "__call__", losses)
    with pytest.raises(TrainingError, match=f"The machine's memory is full at step 6 with batch_size=8: {advice};"):
        fit(tiny_recipe(log_every=1, **changes), tmp_path, progress=False)
    assert steps[6:] == [8, 4, 2, 1]
    assert read_checkpoint(tmp_path / LAST).metadata.step == 5


def test_a_full_machine_outside_of_a_step_is_named(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(qvit.training.loop, "count_correct", full)
    with pytest.raises(TrainingError, match=r"The machine's memory is full \(no more could be allocated\): lower batch_size"):
        fit(tiny_recipe(), tmp_path, progress=False)


def test_a_full_gpu_outside_of_a_step_is_named(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..")

    monkeypatch.setattr(qvit.training.loop, "count_correct", full)
    with pytest.raises(TrainingError, match=r"memory is full \(CUDA out of memory\): lower batch_size"):
        fit(tiny_recipe(), tmp_path, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_recipe_that_needs_a_gpu_is_refused_without_one(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs a GPU and PyTorch finds none: .*needs_gpu=false"):
        fit(tiny_recipe(needs_gpu=True), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert Recipe.load("paper_imagenet").needs_gpu
