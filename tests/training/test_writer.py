"""Writing in the background: in order, of what was there when asked, and errors are not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import qvit.training.checkpoint
from qvit.errors import InputError
from qvit.training.checkpoint import LAST, read_checkpoint
from qvit.training.engine import fit, open_loop
from qvit.training.recipe import Recipe
from qvit.training.writer import BackgroundWriter

MakeRecipe = Callable[..., Recipe]


def test_it_writes_in_order_while_the_caller_goes_on() -> None:
    writer, gate, done = BackgroundWriter(), threading.Event(), []
    writer.submit(lambda: (gate.wait(10), done.append("first"))[0] and None)
    writer.submit(lambda: done.append("second"))
    assert done == []
    gate.set()
    writer.wait()
    assert done == ["first", "second"]
    writer.wait()


def test_the_first_error_is_raised_once_and_the_rest_is_written() -> None:
    def fails() -> None:
        raise InputError("The disk is full.")

    writer, done = BackgroundWriter(), []
    writer.submit(fails)
    writer.submit(lambda: done.append(1))
    with pytest.raises(InputError, match="disk is full"):
        writer.wait()
    assert done == [1]
    writer.wait()


def test_a_checkpoint_holds_the_weights_of_its_step_though_training_goes_on(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    loop = open_loop(tiny_recipe(), tmp_path, progress=False)
    gate = threading.Event()
    loop.writer.submit(lambda: gate.wait(10) and None)
    batch = next(iter(loop.loader))
    with loop.stepping():
        loop.train_step(*batch)
        before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
        loop._save(LAST, loop.optimizer)
        loop.train_step(*batch)
    gate.set()
    loop.writer.wait()
    checkpoint = read_checkpoint(tmp_path / LAST)
    assert checkpoint.metadata.step == 1
    state = checkpoint.model_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())
    assert {name for name in checkpoint.tensors if name.endswith("exp_avg")}


def test_a_run_ends_with_its_checkpoint_written_or_says_why_not(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_recipe(schedule={"epochs": 1}), tmp_path / "a", progress=False)
    assert safetensors.torch.load_file(tmp_path / "a" / LAST)

    def full(path: Path, _data: bytes) -> None:
        raise InputError(f"The disk is full: {path.name} was not written.")

    monkeypatch.setattr(qvit.training.checkpoint, "write_atomically", full)
    with pytest.raises(InputError, match="disk is full"):
        fit(tiny_recipe(schedule={"epochs": 1}), tmp_path / "b", progress=False)
