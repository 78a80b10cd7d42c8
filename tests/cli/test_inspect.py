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
    assert {"2/2", "12", "48", entropy, f"{tokens * 12 * 48:,}", f"{4 * tokens * 12 * 48:,}"} <= set(row.split())
    # Every column says what it is.
    for column in ("bits, scales", "M x K x N", "multiplies", "bit ops", "bytes", "entropy", "estimate", "bytes moved"):
        assert any(line.startswith(f"{column}  ") for line in lines), column
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
    *rows, total, cpu, gpu = json.loads(path.read_text())["rows"]
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
    assert total["bit_operations"] == sum(row["bit_operations"] for row in rows)
    assert [(row["m"], row["k"], row["n"]) for row in rows[-2:]] == [(5, 48, 12), (1, 12, 10)]
    assert (cpu["engine"], gpu["engine"], cpu["model"], cpu["threads"], gpu["threads"]) == (
        *("cpu", "cuda", "vit_tiny_patch16_224", 1, None),
    )
    for row in (cpu, gpu):
        assert row["layer"] == "roofline estimate"
        assert row["estimate_ms"] == max(row["estimate_multiplies_ms"], row["estimate_memory_ms"])
        assert sum(value for key, value in row.items() if key.startswith("multiplies_on_")) == total["multiplies"]
        # No key of an estimate is one of a measurement.
        assert not {"ms_median", "ms_p10", "ms_p90", "images_per_s", "rss_mb"} & row.keys()


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_file(cli: Cli, frozen_file: Path, keep: int) -> None:
    frozen_file.write_bytes(frozen_file.read_bytes()[:keep])
    cli("inspect", frozen_file).refused("truncated or damaged", frozen_file.name)


def test_other_files(cli: Cli, frozen_file: Path, tmp_path: Path, checkpoints: Path) -> None:
    cli("inspect", tmp_path / "none.qvit").refused("No such file")
    cli("inspect", tmp_path).refused("holds no best.safetensors")
    cli("inspect", tmp_path / "none.safetensors").refused("There is no checkpoint")
    cli("inspect", checkpoints / "state.safetensors").refused("is no checkpoint of qvit")
    cli("inspect", Path(__file__)).refused("is no .qvit file")
    data = frozen_file.read_bytes()
    frozen_file.write_bytes(data.replace(b'\\"format\\":1', b'\\"format\\":7'))
    cli("inspect", frozen_file).refused("is of format 7", "upgrade")
    frozen_file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    cli("inspect", frozen_file).refused("checksum")


def _rows(cli: Cli, tmp_path: Path, *arguments: object) -> list[dict[str, Any]]:
    path = tmp_path / "report.json"
    done = cli("inspect", *arguments, "--json", path)
    assert (done.status, done.err) == (0, "")
    return json.loads(path.read_text())["rows"]


def test_a_model_of_timm(cli: Cli, tmp_path: Path) -> None:
    *rows, total, cpu, _ = _rows(cli, tmp_path, "deit_small_patch16_224", "--bits", 3, "--override", "*.fc2=8")
    n, c = 197, 384
    eight = 196 * 768 * c + c * 1000 + 12 * n * 4 * c * c
    three = 12 * (n * 8 * c * c + 2 * n * n * c)
    assert (total["multiplies_3_bit"], total["multiplies_8_bit"]) == (three, eight)
    assert total["theoretical_speed_up"] == pytest.approx((three + eight) / (three * 3 / 32 + eight * 8 / 32))
    assert total["parameters"] == 22_050_664
    assert total["weight_bytes"] == sum(row["bytes"] for row in rows)
    assert (total["weight_bits"], total["act_bits"], len(rows)) == (3, 3, 12 * 6 + 2)
    assert "file_bytes" not in total
    assert cpu["bound_by"] == "multiplies"
    # 4 bits where nothing is said.
    assert _rows(cli, tmp_path, "deit_tiny_patch16_224", "--model-arg", "depth=1")[1]["weight_bits"] == 4
    done = cli("inspect", "deit_tiny_patch16_224")
    assert "deit_tiny_patch16_224, quantized to 4 bits" in done.out


def test_the_roofline_follows_the_type_of_the_residual_stream(cli: Cli, tmp_path: Path) -> None:
    half, full = (
        _rows(cli, tmp_path, "deit_tiny_patch16_224", "--residual", residual)[-3:] for residual in ("float16", "float32")
    )
    assert [rows[0]["residual"] for rows in (half, full)] == ["float16", "float32"]
    assert half[1]["bytes_moved"] == full[1]["bytes_moved"]  # on the CPU
    saved = full[2]["bytes_moved"] - half[2]["bytes_moved"]
    assert saved == 2 * (12 * 6 * 197 * 192 + 196 * 192 + 192 + 1000)


