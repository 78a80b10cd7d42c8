"""Checkpoints: they come back as they were, are replaced at once, and are refused in one sentence when damaged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from qvit.convert import preprocessing_of
from qvit.errors import InputError, TrainingError, WeightsError
from qvit.training.checkpoint import (
    Metadata,
    is_checkpoint,
    load_model,
    load_optimizer,
    load_student,
    read_checkpoint,
    save_checkpoint,
)
from qvit.training.optim import build_optimizer
from qvit.training.sections import OptimSection

KEY = "qvit.checkpoint"
IMAGES = torch.linspace(-1, 1, 2 * 3 * 48 * 48).reshape(2, 3, 48, 48)


def describe(model: nn.Module, **values: Any) -> Metadata:
    info = getattr(model, "qvit", None)
    preprocessing = info.preprocessing if info else preprocessing_of(model)
    return Metadata.of(model, preprocessing, [f"class {n}" for n in range(7)], {"method": "qvit"}, **values)


@pytest.fixture
def saved_student(make_student: Callable[..., nn.Module], tmp_path: Path) -> tuple[nn.Module, Path]:
    student = make_student(weight_bits=3, act_bits=4, overrides={"*.mlp.fc2": 8})
    save_checkpoint(tmp_path / "s.safetensors", student, describe(student, epochs=2, step=17, metrics={"top1": 50.0}))
    return student, tmp_path / "s.safetensors"


@pytest.mark.parametrize("quantized", [False, True])
def test_a_swin_comes_back(
    quantized: bool, small_swin: Callable[..., nn.Module], make_student: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = small_swin(num_classes=7)
    model = make_student(model, weight_bits=3) if quantized else model
    save_checkpoint(tmp_path / "m.safetensors", model, describe(model))
    back, metadata = load_model(tmp_path / "m.safetensors")
    assert metadata.architecture.windows == ((4, 4), (4, 4))
    assert (metadata.student is not None) is quantized
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(back(images), model(images))


def test_a_student_comes_back(saved_student: tuple[nn.Module, Path]) -> None:
    student, path = saved_student
    model, metadata = load_student(path)
    assert metadata.student == student.qvit
    assert (metadata.epochs, metadata.step, metadata.metrics) == (2, 17, {"top1": 50.0})
    assert metadata.classes[6] == "class 6"
    assert metadata.recipe == {"method": "qvit"}
    assert set(metadata.versions) == {"torch", "timm"}
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IMAGES), student(IMAGES))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_float_model_comes_back(small_vit: Callable[..., nn.Module], tmp_path: Path, name: str) -> None:
    model = small_vit(name)
    path = tmp_path / "f.safetensors"
    save_checkpoint(path, model, describe(model))
    again, metadata = load_model(path)
    assert metadata.student is None
    assert metadata.preprocessing == preprocessing_of(model)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    with pytest.raises(WeightsError, match="holds a float model"):
        load_student(path)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_an_optimizer_goes_on_as_if_never_stopped(small_vit: Callable[..., nn.Module], tmp_path: Path, name: str) -> None:
    section = OptimSection(name=name, lr=1e-2, weight_decay=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()

    model = small_vit()
    optimizer = build_optimizer(model, section)
    step(model, optimizer)
    step(model, optimizer)
    save_checkpoint(tmp_path / "c.safetensors", model, describe(model), optimizer)
    step(model, optimizer)

    again, _ = load_model(tmp_path / "c.safetensors")
    other = build_optimizer(again, section)
    load_optimizer(other, read_checkpoint(tmp_path / "c.safetensors"))
    step(again, other)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_without_the_optimizer_is_not_resumed_from(small_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = small_vit()
    save_checkpoint(tmp_path / "c.safetensors", model, describe(model))
    with pytest.raises(TrainingError, match="no state of this run's optimizer"):
        load_optimizer(build_optimizer(model, OptimSection()), read_checkpoint(tmp_path / "c.safetensors"))


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(
    saved_student: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, path = saved_student
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="disk is full") as caught:
        save_checkpoint(path, student, describe(student, step=18))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_there_is_no_pickle_in_it(saved_student: tuple[nn.Module, Path]) -> None:
    tensors = safetensors.torch.load_file(saved_student[1])
    assert all(name.startswith("model.") for name in tensors)
    assert is_checkpoint(saved_student[1])


def with_header(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrites a checkpoint with a changed description."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    change(header)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {KEY: json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update(schema=99), "newer version"),
        (lambda h: h.pop("classes"), "damaged"),
        (lambda h: h.update(student="x"), "damaged"),
        (lambda h: h["student"]["spec"].update(weight_bits=77), "damaged"),
        (lambda h: h["architecture"].update(depth="two"), "damaged"),
        (lambda h: h["student"]["architecture"].update(embed_dim=96), "do not fit"),
    ],
)
def test_a_changed_description_is_refused(
    saved_student: tuple[nn.Module, Path], change: Callable[[dict], None], words: str
) -> None:
    with_header(saved_student[1], change)
    with pytest.raises(WeightsError, match=words) as caught:
        load_student(saved_student[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_refused(saved_student: tuple[nn.Module, Path], size: int) -> None:
    _, path = saved_student
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        load_student(path)
    assert not is_checkpoint(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match="no checkpoint of qvit"):
        load_model(path)
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="damaged"):
        load_model(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="There is no checkpoint"):
        load_model(tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_model(tmp_path)
