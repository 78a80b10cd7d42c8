"""Cached teacher targets: the teacher answers once a crop, and training is the same as if it answered every time."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import qvit.training.engine
import qvit.training.loop
import qvit.training.targets
from qvit.errors import RecipeError
from qvit.training.checkpoint import BEST, LAST, read_checkpoint
from qvit.training.data import EpochSampler
from qvit.training.engine import fit
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.recipe import Recipe
from qvit.training.targets import KNOWN, VALUES, CachedTargets

from .helpers import TRAIN, tiny_values
from .test_engine import RUNNER, environment, metrics, same_tensors

CACHED: dict[str, Any] = {
    "method": "irm",
    "batch_size": 12,  # of 40 images an epoch leaves out four
    "distill": {"label": 0.5, "hard": 0.0, "soft": 1.0, "cached_crops": 2},
    "schedule": {"epochs": 6},
}


class Counting(torch.nn.Module):
    """A teacher that counts the images it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shapes.append(len(images))
        return torch.stack([images.flatten(1).sum(1), -images.flatten(1).sum(1)], 1)


def picture(image: int, crop: int, repeat: int = 0) -> torch.Tensor:
    """What stands for a crop of an image here."""
    return torch.full((1, 2, 2), float(image * 100 + crop * 10 + repeat))


@pytest.mark.parametrize(("repeats", "processes"), [(1, 1), (3, 1), (1, 2)])
def test_every_answer_is_the_teachers_and_is_asked_for_once(repeats: int, processes: int) -> None:
    """Of two processes, one is looked at: it knows what it has asked itself."""
    batch, images = 8, 53
    sampler = EpochSampler(images, batch * processes, 3, repeats, crops=2)
    targets, teacher = CachedTargets(sampler, images, 2, batch, torch.device("cpu"), 0, processes), Counting()
    asked: set[tuple[int, int, int]] = set()
    for epoch in range(7):
        sampler.start(epoch)
        targets.start()
        keys = list(sampler)
        assert {key.epoch for key in keys} == {epoch % 2}
        for first in range(0, len(keys), batch * processes):
            mine = keys[first : first + batch]
            x = torch.stack([picture(*key) for key in mine])
            teacher.shapes.clear()
            got = targets.next(x, teacher)
            assert torch.equal(got, Counting()(x))
            new = {tuple(key) for key in mine} - asked
            asked |= new
            assert sum(teacher.shapes) >= len(new)
            assert (not teacher.shapes) == (not new)
            # Two shapes, so that a compiled teacher is compiled twice.
            assert set(teacher.shapes) <= {batch, 1}
            assert len(new) > batch // 2 or sum(teacher.shapes) == len(new)
    assert targets.known.sum() == len(asked)


def test_an_epoch_that_goes_on_in_the_middle() -> None:
    sampler = EpochSampler(20, 5, 0, crops=1)
    targets, teacher = CachedTargets(sampler, 20, 2, 5, torch.device("cpu")), Counting()
    sampler.start(0, step=2)
    targets.start()
    for first in range(0, 10, 5):
        x = torch.stack([picture(*key) for key in list(sampler)[first : first + 5]])
        assert torch.equal(targets.next(x, teacher), Counting()(x))
    assert targets.known.sum() == 10
    again = CachedTargets(sampler, 20, 2, 5, torch.device("cpu"))
    again.load(targets.state())
    assert np.array_equal(again.known, targets.known)
    assert torch.equal(again.values, targets.values)
    other = CachedTargets(sampler, 21, 2, 5, torch.device("cpu"))
    other.load(targets.state())
    other.load({})
    assert not other.known.any()


def test_crops_return_and_orders_do_not() -> None:
    sampler = EpochSampler(30, 10, 0, crops=3)
    orders = []
    for epoch in range(6):
        sampler.start(epoch)
        assert sampler.crop_epoch == epoch % 3
        orders.append([key.image for key in sampler])
    assert len({tuple(order) for order in orders}) == 6
    plain = EpochSampler(30, 10, 0)
    plain.start(5)
    assert {key.epoch for key in plain} == {5}