def test_a_swin_of_timm(cli: Cli) -> None:
    options = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4]}
    done = cli("inspect", "swin_tiny_patch4_window7_224", *(f"--model-arg={key}={value}" for key, value in options.items()))
    assert done.status == 0
    assert "3 blocks in 2 stages, 32 to 64 wide, 2, 4 heads, 256 tokens in the first stage, IRM" in done.out


def test_checkpoints(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    student = _rows(cli, tmp_path, checkpoints / "quantized.safetensors")
    assert {row["weight_bits"] for row in student} == {4, 8}
    assert student[-3]["model"] == "vit_tiny_patch16_224"
    assert student[-3]["fake_top1"] == 12.5
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "best.safetensors").write_bytes((checkpoints / "quantized.safetensors").read_bytes())
    assert _rows(cli, tmp_path, folder) == student
    assert _rows(cli, tmp_path, checkpoints / "float.safetensors", "--weight-bits", 2)[1]["weight_bits"] == 2


def test_batch_threads_and_other_ceilings(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    *_, before, _ = _rows(cli, tmp_path, frozen_file)
    *_, cpu, gpu = _rows(
        cli,
        tmp_path,
        *(frozen_file, "--batch", 4, "--threads", 2, "--ceiling", "cpu.vpdpbusd=233e8"),
        *("--ceiling", "cpu.pairs=1e9", "--ceiling", "cpu.table3=1e9", "--ceiling", "cuda.bandwidth=1e12"),
    )
    assert (cpu["batch"], cpu["threads"], gpu["batch"], gpu["bandwidth"]) == (4, 2, 4, 1e12)
    assert (cpu["ceiling_vpdpbusd"], cpu["ceiling_pairs"]) == (233e8, 1e9)
    slow = cpu["multiplies_on_pairs"] + cpu["multiplies_on_table3"]
    assert cpu["estimate_multiplies_ms"] == pytest.approx(2e3 * (slow / 1e9 + cpu["multiplies_on_vpdpbusd"] / 233e8))
    assert cpu["estimate_ms"] > before["estimate_ms"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("FILE", "--bits", 4), "is quantized already: leave out --bits"),
        (("FILE", "--override", "*.fc1=4"), "is quantized already"),
        (("FILE", "--residual", "float16"), "override and --residual"),
        (("deit_tiny_patch16_224", "--residual", "half"), "residual='half' is unknown: use float32 or float16"),
        (("FILE", "--model-arg", "depth=1"), "leave out --model-arg"),
        (("STUDENT", "--act-bits", 4), "is quantized already"),
        (("FLOAT", "--model-arg", "depth=1"), "says itself what its model is"),
        (("FILE", "--ceiling", "cpu.amx=1"), "no ceiling 'cpu.amx': use one of cpu.table3"),
        (("FILE", "--ceiling", "cpu.pairs"), "is not key=value: write it as cpu.vpdpbusd=497e9"),
        (("FILE", "--ceiling", "cpu.pairs=fast"), "is no number"),
        (("FILE", "--ceiling", "cpu.pairs=-1"), "use a positive number"),
        (("FILE", "--batch", 0), "A batch of 0 is out of range"),
        (("FILE", "--threads", 0), "0 threads are out of range"),
        (("deit_imaginary",), "timm has no model 'deit_imaginary'"),
        (("runs/imaginary",), "There is no file or folder runs/imaginary: check the path"),
        (("resnet18",), "ResNet is not supported"),
        (("deit_tiny_patch16_224", "--bits", 9), "bits=9 is out of range"),
        (("deit_tiny_patch16_224", "--override", "*.fc3=4"), "'*.fc3' matches no layer"),
        (("deit_tiny_patch16_224", "--model-arg", "depth"), "is not key=value: write it as patch_size=14"),
    ],
)
def test_mistakes(cli: Cli, frozen_file: Path, checkpoints: Path, arguments: tuple[Any, ...], part: str) -> None:
    names = {
        "FILE": frozen_file,
        "STUDENT": checkpoints / "quantized.safetensors",
        "FLOAT": checkpoints / "float.safetensors",
    }
    cli("inspect", *(names.get(argument, argument) for argument in arguments)).refused(part)
