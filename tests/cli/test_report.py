"""``qvit report``: every figure is there, on its own, and what cannot be shown is said."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import qvit
from qvit.cli.report_inputs import open_quantized, open_teacher
from qvit.layers.points import quantization_points, quantizing_only
from qvit.training.checkpoint import load_model, load_student, save_checkpoint
from qvit.training.data import evaluation_loader, open_split
from qvit.training.evaluate import evaluate
from qvit.training.recipe import Recipe
from qvit.training.setup import calibration_batches

from .reports import FIGURES, expected_panels

Cli = Callable[..., Any]


class Page(HTMLParser):
    """The elements of a page, its sections and what they say."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(self.text)
        numbers = re.search(r'id="numbers">(.*?)</script>', self.text, re.DOTALL)
        assert numbers
        self.numbers = json.loads(numbers[1])
        self.figures = re.findall(r'<svg viewBox="0 0 [\d. ]+" role="img".*?</svg>', self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def section(self, name: str) -> str:
        return self.text.partition(f'<section id="{name}"')[2].partition("</section>")[0]


def test_everything(cli: Cli, report_runs: Path, full_report: Path) -> None:
    page = Page(full_report / "page.html")
    assert [attributes["id"] for attributes in page.of("section")] == list(FIGURES)
    roots = {root.get("id"): root for root in map(ET.fromstring, page.figures)}
    assert set(roots) == expected_panels(blocks=1, baseline=True)
    for root in roots.values():
        title, description = root[0].text, root[1].text
        assert title
        assert description
    # All that is drawn has a caption, and in the page everything has one identifier.
    assert page.text.count("<figcaption>") == len(FIGURES)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name in ("distributions", "distance", "similarity", "sensitivity"):
        assert "30 images" in page.section(name), name
    pictures = page.of("img")
    assert len(pictures) == 3 + 3 * 3  # three images, and maps of teacher, baseline and student in the one block
    assert all(picture["alt"] and (picture["src"] or "").startswith("data:image/png;base64,") for picture in pictures)
    # It opens from disk, alone.
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert not page.of("link") or all((link["href"] or "").startswith("data:") for link in page.of("link"))
    assert len(page.text) < 400_000

    own, parent = (row for row in page.numbers["rows"] if row["figure"] == "results")
    _, metadata = load_student(report_runs / "qvit" / "best.safetensors")
    assert own["fake_top1"] == metadata.metrics["top1"]
    assert "ms_median" not in own
    assert "Latency is not shown" in page.section("results")
    assert (parent["method"], parent["float_top1"]) == ("float", 9.75)
    assert parent["file_bytes"] == 4 * sum(p.numel() for p in load_model(_float(report_runs))[0].parameters())
    assert "IRM 3: 9.999 kB, 55.50 %" in (roots["results-bytes-0"][1].text or "")
    frozen = full_report / "frozen.qvit"
    assert cli("freeze", report_runs / "qvit", "-o", frozen).status == 0
    assert own["file_bytes"] == frozen.stat().st_size

    # The 30 images are all that there are for validation, so that the log and the checkpoint have the same accuracy.
    rows_of_parts = [row for row in page.numbers["rows"] if row["figure"] == "sensitivity"]
    measured = {row["quantized"]: row["fake_top1"] for row in rows_of_parts if row["state"] == "trained"}
    assert measured["everything"] == metadata.metrics["top1"]
    parts = ("mlp", "attention_weights", "attention_inputs", "attention_activations", "edges")
    assert set(measured) == {"nothing", "everything", *parts, "patch_embed.proj", "blocks.0", "head"}
    # Before training: the float teacher, quantized and calibrated as the run began.
    before = {row["quantized"]: row["fake_top1"] for row in rows_of_parts if row["state"] == "calibrated"}
    recipe = Recipe.from_dict(metadata.recipe)
    start = qvit.quantize(load_model(_float(report_runs))[0], spec=recipe.model_spec(), preprocessing=metadata.preprocessing)
    train, val = (open_split(recipe.data, split) for split in ("train", "val"))
    qvit.calibrate(start, calibration_batches(recipe, train, metadata.preprocessing), images=recipe.quant.calibration_images)
    images = list(evaluation_loader(val, metadata.preprocessing, 30))
    assert before["everything"] == evaluate(start.eval(), images).top1
    with quantizing_only(
        start, [name for name in quantization_points(start) if name.endswith(("qkv.weight", "attn.proj.weight"))]
    ):
        assert before["attention_weights"] == evaluate(start, images).top1

    written = json.loads((full_report / "report.json").read_text())
    assert written["rows"] == page.numbers["rows"]
    assert {row["figure"] for row in written["rows"]} == set(FIGURES) - {"maps"}
    logged = [json.loads(line) for line in (report_runs / "qvit" / "metrics.jsonl").read_text().splitlines()]
    shown = [row for row in written["rows"] if row["figure"] == "training" and row["role"] == "student"]
    assert shown == [{"figure": "training", "role": "student", **line} for line in logged]


def _float(report_runs: Path) -> Path:
    _, metadata = load_student(report_runs / "qvit" / "best.safetensors")
    return Path(metadata.recipe["model"]["checkpoint"])


def test_latency_is_measured_where_it_is_asked_for(
    cli: Cli, report_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvit.cli.report_results._SECONDS", 0.01)
    done = cli("report", report_runs / "student.qvit", "-o", tmp_path / "page.html", "--latency", "--threads", 1)
    assert (done.status, done.err) == (0, "")
    page = Page(tmp_path / "page.html")
    (row,) = page.numbers["rows"]
    assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
    assert (row["engine"], row["batch"], row["threads"]) == ("cpu", 1, 1)
    assert "cpu, 1 image, 1 thread" in page.section("results")
    assert "1 row holds a latency and no accuracy" in page.section("results")
    assert "Latency is not shown" not in page.text


def test_a_frozen_file_shows_what_it_can(cli: Cli, report_runs: Path, tmp_path: Path) -> None:
    done = cli(
        "report", report_runs / "student.qvit", "-o", tmp_path / "page.html", "--data", report_runs / "images", "--images", 8
    )
    assert (done.status, done.err) == (0, "")
    page = Page(tmp_path / "page.html")
    shown = {root.get("id", "").partition("-")[0] for root in map(ET.fromstring, page.figures)}
    assert shown == {"entropy", "distributions", "distance"}
    assert page.of("img")
    assert "name the folder of the run, which holds metrics.jsonl" in page.section("training")
    assert "name it with --teacher" in page.section("similarity")
    assert "A frozen file holds no floating-point weights" in page.section("sensitivity")
    # With its teacher, similarities are there too.
    options = ("--data", report_runs / "images", "--images", 4, "--maps", 1, "--teacher", _float(report_runs))
    assert cli("report", report_runs / "student.qvit", "-o", tmp_path / "page.html", *options).status == 0
    rows = [row for row in Page(tmp_path / "page.html").numbers["rows"] if row["figure"] == "similarity"]
    assert len(rows) == 2 * 3  # q and k, three heads
    assert all(0 < row["distance"] < 2**0.5 for row in rows)


def test_a_checkpoint_without_run_images_and_teacher(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    """Its recipe names a folder and weights that are not there."""
    done = cli("report", checkpoints / "quantized.safetensors", "-o", tmp_path / "page.html")
    assert (done.status, done.err) == (0, "")
    page = Page(tmp_path / "page.html")
    assert [root.get("id") for root in map(ET.fromstring, page.figures)] == ["results-bytes-0"]
    for name in ("distributions", "distance", "maps", "similarity", "sensitivity"):
        assert "The images of the recipe cannot be used" in page.section(name)
        assert "name others with --data" in page.section(name)
    assert "metrics.jsonl" in page.section("training")
    assert page.text.count('<p class="missing">') == 7


def test_a_run_whose_float_model_is_gone(cli: Cli, report_runs: Path, tmp_path: Path, checkpoints: Path) -> None:
    student, metadata = load_student(report_runs / "baseline" / "last.safetensors")
    model = {**metadata.recipe["model"], "checkpoint": str(tmp_path / "gone.safetensors")}
    save_checkpoint(tmp_path / "last.safetensors", student, replace(metadata, recipe={**metadata.recipe, "model": model}))
    done = cli("report", tmp_path, "-o", tmp_path / "page.html", "--images", 4, "--maps", 1)
    assert (done.status, done.err) == (0, "")
    page = Page(tmp_path / "page.html")
    assert "The teacher that the recipe names cannot be opened" in page.section("similarity")
    assert 'id="distance-student"' in page.text
    assert 'id="distributions-0-q-after"' not in page.text
    assert "This model has no IRM" in page.section("distributions")
    # A plain state dict is loaded into the model that the recipe describes.
    teacher, why = open_teacher(checkpoints / "state.safetensors", open_quantized(tmp_path))
    assert why == ""
    assert teacher is not None
    assert teacher.architecture.depth == 1


@pytest.mark.parametrize("teacher", ["quantized", "missing"])
def test_teachers_that_are_refused(cli: Cli, report_runs: Path, checkpoints: Path, tmp_path: Path, teacher: str) -> None:
    path = checkpoints / f"{teacher}.safetensors"
    done = cli("report", report_runs / "qvit", "-o", tmp_path / "page.html", "--teacher", path)
    done.refused("is quantized" if teacher == "quantized" else "There is no")
    assert not (tmp_path / "page.html").exists()


def test_what_is_refused(
    cli: Cli, report_runs: Path, checkpoints: Path, tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    page = tmp_path / "page.html"
    cli("report", report_runs / "qvit", "-o", tmp_path / "page.pdf").refused(".html")
    cli("report", checkpoints / "float.safetensors", "-o", page).refused("holds a float model", "name a quantized run")
    cli("report", tmp_path, "-o", page).refused("holds no best.safetensors")
    cli("report", report_runs / "student.qvit", "-o", page).refused("nothing to report", "--data")
    cli("report", report_runs / "qvit", "-o", page, "--data", image_folder(3)).refused("3 classes", "10")
    cli("report", report_runs / "qvit", "-o", page, "--data", tmp_path / "none").refused("There is no")
    cli("report", report_runs / "qvit", "-o", page, "--images", 0).refused("--images 0")
    cli("report", report_runs / "qvit", "-o", page, "--maps", 0).refused("--maps 0")
    cli("report", report_runs / "qvit", "-o", page, "--results", tmp_path / "none.json").refused("none.json cannot be read")
    cli("report", report_runs / "qvit", "-o", page, "--baseline", tmp_path / "none").refused("none")
    assert not page.exists()


def test_a_page_that_cannot_be_written_leaves_none(cli: Cli, report_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "results.json").write_text(json.dumps({"schema": 1, "rows": [{"method": "qvit", "integer_top1": 50.0}]}))
    options = ("--results", tmp_path / "results.json")
    cli("report", report_runs / "student.qvit", "-o", tmp_path / "file" / "page.html", *options).refused("cannot be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "results.json"]
