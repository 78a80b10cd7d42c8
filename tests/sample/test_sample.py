"""The model that comes with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from qvit.integer.model import IntegerModel
from qvit.sample import SAMPLE

CLASSES = ["tench", "English springer", "cassette player", "chain saw", "church"]
CLASSES += ["French horn", "garbage truck", "gas pump", "golf ball", "parachute"]


def test_what_it_is() -> None:
    assert SAMPLE.stat().st_size <= 3.2e6
    model = IntegerModel.load(SAMPLE)
    assert list(model.classes) == CLASSES
    assert model.block_bits() == (4, 4)


def test_it_does_what_its_card_says(data_dir: Path, tmp_path: Path) -> None:
    """On some of the validation images of which the card tells."""
    report, data = tmp_path / "report.json", data_dir / "imagenette224-val.tar"
    command = [sys.executable, "-m", "qvit.cli.main", "eval", SAMPLE, "--data", data, "--limit", "100", "--json", report]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(report.read_text())["rows"][0]["integer_top1"] >= 90


def test_the_card_is_about_this_file() -> None:
    card = (SAMPLE.parent / "README.md").read_text(encoding="utf-8")
    assert f"`{SAMPLE.name}`, {SAMPLE.stat().st_size:,} bytes" in card
    assert f"{IntegerModel.load(SAMPLE).provenance['float_top1']:.2f} %" in card
