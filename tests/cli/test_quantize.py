"""``qvit quantize``."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import qvit
import qvit.analyze.budget
from qvit.analyze.cost import model_cost
from qvit.analyze.unit_sensitivity import measure_sensitivities
from qvit.sources import DigitsSource
from qvit.training.checkpoint import load_model, load_student
from qvit.training.data import evaluation_loader

Cli = Callable[..., Any]
_MODEL = ("vit_tiny_patch16_224",)
_ARGUMENTS = tuple(
    part
    for pair in ("img_size=8", "patch_size=4", "in_chans=1", "num_classes=10", "embed_dim=12", "num_heads=3", "depth=1")
    for part in ("--model-arg", pair)
)
_DATA = ("--data", "digits", "--images", 8)


def test_from_a_state_dict_to_integers(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "model.qvit", tmp_path / "report.json"
    weights = ("--checkpoint", checkpoints / "state.safetensors")
    options = ("--weight-bits", 3, "--act-bits", 5, "--no-rectify", "--override", "*.mlp.fc2=8", "--override")
    change = "*.q={scale: per_token, offset: per_head}"
    done = cli(
        "quantize",
        *_MODEL,
        *_ARGUMENTS,
        *weights,
        *_DATA,
        *options,
        change,
        "--crop-pct",
        0.8,
        "--mean",
        "0.25",
        "--std",
        "0.3",
        "-o",
        output,
        "--json",
        report,
    )
    assert (done.status, done.err) == (0, "")
    model = qvit.IntegerModel.load(output)
    block = model.blocks[0]
    assert (block.fc1.weight.spec.bits, block.fc1.input.spec.bits) == (3, 5)
    assert (block.fc2.weight.spec.bits, block.fc2.input.spec.bits) == (8, 8)
    assert block.attention.q.scale.shape == (3, 5, 1)
    assert block.attention.rectify_q is None
    assert model.preprocessing.crop_pct == 0.8
    assert (model.preprocessing.mean, model.preprocessing.std) == ((0.25,), (0.3,))
    assert model.classes == tuple("0123456789")
    assert model.provenance["data"] == "digits"
    assert model.provenance["calibration_images"] == 8
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["weight_bits"], row["act_bits"], row["images"], row["rectify"]) == (3, 5, 8, False)
    assert (row["residual"], model.residual) == ("float32", "float32")
    assert row["file_bytes"] == output.stat().st_size


def test_from_our_own_checkpoint_to_a_checkpoint(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    output = tmp_path / "student.safetensors"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {i}" for i in range(10)) + "\n")
    weights = ("--checkpoint", checkpoints / "float.safetensors", "--classes", names)
    done = cli("quantize", *weights, *_DATA, "--bits", 2, "--residual", "float16", "-o", output)
    assert (done.status, "smaller than float32" in done.out) == (0, False)  # its weights are float32
    student, metadata = load_student(output)
    assert student.qvit.spec.weight_bits == 2
    assert metadata.classes[3] == "digit 3"
    assert metadata.recipe["method"] == "calibration"
    assert metadata.metrics == {"float_top1": 9.75}
    # What was calibrated can be frozen later.
    report = tmp_path / "report.json"
    assert cli("freeze", output, "-o", tmp_path / "m.qvit", "--json", report).status == 0
    assert json.loads(report.read_text())["rows"][0]["residual"] == "float16"
    for file in (output, tmp_path / "m.qvit"):
        assert cli("eval", file, "--data", "digits", "--limit", 8, "--json", report).status == 0
        assert json.loads(report.read_text())["rows"][0]["residual"] == "float16"
    frozen = qvit.IntegerModel.load(tmp_path / "m.qvit")
    assert (frozen.provenance["float_top1"], frozen.residual) == (9.75, "float16")
    shown = [cli("inspect", path).out for path in (output, tmp_path / "m.qvit", checkpoints / "float.safetensors")]
    assert ["the residual stream is float16" in out for out in shown] == [True, True, False]


def test_the_draw_is_the_seeds(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    weights = ("--checkpoint", checkpoints / "float.safetensors")
    files = []
    for number, seed in enumerate((0, 0, 1)):
        files.append(tmp_path / f"{number}.qvit")
        assert cli("quantize", *weights, *_DATA, "--seed", seed, "-o", files[-1]).status == 0
    tensors = [qvit.IntegerModel.load(file).tensors for file in files]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[0])
    assert any((tensors[0][name] != tensors[2][name]).any() for name in tensors[0])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--bits", 1), "bits=1 is out of range: use 2 to 8"),
        (("--bits", 9), "bits=9 is out of range"),
        (("--weight-bits", 0), "weight_bits=0 is out of range"),
        (("--act-bits", -4), "act_bits=-4 is out of range"),
        (("--override", "*.fc2=11"), "bits=11 is out of range"),
        (("--override", "*.fc3=4"), "'*.fc3' matches no layer"),
        (("--override", "*.fc2"), "is not key=value"),
        (("--override", "*.fc2=four"), "write pattern=bits"),
        (("--override", "*.fc2.input={scale: per_channel}"), "cannot run on integers"),
        (("--override", "*.fc2={scale: [}"), "no valid YAML"),
        (("--override", "patch_embed.proj.input={signed: true}"), "quantized as pixels are"),
        (("--residual", "bfloat16"), "residual='bfloat16' is unknown: use float32 or float16"),
        (("--images", 0), "--images 0 is out of range"),
        (("--crop-pct", 1.5), "crop_pct"),
        (("--mean", "0.5;0.5"), "no list of numbers"),
        (("--mean", "0.5,0.5"), "one positive std per channel"),
        (("--std", "-1"), "one positive std per channel"),
        (("--classes", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--device", "tpu9"), "no device 'tpu9'"),
    ],
)
def test_options_out_of_range(cli: Cli, checkpoints: Path, tmp_path: Path, arguments: tuple[Any, ...], part: str) -> None:
    output = tmp_path / "m.qvit"
    done = cli("quantize", "--checkpoint", checkpoints / "float.safetensors", *_DATA, "-o", output, *arguments)
    done.refused(part)
    assert list(tmp_path.iterdir()) == []


def test_output_of_another_kind(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    cli("quantize", "--checkpoint", checkpoints / "float.safetensors", *_DATA, "-o", tmp_path / "m.onnx").refused(
        "neither a .qvit nor a .safetensors"
    )


def test_no_model(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    cli("quantize", *_DATA, "-o", tmp_path / "m.qvit").refused("no model to quantize")
    state = ("--checkpoint", checkpoints / "state.safetensors")
    cli("quantize", *state, *_DATA, "-o", tmp_path / "m.qvit").refused("does not say which model")
    cli("quantize", "vit_imaginary", *state, *_DATA, "-o", tmp_path / "m.qvit").refused("vit_imaginary")
    cli("quantize", *_MODEL, "--model-arg", "depth", *state, *_DATA, "-o", tmp_path / "m.qvit").refused("is not key=value")
    cli(
        "quantize", "resnet18", "--model-arg", "in_chans=1", *_DATA, "--checkpoint", "none.pth", "-o", tmp_path / "m.qvit"
    ).refused("none.pth")


def test_a_state_dict_that_does_not_fit_names_the_first_five_keys(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(checkpoints / "state.safetensors")
    removed = list(state)[:7]
    for name in removed:
        del state[name]
    for number in range(8):
        state[f"extra{number}"] = torch.zeros(1)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    done = cli("quantize", *_MODEL, *_ARGUMENTS, "--checkpoint", path, *_DATA, "-o", tmp_path / "m.qvit")
    done.refused("misses", *(f"extra{number}" for number in range(5)), "2 more", "3 more")
    assert sum(f"{name}," in done.err or f"{name} and" in done.err for name in removed) == 5
    assert "extra5" not in done.err
    wider = tuple("embed_dim=24" if part == "embed_dim=12" else part for part in _ARGUMENTS)
    done = cli(
        "quantize", *_MODEL, *wider, "--checkpoint", checkpoints / "state.safetensors", *_DATA, "-o", tmp_path / "m.qvit"
    )
    done.refused("other shapes of", "cls_token (1, 1, 12) for (1, 1, 24)")


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02cos\nsystem\n(S'true'\ntR."])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_files_that_hold_no_weights(cli: Cli, tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    done = cli("quantize", *_MODEL, *_ARGUMENTS, "--checkpoint", path, *_DATA, "-o", tmp_path / "m.qvit")
    done.refused(name)
    assert not (tmp_path / "m.qvit").exists()


def test_images_of_other_classes(cli: Cli, checkpoints: Path, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ("quantize", "--checkpoint", checkpoints / "float.safetensors", "-o", tmp_path / "m.qvit", "--data")
    cli(*arguments, image_folder(3)).refused("3 classes", "10")
    cli(*arguments, tmp_path / "nowhere").refused("nowhere")
    (tmp_path / "flat").mkdir()
    cli(*arguments, tmp_path / "flat").refused("has no class folders")
    (tmp_path / "hollow" / "cats").mkdir(parents=True)
    cli(*arguments, tmp_path / "hollow").refused("holds no images")


def test_a_damaged_image_is_named(cli: Cli, checkpoints: Path, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = image_folder(10, per_class=1)
    (root / "7" / "0.png").write_bytes(b"damaged")
    done = cli("quantize", "--checkpoint", checkpoints / "float.safetensors", "--data", root, "-o", tmp_path / "m.qvit")
    done.refused(str(root / "7" / "0.png"))


@pytest.mark.parametrize("name", ["model.qvit", "model.safetensors"])
def test_full_disk(cli: Cli, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    cli("quantize", "--checkpoint", checkpoints / "float.safetensors", *_DATA, "-o", tmp_path / name).refused("disk is full")
    assert (tmp_path / name).read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.fixture(scope="module")
def measured(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sensitivities of the float model, so that not every test measures them."""
    model, metadata = load_model(checkpoints / "float.safetensors")
    batches = evaluation_loader(DigitsSource("train"), metadata.preprocessing, 8)
    path = tmp_path_factory.mktemp("measured") / "sensitivities.json"
    measure_sensitivities(model, batches, preprocessing=metadata.preprocessing, images=8).save(path)
    return path


