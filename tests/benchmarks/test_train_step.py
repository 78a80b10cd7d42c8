"""The benchmark of a training step runs `qvit train`'s own loop and reports what it says, on a model of a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import train_step

from qvit.training.loop import TrainingLoop

TINY = "{img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, num_classes: 3}"
ARGUMENTS = ["--model", "vit_tiny_patch16_224", "--model-args", TINY, "--batch", "4", "--warmup", "1", "--steps", "2"]


def test_rows_profile_and_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []
    step = TrainingLoop.train_step

    def counting(self, images, labels):
        seen.append((self.recipe.method, self.setup.loss.soft, len(images)))
        assert self.model.training
        step(self, images, labels)

    monkeypatch.setattr(TrainingLoop, "train_step", counting)
    arguments = [*ARGUMENTS, "--rounds", "3", "--methods", "float,baseline,qvit,ours", "--bits", "3"]
    arguments += ["--json", str(tmp_path / "result.json"), "--profile", str(tmp_path / "profile.txt")]
    rows = train_step.main(arguments)

    report = json.loads((tmp_path / "result.json").read_text())
    assert report["rows"] == rows
    assert report["command"][:2] == ["python", "benchmarks/train_step.py"]
    assert str(tmp_path) not in json.dumps(report)
    by_name = {row["method"]: row for row in rows}
    assert list(by_name) == ["float", "baseline", "qvit", "ours", "images"]
    assert by_name["float"]["weight_bits"] == 32
    assert "ratio_to_peer" not in by_name["float"]
    for name in ("baseline", "qvit", "ours"):
        row = by_name[name]
        assert (row["weight_bits"], row["act_bits"], row["batch"], row["rounds"]) == (3, 3, 4, 3)
        assert row["peer"] == "float fine-tuning"
        assert row["train_images_per_s"] == pytest.approx(4000 / row["ms_median"])
        assert row["ratio_to_peer"] > 0
        assert row["compile_seconds"] >= 0
    assert by_name["images"]["train_images_per_s"] > 0

    # Float: warm-up, three rounds of two steps and three profiled steps; the others the same, each round after one of float.
    methods = [(method, soft) for method, soft, _ in seen]
    float_, low = ("float", 0), ("baseline", 1)
    assert methods[:11] == [float_] * 10 + [low]
    assert methods[11:26] == [float_, float_, low, low] * 3 + [low] * 3
    assert set(methods) == {float_, low, ("qvit", 1)}
    assert len(methods) == 10 + 3 * 16
    assert {size for *_, size in seen} == {4}
    assert by_name["float"]["rounds"] == 3 + 3 * 3

    text = (tmp_path / "profile.txt").read_text()
    assert text.count("images a step") == 4
    assert "aten::" in text


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--methods", "qvit,nothing"], "no method 'nothing'"), (["--batch", "0"], "--batch must be")]
)
def test_mistakes_are_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main(arguments)
    assert words in capsys.readouterr().err


def test_a_method_that_does_not_fit_is_said_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingLoop.train_step

    def full(self, images, labels):
        if self.recipe.method == "qvit":
            raise torch.cuda.OutOfMemoryError("too much")
        step(self, images, labels)

    monkeypatch.setattr(TrainingLoop, "train_step", full)
    rows = train_step.main([*ARGUMENTS, "--rounds", "1", "--methods", "qvit,baseline"])
    assert [(row["method"], row.get("error")) for row in rows] == [
        ("qvit", "too much"),
        ("baseline", None),
        ("images", None),
    ]
    assert "train_images_per_s" not in rows[0]
