"""``qvit inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvit.analyze.cost import model_cost
from qvit.analyze.entropy import code_entropy
from qvit.integer.model import IntegerModel

Cli = Callable[..., Any]


def test_table_and_totals(cli: Cli, frozen: IntegerModel, frozen_file: Path) -> None:
    done = cli("inspect", frozen_file)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    row = next(line for line in lines if "blocks.1.mlp.fc2" in line)
    entropy = f"{code_entropy(frozen.blocks[1].fc2.weight.codes()):.2f}"
    tokens = 5
    assert {"2/2", "12", "48", entropy, f"{tokens * 12 * 48:,}"} <= set(row.split())
    cost = model_cost(frozen.architecture, frozen.specs)
    assert f"{cost.speed_up:.2f} x in theory (multiplies of all matrix products / " in done.out
    assert f"{frozen_file.stat().st_size:,} bytes" in done.out
    assert "digit 0, digit 1" in done.out
    assert any(line.split() == ["fake_top1", "12.5"] for line in lines)
    for bits, multiplies in cost.multiplies_by_bits.items():
        assert f"{multiplies:,} at {bits} bits" in done.out


def test_json_holds_every_byte_of_the_tensors(cli: Cli, frozen: IntegerModel, frozen_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert cli("inspect", frozen_file, "--json", path).status == 0
    *rows, total = json.loads(path.read_text())["rows"]
    layers = {row["layer"]: row for row in rows}
    assert len(rows) == len(layers) == 2 + 2 * 6
    assert layers["blocks.0.mlp.fc1"]["weight_bits"] == 3
    assert layers["blocks.0.attn.scores"]["shape"] == "3 x 5 x 4"
    assert layers["blocks.0.attn.scores"]["entropy"] is None
    assert total["bytes"] == sum(array.nbytes for array in frozen.tensors.values())
    # What no product accounts for: norms, IRM, tokens and positions.
    others = sum(
        array.nbytes
        for name, array in frozen.tensors.items()
        if any(part in name for part in ("norm", "rectify", "token", "pos_"))
    )
    assert sum(row["bytes"] for row in rows) == total["bytes"] - others
    assert total["multiplies"] == sum(row["multiplies"] for row in rows)
    assert total["file_bytes"] == frozen_file.stat().st_size
    assert (total["fake_top1"], total["weight_bits"], total["model"]) == (12.5, 4, "vit_tiny_patch16_224")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_file(cli: Cli, frozen_file: Path, keep: int) -> None:
    frozen_file.write_bytes(frozen_file.read_bytes()[:keep])
    cli("inspect", frozen_file).refused("truncated or damaged", frozen_file.name)


def test_other_files(cli: Cli, frozen_file: Path, tmp_path: Path, checkpoints: Path) -> None:
    cli("inspect", tmp_path / "none.qvit").refused("No such file")
    cli("inspect", tmp_path).refused("is a folder")
    cli("inspect", checkpoints / "float.safetensors").refused("is no .qvit file")
    data = frozen_file.read_bytes()
    frozen_file.write_bytes(data.replace(b'\\"format\\":1', b'\\"format\\":7'))
    cli("inspect", frozen_file).refused("is of format 7", "upgrade")
    frozen_file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    cli("inspect", frozen_file).refused("checksum")
