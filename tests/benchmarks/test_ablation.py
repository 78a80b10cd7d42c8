"""The ablation: rows that add up, runs that are not repeated, time that is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablation
import pytest
from experiments import Bench, Experiment

import qvit
from qvit.errors import InputError, QvitError
from qvit.report_file import write_report

TINY = "model.args={img_size: 8, patch_size: 4, in_chans: 1, num_classes: 10, embed_dim: 12, depth: 1, num_heads: 3}"
QUICK = ["schedule.epochs=2", "schedule.warmup_epochs=0", "batch_size=256", TINY]


def arguments(folder: Path, *more: str, variants: str = "ours", bits: tuple[str, ...] = ("4",)) -> list[str]:
    return [
        *("--data", "digits", "--variants", variants, "--bits", *bits, "--set", *QUICK, "--set-float", *QUICK),
        *("--runs", str(folder / "runs"), "--workers", "0", "--gpus", "0", "--agreement-images", "30"),
        *("--json", str(folder / "result.json"), *more),
    ]


@pytest.fixture(scope="module")
def single_threads() -> Iterator[None]:
    """Worker processes with a thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, single_threads: None) -> tuple[Path, list[dict[str, Any]]]:
    """A float model, one run that fails (no group of 64 channels fits) and two that do not."""
    folder = tmp_path_factory.mktemp("ablation")
    with pytest.raises(QvitError, match="1 of the experiments failed: digits-groups-64-w2a2-seed1"):
        ablation.main(arguments(folder, variants="groups-64,baseline,cascade", bits=("2:1",)))
    return folder, json.loads((folder / "result.json").read_text())["rows"]


def test_rows(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = measured
    assert str(folder) not in (folder / "result.json").read_text()
    assert [(row["variant"], row["weight_bits"], row["seed"]) for row in rows] == [
        ("float", 32, 0),
        ("baseline", 2, 1),
        ("cascade", 2, 1),
    ]
    assert [row["method"] for row in rows] == ["float", "baseline", "qvit"]
    parent = rows[0]
    for row in rows[1:]:
        assert row["float_top1"] == parent["float_top1"]
        assert (row["images"], row["epochs"], row["agreement_images"], row["act_bits"]) == (360, 2, 30, 2)
        assert (row["agreement"], row["codes_agreement"]) == (100, 100)
        assert row["integer_top1"] == row["fake_top1"]
        assert row["train_images_per_s"] == pytest.approx(2 * (1437 // 256) * 256 / row["train_seconds"])
        assert row["wall_seconds"] > row["train_seconds"]
        assert f"--set seed={row['seed']}" in row["command"]
        assert "quant.bits=2" in row["overrides"]
    assert "--set cascade.share=0.25" in rows[2]["command"]
    files = sorted((folder / "runs").glob("*.qvit"))
    assert len(files) == 2
    assert {qvit.IntegerModel.load(file).block_bits() for file in files} == {(2, 2)}
    # Checkpoints are gone but for the float model's.
    assert [path.name for path in (folder / "runs").iterdir() if path.suffix != ".qvit"] == ["digits_float.safetensors"]


def test_what_is_there_is_not_measured_again(
    measured: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = measured
    monkeypatch.setattr(ablation, "Crew", None)
    assert ablation.main(arguments(folder, variants="baseline,cascade", bits=("2:1",))) == rows
    printed = capsys.readouterr()
    assert "3 experiments, 0 to run" in printed.err
    assert "baseline (LSQ)" in printed.out
    # Another setting is another experiment.
    options = ablation._options([*arguments(folder, bits=("2:1",)), "--set", "optim.lr=1e-4"])
    assert not any(ablation.Report(options.json, [], None).has(e) for e in ablation.make_plan(options)[1:])


def test_rows_of_another_file_are_taken_over(measured: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, rows = measured
    report = ablation.Report(tmp_path / "new.json", ["x"], folder / "result.json")
    assert report.rows == rows
    report.add({"data": "digits", "variant": "ours", "weight_bits": 8, "seed": 0, "overrides": ""})
    assert len(json.loads((tmp_path / "new.json").read_text())["rows"]) == len(rows) + 1


def test_a_float_model_that_is_gone_is_not_replaced_by_another(
    measured: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = measured
    moved = [str(tmp_path / "elsewhere") if part == str(folder / "runs") else part for part in arguments(folder)]
    with pytest.raises(InputError, match=r"digits_float\.safetensors: put it back"):
        ablation.main(moved)


def test_a_file_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    write_report(path, [], [])
    ablation.Report(path, [], None)
    report = json.loads(path.read_text())
    report["hardware"]["gpu"] = "another one"
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match="another machine"):
        ablation.Report(path, [], None)
    path.write_text("{}")
    with pytest.raises(InputError, match="no result file"):
        ablation.Report(path, [], None)


def crew(tmp_path: Path, rows: list[dict[str, Any]], minutes: float | None) -> ablation.Crew:
    options = ablation._options(arguments(tmp_path, *([] if minutes is None else ["--minutes", str(minutes)])))
    report = ablation.Report(tmp_path / "none.json", [], None)
    report.rows = rows
    return ablation.Crew(Bench(tmp_path, tmp_path / "runs", 0), report, options)


def test_what_is_made_from_a_float_model_waits_for_it(tmp_path: Path) -> None:
    team = crew(tmp_path, [], None)
    parent, student = Experiment("digits", "float", 32, 0), Experiment("digits", "ours", 4, 0)
    assert team._next([student, parent]) == parent
    assert team._next([student]) is None
    (tmp_path / "runs").mkdir()
    team.bench.float_checkpoint("digits").touch()
    assert team._next([student]) == student


def test_no_run_starts_that_would_end_too_late(tmp_path: Path) -> None:
    experiment = Experiment("digits", "ours", 4, 0)
    row = {"data": "digits", "variant": "qvit", "wall_seconds": 50.0}
    assert crew(tmp_path, [], 0.5)._in_time(experiment)
    assert crew(tmp_path, [row], 1)._in_time(experiment)
    assert not crew(tmp_path, [row], 0.5)._in_time(experiment)
    assert crew(tmp_path, [row], 0.5)._in_time(Experiment("digits", "float", 32, 0))
    assert crew(tmp_path, [row], None)._in_time(experiment)


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--data", "mnist"], "no 'mnist'"), (["--variants", "best"], "no 'best'"), (["--gpus", "99"], "more than the")],
)
def test_mistakes_are_one_sentence(tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablation.main([*arguments(tmp_path), *more])
    assert words in capsys.readouterr().err
