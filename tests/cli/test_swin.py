"""The commands on a Swin Transformer: from timm's name to answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
from PIL import Image

import qvit

Cli = Callable[..., Any]
NAME = "swin_tiny_patch4_window7_224"
ARGUMENTS: dict[str, Any] = {
    "img_size": 8, "patch_size": 1, "window_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 8, "depths": [2, 1],
    "num_heads": [2, 4],
}  # fmt: skip


def _model(folder: Path, name: str = NAME, **changes: Any) -> list[object]:
    """The arguments that name a small float model with random weights."""
    arguments = ARGUMENTS | changes
    weights = folder / "float.safetensors"
    safetensors.torch.save_file(timm.create_model(name, **arguments).state_dict(), weights)
    options = [part for key, value in arguments.items() for part in ("--model-arg", f"{key}={value}")]
    return [name, *options, "--checkpoint", weights]


def test_quantize_eval_predict(cli: Cli, tmp_path: Path) -> None:
    model, report = tmp_path / "swin.qvit", tmp_path / "report.json"
    done = cli("quantize", *_model(tmp_path), "--bits", 4, "--data", "digits", "--images", 8, "-o", model, "--json", report)
    assert (done.status, done.err) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    assert row["model"] == NAME
    assert row["file_bytes"] == model.stat().st_size
    done = cli("eval", model, "--data", "digits", "--limit", 20, "--json", report)
    assert (done.status, done.err) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    assert row["images"] == 20
    image = tmp_path / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(image)
    done = cli("predict", model, image, "--top", 1, "--json", report)
    assert (done.status, done.err) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    runner = qvit.load(model, engine="reference")
    with Image.open(image) as opened:
        logits = runner(runner.model.preprocessing.pixels(opened)[None])[0]
    assert row["class"] == runner.model.classes[int(np.argmax(logits))]


def test_a_checkpoint_is_frozen_and_compared(cli: Cli, tmp_path: Path) -> None:
    student, model, report = tmp_path / "student.safetensors", tmp_path / "swin.qvit", tmp_path / "report.json"
    done = cli("quantize", *_model(tmp_path), "--bits", 3, "--data", "digits", "--images", 8, "-o", student)
    assert (done.status, done.err) == (0, "")
    done = cli("freeze", student, "-o", model, "--data", "digits", "--limit", 20, "--json", report)
    assert (done.status, done.err) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["agreement"], row["codes_agreement"], row["logits_difference"]) == (100.0, 100.0, 0.0)
    page = tmp_path / "report.html"
    shown = ("--data", "digits", "--images", 4, "-o", page)
    cli("report", model, *shown).refused("Attention of a frozen", "name its run or checkpoint")
    assert not page.exists()
    done = cli("report", student, *shown)
    assert (done.status, done.err) == (0, "")
    assert "Queries and keys" in done.out
    assert "no class token" in done.out
    assert "3 blocks in 2 stages, 8 to 16 wide, 2, 4 heads, 64 tokens in the first stage" in page.read_text()


def test_sizes_and_models_that_do_not_fit_are_refused(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "swin.qvit"
    end = ("--bits", 4, "--data", "digits", "--images", 8, "-o", output)
    padded = _model(tmp_path, img_size=12)
    cli("quantize", *padded, *end).refused("6 x 6 tokens", "windows of 4 x 4", "multiple of 8")
    other = _model(tmp_path, "swinv2_tiny_window8_256")
    cli("quantize", *other, *end).refused("SwinTransformerV2", "use a swin_* model")
    assert not output.exists()
