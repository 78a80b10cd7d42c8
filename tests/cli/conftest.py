"""What the tests of the commands share: a way to run them, checkpoints, image folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

import qvit
from qvit.cli.main import run
from qvit.convert import preprocessing_of
from qvit.sources import DigitsSource
from qvit.training.checkpoint import Metadata, load_student, save_checkpoint
from qvit.training.data import evaluation_loader

from .reports import few_digits, train_run

# A model of the digits' size, small enough to be calibrated in a moment.
MODEL = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {
    "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 12, "num_heads": 3, "depth": 1
}  # fmt: skip


@dataclass
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    def refused(self, *parts: str, status: int = 2) -> None:
        """Checks that it failed with exactly one sentence, which holds the parts."""
        assert self.status == status, self
        assert self.err.startswith("error: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n"), self
        assert "Traceback" not in self.err + self.out
        for part in parts:
            assert part in self.err, self


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``cli("eval", path, ..)``: runs a command in this process, as the installed program does."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["qvit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run()
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Done(caught.value.code, out, err)

    return call


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, small_vit: Callable[..., Any], perturb: Callable[..., Any]) -> Path:
    """A folder with ``float.safetensors``, ``quantized.safetensors`` (4 bits, calibrated) and ``state.safetensors``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    source = DigitsSource("train")
    vit = small_vit(MODEL, **ARGUMENTS)
    preprocessing = preprocessing_of(vit)
    recipe = {
        "method": "qvit",
        "data": {"train": "/somewhere/digits", "val": None},
        "model": {"checkpoint": "/somewhere/vit.pth"},
    }
    metrics = {"top1": 12.5, "images": 360}
    float_metadata = Metadata.of(vit, preprocessing, source.classes, {"method": "float"}, metrics={"top1": 9.75})
    save_checkpoint(folder / "float.safetensors", vit, float_metadata)
    safetensors.torch.save_file(vit.state_dict(), folder / "state.safetensors")
    student = qvit.quantize(vit, bits=4, preprocessing=preprocessing)
    qvit.calibrate(student, evaluation_loader(source, preprocessing, 8), images=8)
    perturb(student)
    metadata = Metadata.of(student, preprocessing, source.classes, recipe, epochs=3, metrics=metrics)
    save_checkpoint(folder / "quantized.safetensors", student, metadata)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """``image_folder(classes, per_class)``: a folder of class folders with small greyscale images."""

    def make(classes: int, per_class: int = 2) -> Path:
        root, rng = tmp_path / f"images{classes}", np.random.default_rng(0)
        for label in range(classes):
            (root / str(label)).mkdir(parents=True)
            for number in range(per_class):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / str(label) / f"{number}.png")
        return root

    return make


@pytest.fixture(scope="session")
def report_runs(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """A folder with ``images`` (30 for validation), two small runs on them, ``qvit`` and ``baseline``, and ``student.qvit``."""
    folder = tmp_path_factory.mktemp("runs")
    images = few_digits(folder / "images")
    for method in ("qvit", "baseline"):
        train_run(folder / method, images, checkpoints / "float.safetensors", method)
    student, metadata = load_student(folder / "qvit" / "best.safetensors")
    qvit.freeze(student, metadata.classes).save(folder / "student.qvit")
    return folder


@pytest.fixture(scope="session")
def full_report(tmp_path_factory: pytest.TempPathFactory, report_runs: Path) -> Path:
    """A folder with ``page.html``, a report that has everything but latency, and ``report.json``, its result file."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"data": "images", "method": "irm", "weight_bits": 3, "act_bits": 3, "integer_top1": 55.5, "file_bytes": 9999}]
    (folder / "other.json").write_text(json.dumps({"schema": 1, "hardware": {"cpu": "some cpu"}, "rows": rows}))
    files = ("-o", folder / "page.html", "--json", folder / "report.json", "--results", folder / "other.json")
    options = ("--baseline", report_runs / "baseline", "--images", 30, "--maps", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qvit", "report", *map(str, (report_runs / "qvit", *files, *options))])
        with pytest.raises(SystemExit) as ended:
            run()
    assert ended.value.code == 0
    return folder
