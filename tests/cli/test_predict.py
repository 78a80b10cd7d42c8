"""``qvit predict``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qvit
from qvit.cli.predict import softmax
from qvit.sample import SAMPLE

Cli = Callable[..., Any]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("grey.png", "colour.jpg", "large.png")]
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(paths[0])
    Image.fromarray(rng.integers(0, 256, (20, 9, 3), dtype=np.uint8)).save(paths[1])
    Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)).save(paths[2])
    return paths


def test_classes_and_probabilities(cli: Cli, frozen_file: Path, images: list[Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = cli("predict", frozen_file, *images, "--top", 3, "--batch", 2, "--json", report)
    assert (done.status, done.err) == (0, "")
    rows = json.loads(report.read_text())["rows"]
    assert [(row["image"], row["rank"]) for row in rows] == [(str(path), rank) for path in images for rank in (1, 2, 3)]
    # The same numbers as from the library.
    runner = qvit.load(frozen_file)
    for path in images:
        with Image.open(path) as image:
            logits = runner(runner.model.preprocessing.pixels(image)[None])[0].astype(np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-probabilities)[:3]
        own = [row for row in rows if row["image"] == str(path)]
        assert [row["class"] for row in own] == [f"digit {i}" for i in order]
        np.testing.assert_allclose([row["probability"] for row in own], probabilities[order], rtol=1e-4)
        assert f"{100 * probabilities[order[0]]:.2f} %" in done.out
    assert done.out.count("digit") == 9


def test_more_classes_than_there_are(cli: Cli, frozen_file: Path, images: list[Path]) -> None:
    done = cli("predict", frozen_file, images[0], "--top", 50)
    assert done.status == 0
    assert done.out.count("digit") == 10


def test_bad_images_are_named_before_anything_is_printed(
    cli: Cli, frozen_file: Path, images: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(images[1].read_bytes()[:300])
    empty = tmp_path / "empty.png"
    empty.touch()
    for bad, part in (
        (tmp_path / "none.jpg", "There is no file"),
        (tmp_path, "is a folder"),
        (text, ""),
        (cut, ""),
        (empty, ""),
    ):
        done = cli("predict", frozen_file, *images, bad)
        done.refused(str(bad), part)
        assert done.out == ""


def test_a_model_of_other_channels_than_images_have(
    cli: Cli, images: list[Path], tmp_path: Path, make_student: Callable[..., Any], small_vit: Callable[..., Any]
) -> None:
    student = make_student(small_vit(in_chans=5, img_size=16, embed_dim=12, depth=1))
    qvit.freeze(student).save(tmp_path / "five.qvit")
    cli("predict", tmp_path / "five.qvit", images[0]).refused("5 channels")


@pytest.mark.parametrize("option", ["--top", "--batch", "--threads"])
def test_numbers_out_of_range(cli: Cli, frozen_file: Path, images: list[Path], option: str) -> None:
    cli("predict", frozen_file, images[0], option, 0).refused(f"{option} 0 is out of range")


def test_engines_and_threads_give_the_same_classes(cli: Cli, frozen_file: Path, images: list[Path], tmp_path: Path) -> None:
    rows = []
    for options in (("--engine", "reference"), ("--engine", "cpu", "--threads", 1), ("--workers", 0), ("--workers", 3)):
        report = tmp_path / "report.json"
        done = cli("predict", frozen_file, *images, *images, "--batch", 4, "--json", report, *options)
        assert (done.status, done.err) == (0, "")
        assert f"{'reference' if 'reference' in options else 'cpu'} engine" in done.out
        rows.append(json.loads(report.read_text())["rows"])
    for other in rows[1:]:
        assert [row["class"] for row in other if row["rank"] == 1] == [row["class"] for row in rows[0] if row["rank"] == 1]
    assert rows[1] == rows[2] == rows[3]
    cli("predict", frozen_file, images[0], "--workers", -1).refused("--workers -1 is out of range")


def test_damaged_file_and_unknown_engine(cli: Cli, frozen_file: Path, images: list[Path]) -> None:
    cli("predict", frozen_file, images[0], "--engine", "warp").refused("no engine 'warp'")
    frozen_file.write_bytes(frozen_file.read_bytes()[:500])
    cli("predict", frozen_file, images[0]).refused("truncated or damaged")


def test_softmax_of_large_logits() -> None:
    values = softmax(np.asarray([[1e4, 1e4, -1e4]], np.float32))
    assert values.tolist() == [[0.5, 0.5, 0.0]]


def test_without_a_file_the_sample_model(cli: Cli, images: list[Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = cli("predict", images[1], images[2], "--json", report)
    assert (done.status, done.err) == (0, "")
    rows = json.loads(report.read_text())["rows"]
    assert {row["model"] for row in rows} == {qvit.load(SAMPLE).model.name}
    assert [row["image"] for row in rows] == [str(path) for path in images[1:] for _ in range(5)]


def test_a_file_without_images(cli: Cli, frozen_file: Path) -> None:
    cli("predict", frozen_file).refused("There is no image to classify")
