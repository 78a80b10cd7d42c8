"""Which engine a command takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit
from qvit.cli.engines import open_runner
from qvit.cli.images import device_of
from qvit.errors import FileFormatError, InputError


def test_the_cpu_engine_where_nothing_else_is_asked_for(frozen_file: Path) -> None:
    assert open_runner(frozen_file, None, None, None).engine.name == "cpu"
    assert open_runner(frozen_file, None, "cpu", 1).engine.threads == 1
    assert open_runner(frozen_file, "cpu", None, 2).engine.threads == 2


def test_the_reference_engine_for_other_devices(frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner = open_runner(frozen_file, "reference", None, None)
    assert (runner.engine.name, runner.engine.device.type) == ("reference", "cpu")
    with pytest.raises(InputError, match="no device 'cuda:77'"):
        open_runner(frozen_file, None, "cuda:77", None)
    with pytest.raises(InputError, match="'cpu' does not run on the device 'cuda': use engine='cuda'"):
        open_runner(frozen_file, "cpu", "cuda", None)
    with pytest.raises(InputError, match="'cuda' does not run on the device 'cpu'"):
        open_runner(frozen_file, "cuda", "cpu", None)


def test_the_cuda_engine(
    make_student: Callable[..., Any], small_vit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wide.qvit"
    qvit.freeze(make_student(small_vit(embed_dim=32, num_heads=1, depth=1))).save(path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU that PyTorch can use"):
        open_runner(path, "cuda", None, None)
    monkeypatch.setattr("qvit.engines.cuda.CudaEngine", lambda _model, device: f"cuda engine on {device}")
    assert open_runner(path, "cuda", None, None).engine == "cuda engine on cuda"
    assert open_runner(path, "cuda", "cuda:1", None).engine == "cuda engine on cuda:1"


def test_one_gpu_of_several_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of training go there, not to where tensors are."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [device_of(device) for device in ("cuda:1", "cuda", "cpu")] == ["cuda:1", "cuda", "cpu"]
    assert current == [torch.device("cuda:1")]


def test_the_commands_name_the_cuda_engine(
    cli: Callable[..., Any], frozen_file: Path, tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(10)
    image = folder / "3" / "0.png"
    for command in (("eval", frozen_file, "--data", folder), ("predict", frozen_file, image)):
        cli(*command, "--engine", "cuda", "--device", "cpu").refused("'cuda' does not run on the device 'cpu'")
        cli(*command, "--engine", "cuda").refused("heads of 4 channels, only of 32 or 64 yet: use engine='reference'")
        done = cli(command[0], "--help")
        assert "cuda (an NVIDIA GPU)" in " ".join(done.out.split())


def test_a_slower_engine_says_so(cli: Callable[..., Any], frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 4 channels, which the CUDA engine does not run, on what passes for a GPU here."""
    monkeypatch.setattr("qvit.cli.engines.device_of", lambda _device: "cuda")
    monkeypatch.setattr("qvit.engines._reference", lambda _model, device: f"reference on {device}")
    said: list[str] = []
    monkeypatch.setattr("qvit.cli.engines.note", said.append)
    assert open_runner(frozen_file, None, "cuda", None).engine == "reference on cuda"
    assert said == [
        "The reference engine stands in, which is much slower: the CUDA engine does not run heads of 4 channels, only of 32 or "
        "64 yet."
    ]


def test_without_the_compiled_module(frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvit.engines.cpu.is_built", lambda: False)
    assert open_runner(frozen_file, None, "cpu", None).engine.name == "reference"


def test_mistakes(frozen_file: Path) -> None:
    with pytest.raises(InputError, match="no engine 'warp'"):
        open_runner(frozen_file, "warp", None, None)
    with pytest.raises(InputError, match="--threads 0"):
        open_runner(frozen_file, None, None, 0)
    frozen_file.write_bytes(b"")
    with pytest.raises(FileFormatError):
        open_runner(frozen_file, None, None, None)