def _budgeted(cli: Cli, checkpoints: Path, output: Path, *arguments: object) -> Any:
    return cli("quantize", "--checkpoint", checkpoints / "float.safetensors", *_DATA, "-o", output, *arguments)


def test_a_budget_chooses_widths(cli: Cli, checkpoints: Path, tmp_path: Path) -> None:
    measured, report = tmp_path / "sensitivities.json", tmp_path / "report.json"
    done = _budgeted(
        cli,
        checkpoints,
        tmp_path / "mixed.qvit",
        *("--budget-mb", 0.0088, "--budget-bops", 300_000, "--sensitivities", measured, "--json", report),
    )
    assert (done.status, done.err) == (0, "")
    model = qvit.IntegerModel.load(tmp_path / "mixed.qvit")
    assert (tmp_path / "mixed.qvit").stat().st_size <= 8_800
    cost = model_cost(model.architecture, model.specs)
    assert cost.bit_operations <= 300_000
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["bit_operations"], row["budget_mb"], row["budget_bops"]) == (cost.bit_operations, 0.0088, 300_000)
    assert model.provenance["budget_mb"] == 0.0088
    chosen = {key.removeprefix("bits of "): bits for key, bits in row.items() if key.startswith("bits of ")}
    assert chosen["blocks.0.mlp.fc1"] == model.blocks[0].fc1.weight.spec.bits == model.blocks[0].fc1.input.spec.bits
    assert chosen["blocks.0.attn.attention"] == model.blocks[0].attention.map.spec.bits
    assert len(set(chosen.values())) > 1
    assert "Bits chosen" in done.out
    # The measurements are used again, as they are.
    stamp = measured.stat().st_mtime_ns
    again = tmp_path / "again.safetensors"
    assert _budgeted(cli, checkpoints, again, "--budget-mb", 0.0088, "--sensitivities", measured).status == 0
    assert measured.stat().st_mtime_ns == stamp
    frozen = cli("freeze", again, "-o", tmp_path / "again.qvit")
    assert frozen.status == 0
    assert "bits in most layers (mixed)" in frozen.out
    for file in (again, tmp_path / "again.qvit"):
        assert "bits in most layers (mixed)" in cli("eval", file, "--data", "digits", "--limit", 4).out
    assert any(line.split() == ["budget", "0.0088", "MB,", "kept"] for line in frozen.out.splitlines())
    assert (tmp_path / "again.qvit").stat().st_size <= 8_800


