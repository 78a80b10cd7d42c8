"""``qvit freeze``."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit
import qvit.engines
from qvit.cli.images import as_tensors, open_evaluation
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError
from qvit.integer.freeze import round_to_half
from qvit.training.checkpoint import load_student

Cli = Callable[..., Any]


def _as_before_rounding(checkpoint: Path, limit: int) -> float:
    """Percentage of ``limit`` digits on which rounding to float16 leaves a checkpoint's top-1 as it was."""
    student, metadata = load_student(checkpoint)
    _, batches = open_evaluation(["digits"], metadata.classes, metadata.preprocessing, limit, limit, 0)
    ((images, _),) = as_tensors(batches, metadata.preprocessing)
    with torch.no_grad():
        before = student.eval()(images).argmax(-1)
        round_to_half(student)
        after = student(images).argmax(-1)
    return 100 * (before == after).float().mean().item()


def test_with_verification(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "out" / "model.qvit", tmp_path / "report.json"
    data = ("--data", "digits", "--limit", 20, "--batch", 8)
    done = cli("freeze", checkpoints / "quantized.safetensors", "-o", output, *data, "--json", report)
    assert (done.status, done.err) == (0, "")
    assert "kept" in done.out
    assert re.search(r"as trained +[0-9.]+ %, before scales, offsets and norms were rounded to the file's float16", done.out)
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["agreement"], row["codes_agreement"], row["images"], row["method"]) == (100, 100, 20, "qvit")
    assert row["agreement_before_rounding"] == pytest.approx(_as_before_rounding(checkpoints / "quantized.safetensors", 20))
    assert (row["fake_top1"], row["weight_bits"], row["file_bytes"]) == (12.5, 4, output.stat().st_size)


@pytest.mark.parametrize("gpu", [False, True])
def test_with_another_engine(gpu: bool, cli: Cli, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph runs where there is a GPU, the engine on its own device."""
    made: list[tuple[str | None, str | None]] = []

    def create_engine(model: Any, engine: str, device: str | None) -> Any:
        made.append((engine, device))
        return ReferenceEngine(model)

    def stop(*_arguments: Any) -> None:
        raise InputError("Enough is known.")

    monkeypatch.setattr(qvit.engines, "create_engine", create_engine)
    monkeypatch.setattr("qvit.cli.freeze.device_of", lambda _device: "meta" if gpu else "cpu")
    monkeypatch.setattr("qvit.analyze.agreement.agreement", stop)
    for options in (("--engine", "cuda"), ("--engine", "cpu"), ("--engine", "cuda", "--device", "cuda:1"), ()):
        cli("freeze", checkpoints / "quantized.safetensors", "-o", tmp_path / "m.qvit", "--data", "digits", *options).refused(
            "Enough is known"
        )
    assert made == [("cuda", None), ("cpu", None), ("cuda", "cuda:1"), ("reference", "meta" if gpu else "cpu")]


def test_provenance_comes_from_the_checkpoint_without_folders(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.qvit"
    assert cli("freeze", checkpoints / "quantized.safetensors", "-o", output).status == 0
    model = qvit.IntegerModel.load(output)
    found = dict(model.provenance)
    assert (found["fake_top1"], found["images"], found["data"], found["epochs"], found["method"]) == (
        12.5,
        360,
        "digits",
        3,
        "qvit",
    )
    assert found["recipe"]["model"]["checkpoint"] == "vit.pth"
    assert set(found["versions"]) >= {"torch", "timm"}
    assert "somewhere" not in json.dumps(found)
    assert model.classes == tuple("0123456789")
    assert model.name == "vit_tiny_patch16_224"


def test_class_names(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    arguments = ("freeze", checkpoints / "quantized.safetensors", "-o", tmp_path / "m.qvit", "--classes", names)
    names.write_text("zero\none\n\ntwo\n")
    cli(*arguments).refused("holds 3 class names")
    names.write_bytes(b"\xff\xfe\x00\x01")
    cli(*arguments).refused("not a text file")
    names.write_text("\n".join("abcdefghij"))
    assert cli(*arguments).status == 0
    assert qvit.IntegerModel.load(tmp_path / "m.qvit").classes == tuple("abcdefghij")


def test_integers_that_do_not_agree_are_not_written(
    cli: Cli, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ReferenceEngine.quantize

    def off_by_one(self: ReferenceEngine, x: Any, quantizer: Any) -> Any:
        codes = real(self, x, quantizer)
        return (codes + (codes == 1)).clamp(max=quantizer.spec.qp)

    monkeypatch.setattr(ReferenceEngine, "quantize", off_by_one)
    done = cli("freeze", checkpoints / "quantized.safetensors", "-o", tmp_path / "m.qvit", "--data", "digits", "--limit", 8)
    done.refused("do not compute what was trained", "was not written")
    assert list(tmp_path.iterdir()) == []


def test_bad_input(cli: Cli, checkpoints: Path, tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    output = ("-o", tmp_path / "m.qvit")
    cli("freeze", checkpoints / "quantized.safetensors", "-o", tmp_path / "m.onnx").refused("is no .qvit file")
    cli("freeze", checkpoints / "float.safetensors", *output).refused("float model")
    cli("freeze", checkpoints / "state.safetensors", *output).refused("no checkpoint of qvit")
    cli("freeze", tmp_path / "none.safetensors", *output).refused("none.safetensors")
    cli("freeze", tmp_path, *output).refused("holds no best.safetensors")
    cli("freeze", checkpoints / "quantized.safetensors", *output, "--data", "digits", "--engine", "warp").refused("no engine")
    folder = image_folder(3)
    cli("freeze", checkpoints / "quantized.safetensors", *output, "--data", folder).refused("3 classes")
    assert not (tmp_path / "m.qvit").exists()


def test_full_disk(cli: Cli, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "m.qvit"
    output.write_bytes(b"old")

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    cli("freeze", checkpoints / "quantized.safetensors", "-o", output).refused("disk is full")
    assert output.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.qvit"]