@pytest.mark.parametrize("cache", [None, "device"])
def test_a_run_is_the_one_whose_teacher_answers_every_time(
    cache: str | None, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = qvit.training.engine.set_up

    def watching(*args: Any) -> Any:
        setup = original(*args)
        assert setup.teacher is not None
        setup.teacher.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
        return setup

    monkeypatch.setattr(qvit.training.engine, "set_up", watching)
    recipe = tiny_recipe(**CACHED, data={"cache": cache})
    fit(recipe, tmp_path / "cached", progress=False)
    # Six epochs of 36 images; 2 x 40 crops are all there are, padded to parts of two.
    assert 72 <= sum(seen) <= 2 * TRAIN + 20
    seen.clear()

    monkeypatch.setattr(CachedTargets, "next", lambda _self, images, teacher: teacher(images))
    fit(recipe, tmp_path / "asked", progress=False)
    assert sum(seen) == 6 * 36
    for a, b in zip(metrics(tmp_path / "cached", "train"), metrics(tmp_path / "asked", "train"), strict=True):
        assert b["soft"] == pytest.approx(a["soft"], rel=1e-3, abs=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    state = read_checkpoint(tmp_path / "cached" / LAST).tensors
    assert state[VALUES].shape == (2 * TRAIN, 3)
    assert state[KNOWN].sum() >= 72
    assert VALUES not in read_checkpoint(tmp_path / "cached" / BEST).tensors


@pytest.mark.parametrize("saved", [True, False])
def test_it_resumes(saved: bool, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, where the logits are in the checkpoint; up to the rounding of batches of another size, where they are not."""
    if not saved:
        monkeypatch.setattr(qvit.training.targets, "_LARGEST_SAVED", 0)
    original = qvit.training.loop.learning_rate

    def interrupting(step: int, *args: Any) -> float:
        if step == 7:
            signal.raise_signal(signal.SIGINT)
        return original(step, *args)

    recipe = tiny_recipe(**CACHED)
    with monkeypatch.context() as patch:
        patch.setattr(qvit.training.loop, "learning_rate", interrupting)
        with pytest.raises(TrainingInterrupted):
            fit(recipe, tmp_path / "a", progress=False)
    assert (VALUES in read_checkpoint(tmp_path / "a" / LAST).tensors) is saved
    fit(recipe, tmp_path / "a", resume=True, progress=False)
    fit(recipe, tmp_path / "b", progress=False)
    if saved:
        assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
    for a, b in zip(metrics(tmp_path / "a", "train"), metrics(tmp_path / "b", "train"), strict=True):
        assert a["soft"] == pytest.approx(b["soft"], rel=1e-2, abs=1e-4)


def test_two_processes_share_what_they_learned(image_folder: Path, tmp_path: Path) -> None:
    values = tiny_values(image_folder, **CACHED | {"batch_size": 4, "optim": {"name": "sgd", "lr": 3e-4}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(RUNNER), str(tmp_path / "recipe.yaml"), str(tmp_path / "two")]
    subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True)
    fit(Recipe.from_dict(values | {"batch_size": 8}), tmp_path / "one", progress=False)
    one, two = (read_checkpoint(tmp_path / name / LAST).tensors for name in ("one", "two"))
    assert torch.equal(one[KNOWN], two[KNOWN])
    assert one[KNOWN].sum() == 2 * TRAIN
    torch.testing.assert_close(one[VALUES], two[VALUES], rtol=1e-4, atol=1e-4)
    for a, b in zip(metrics(tmp_path / "one", "train"), metrics(tmp_path / "two", "train"), strict=True):
        # Sums of halves of a batch round otherwise; with small steps no code changes for that.
        assert b["soft"] == pytest.approx(a["soft"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "qvit"}, "DGD reads the teacher's q and k"),
        ({"data": {"mixup": 0.5}}, "mixed images are new in every step"),
        ({"data": {"cutmix": 0.5}}, "set data.mixup and data.cutmix to 0"),
        ({"distill": {"soft": 1, "feature": 1, "cached_crops": 2}}, "feature matching reads"),
        ({"activations_first": {"epochs": 1}}, "activations_first.feature to 0"),
        ({"distill": {"label": 1, "hard": 0, "cached_crops": 2}}, "the loss reads no teacher"),
    ],
)
def test_what_the_cache_cannot_serve_is_refused(changes: dict, words: str) -> None:
    values = {"method": "irm", "distill": {"soft": 1.0, "cached_crops": 2}}
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.from_dict(values | changes)
    assert "\n" not in str(caught.value)