def test_class_names_that_break_a_budget_are_told(cli: Cli, checkpoints: Path, measured: Path, tmp_path: Path) -> None:
    student, names = tmp_path / "student.safetensors", tmp_path / "names.txt"
    assert _budgeted(cli, checkpoints, student, "--budget-mb", 0.0088, "--sensitivities", measured).status == 0
    names.write_text("\n".join(str(number) * 500 for number in range(10)))
    done = cli("freeze", student, "--classes", names, "-o", tmp_path / "m.qvit")
    assert f"0.0088 MB, exceeded by {(tmp_path / 'm.qvit').stat().st_size - 8800:,} bytes" in done.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--budget-mb", 0.001, "MEASURED"), "A file of 0.001 MB cannot be met: the smallest that this model can have is 0.00"),
        (
            ("--budget-bops", 10, "MEASURED"),
            "10 bit operations an image cannot be met: the fewest that this model can ",
        ),
        (("--budget-mb", 0), "A budget of 0 MB is out of range"),
        (("--budget-mb", 1, "--bits", 4), "Give either a budget, which chooses the bits, or --bits"),
        (("--budget-bops", 1e9, "--act-bits", 4), "Give either a budget"),
        (("--sensitivities", "s.json"), "--sensitivities belongs to a budget"),
        (("--budget-mb", 1, "--sensitivities", __file__), "is no result file"),
    ],
)
def test_budgets_that_cannot_be_kept(
    cli: Cli, checkpoints: Path, measured: Path, tmp_path: Path, arguments: tuple[Any, ...], part: str
) -> None:
    if arguments[-1] == "MEASURED":
        arguments = (*arguments[:-1], "--sensitivities", measured)
    _budgeted(cli, checkpoints, tmp_path / "m.qvit", *arguments).refused(part)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_turns_out_larger_is_not_written(
    cli: Cli, checkpoints: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qvit.analyze.budget, "file_bytes", lambda template, specs: 100)
    budget = ("--budget-mb", 0.006, "--sensitivities", measured)
    _budgeted(cli, checkpoints, tmp_path / "m.qvit", *budget).refused("more than the budget")
    assert list(tmp_path.iterdir()) == []
