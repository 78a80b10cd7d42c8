"""Mixed against uniform widths: rows of the same size, seeds that are not repeated, differences paired by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixed
import pytest

TINY = "model.args={img_size: 8, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 48, depth: 1, num_heads: 2}"
QUICK = ["schedule.epochs=1", "schedule.warmup_epochs=0", "batch_size=256", "quant.calibration_images=8", TINY]


def _arguments(folder: Path, *seeds: int) -> list[str]:
    return [
        *("--data", "digits", "--bits", "3", "--seeds", *map(str, seeds), "--set", *QUICK, "--set-float", *QUICK),
        *("--runs", str(folder / "runs"), "--workers", "0", "--agreement-images", "20"),
        *("--json", str(folder / "result.json")),
    ]


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = mixed.main(_arguments(tmp_path, 4))
    assert [row["comparison"] for row in rows] == ["float", mixed.UNIFORM, mixed.BOTH, mixed.BYTES]
    uniform, both, in_bytes = rows[1:]
    assert uniform["widths"] == "blocks.0 qkv 3 attention 3 proj 3 fc1 3 fc2 3"
    assert in_bytes["widths"].split()[4] == "8"
    assert both["bit_operations"] <= uniform["bit_operations"]
    for row in (both, in_bytes):
        # The same classes, provenance and float vectors: weights and the list of specs alone may differ.
        assert row["file_bytes"] <= uniform["file_bytes"]
        assert row["packed_bytes"] <= uniform["packed_bytes"]
        assert (row["agreement"], row["codes_agreement"], row["seed"]) == (100, 100, 4)
    report = (tmp_path / "result.json").read_text()
    assert json.loads(report)["rows"] == rows
    assert str(tmp_path) not in report
    assert "mixed: bytes alone" in capsys.readouterr().out
    # What is there is not run again.
    monkeypatch.setattr(mixed, "run", None)
    assert mixed.main(_arguments(tmp_path, 4)) == rows


def test_differences_are_paired_by_seed() -> None:
    def row(name: str, seed: int, value: float) -> dict[str, Any]:
        return {"comparison": name, "seed": seed, "val_loss": value}

    rows = [row(mixed.UNIFORM, 1, 0.5), row(mixed.UNIFORM, 2, 0.7), row(mixed.BOTH, 2, 0.6), row(mixed.BOTH, 1, 0.55)]
    rows.append(row(mixed.BOTH, 3, 9.0))
    assert mixed.differences(rows, mixed.BOTH, "val_loss") == pytest.approx([-0.1, 0.05])
    assert mixed.differences(rows, mixed.UNIFORM, "val_loss") == [0, 0]
