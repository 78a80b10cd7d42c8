"""The page of results is what the committed files make it, and says what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_results
import pytest

HEAD: dict[str, Any] = {
    "schema": 1,
    "command": ["python", "benchmarks/x.py"],
    "versions": {"python": "3.12", "torch": "2.11"},
    "hardware": {"cpu": "C", "cores": 2, "gpu": "G100", "gpus": 8},
}


def run(variant: str, bits: int, seed: int, top1: float | None, **more: Any) -> dict[str, Any]:
    row = {"data": "imagenette", "variant": variant, "method": variant, "weight_bits": bits, "act_bits": bits, "seed": seed}
    row |= {"float_top1": 98.0, "epochs": 3, "train_seconds": 100.0 + seed, "command": f"qvit train --set seed={seed}"}
    if top1 is not None:
        row |= {"fake_top1": top1 + 0.01, "integer_top1": top1, "codes_agreement": 100.0, "images": 1975}
        row |= {"train_images_per_s": 2000.0, "peak_gb": 20.0, "file_bytes": 11_420_000}
    return row | more


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text(json.dumps(HEAD | {"rows": rows}))


def lines_with(page: str, text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if text in line]


def test_the_committed_page_is_what_the_committed_files_make() -> None:
    assert make_results.PAGE.read_text(encoding="utf-8") == make_results.render(make_results.RESULTS), (
        "run python benchmarks/make_results.py"
    )


def test_nothing_measured_yet(tmp_path: Path) -> None:
    page = make_results.render(tmp_path)
    assert "Nothing of this has been measured yet" in page
    assert lines_with(page, "| Q-ViT | DeiT-S")[0] == ["Q-ViT", "DeiT-S", "81.2", "80.9", "79.1", "72.0"]


def test_the_ablation_has_means_spreads_and_every_run(tmp_path: Path) -> None:
    rows = [run("float", 32, 0, None), run("ours", 2, 0, 90.0), run("ours", 2, 1, 92.0), run("ours", 2, 2, 91.0)]
    rows += [run("qvit", 4, 0, 97.5), run("baseline", 2, 0, 80.0), run("statsq", 2, 0, 89.0)]
    write(tmp_path, "ablation-imagenette-g100.json", rows)
    page = make_results.render(tmp_path)
    assert "8 x G100; python 3.12, torch 2.11. `python benchmarks/x.py`" in page
    ours = lines_with(page, "| ours | 0, 1, 2 |")[0]
    assert ours[:8] == ["2/2", "ours", "0, 1, 2", "3", "98.00", "91.01", "91.00 ± 1.00", "-7.00"]
    assert ours[9:] == ["101", "2,000", "20.0", "11.42"]
    accuracies = [line[1] for line in lines_with(page, " 11.42 |")]
    assert accuracies == ["Q-ViT (both)", "baseline (LSQ)", "ours", "soft + StatsQ weights"]
    assert [line[7] for line in lines_with(page, "`qvit train")] == [f"`{row['command']}`" for row in rows]


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    rows = [run("ours", 2, seed, 90.0 + seed, overrides=f"optim.lr=1 seed={seed}") for seed in (0, 1)]
    rows.append(run("ours", 2, 0, 70.0, overrides="optim.lr=2 seed=0", epochs=9))
    write(tmp_path, "ablation-imagenette-g100.json", rows)
    shown = lines_with(make_results.render(tmp_path), " 11.42 |")
    assert [(line[2], line[3], line[6]) for line in shown] == [("0, 1", "3", "90.50 ± 0.71"), ("0", "9", "70.00")]


def test_the_main_table_of_a_data_set_comes_first_and_further_files_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_results, "NOTES", {"ablation-a.json": {"imagenette": "Earlier settings."}})
    write(tmp_path, "ablation-a.json", [run("features", 2, 0, 70.0)])
    write(tmp_path, "ablation-b.json", [run("ours", 3, 0, 96.0), run("ours", 2, 0, 60.0, data="cifar10")])
    tiny = {"data": "imagenette-deit-tiny"}
    write(tmp_path, "ablation-c.json", [run("ours", 2, 1, 90.0), run("qvit", 2, 0, 80.0), run("ours", 2, 0, 85.0, **tiny)])
    write(tmp_path, "ablation-d.json", [run("float", 32, 0, None, **tiny), run("ours", 4, 0, 92.0, **tiny)])
    page = make_results.render(tmp_path)
    assert [line for line in page.splitlines() if line.startswith("#") or "](../" in line or line == "Earlier settings."] == [
        "# Results",
        *("## Imagenette, ViT-S/14 at 224 from a DINOv2 teacher", source("c")),
        *("### Further runs: `ablation-b`", source("b")),
        *("### Further runs: `ablation-a`", source("a"), "Earlier settings."),
        *("## Imagenette, DeiT-T at 224, float model from our own recipe and the same teacher", source("d")),
        *("### Further runs: `ablation-c`", source("c")),
        *("## CIFAR-10, DeiT-T's shape with patches of 4 at 32 x 32, float model from our own recipe", source("b")),
        "## Published, ImageNet-1k",
    ]
    assert page.index("| 80.00 |") < page.index("### Further runs: `ablation-b`") < page.index("| 96.00 |")


def source(name: str) -> str:
    file = f"ablation-{name}.json"
    return f"8 x G100; python 3.12, torch 2.11. `python benchmarks/x.py`; [`{file}`](../benchmarks/results/{file})."


def test_levers_on_digits(tmp_path: Path) -> None:
    row = {"weight_bits": 2, "images": 360, "train_seconds": 5.0}
    rows = [{**row, "variant": "StatsQ", "fake_top1": top1, "val_loss": 0.2} for top1 in (93.0, 95.0)]
    rows.append({**row, "variant": "annealing", "fake_top1": 94.0, "val_loss": 0.1})
    write(tmp_path, "digits-levers-c.json", rows)
    page = make_results.render(tmp_path)
    assert lines_with(page, "| StatsQ |") == [["StatsQ", "2", "94.00 ± 1.00", "0.2000"]]
    assert lines_with(page, "| annealing |") == [["annealing", "1", "94.00", "0.1000"]]


def test_steps_transfer_and_scaling(tmp_path: Path) -> None:
    base = {"model": "vit", "batch": 256, "weight_bits": 2, "act_bits": 2}
    timed = {"train_images_per_s": 2500.0, "ms_median": 102.4, "ms_p10": 101.0, "ms_p90": 104.0, "peak_gb": 33.3}
    steps = [
        {**base, **timed, "method": "float", "weight_bits": 32, "act_bits": 32, "compile_seconds": 3.2},
        {**base, **timed, "method": "qvit", "ratio_to_peer": 0.625, "compile_seconds": 41.0},
        {**base, "method": "baseline", "error": "out of memory"},
        {**base, "method": "images", "train_images_per_s": 90000.0},
    ]
    write(tmp_path, "train_step-g100.json", steps)
    knn = {"knn_top1_majority": 80.0, "neighbours": 20, "train_images": 50_000, "images": 10_000}
    write(
        tmp_path,
        "transfer-g100.json",
        [
            {**base, **knn, "method": "float", "file": "t.safetensors", "knn_top1": 90.0},
            {**base, **knn, "method": "integers", "file": "m.qvit", "knn_top1": 89.0, "difference": -1.0},
        ],
    )
    scale = {"gradient_mb": 88.0, "communication": 2.0, "allreduce_ms": 1.5, **base, **timed, "batch": 64}
    rows = [{**scale, "processes": 1}, {**scale, "processes": 8, "efficiency": 93.0}]
    trained = {**base, "epochs": 10, "train_seconds": 60.0, "peak_gb": 9.5}
    rows.append({**trained, "processes": 1, "integer_top1": 93.0, "difference": 0.0})
    rows.append({**trained, "processes": 8, "batch": 32, "integer_top1": 93.4, "difference": 0.4})
    write(tmp_path, "train_scaling-g100x8.json", rows)
    page = make_results.render(tmp_path)
    assert lines_with(page, "| Q-ViT (both) |")[0] == [
        "Q-ViT (both)",
        "2/2",
        "2,500",
        "102.4 (101.0 to 104.0)",
        "0.625",
        "33.3",
        "41",
    ]
    assert lines_with(page, "out of memory")[0][:3] == ["baseline (LSQ)", "2/2", "out of memory"]
    assert lines_with(page, "90,000")[0][:3] == ["images alone, no training", "", "90,000"]
    assert lines_with(page, "m.qvit")[0] == ["`m.qvit`", "2/2", "89.00", "-1.00", "80.00"]
    assert lines_with(page, "| 8 | 64 | 2,500 |")[0] == ["8", "64", "2,500", "93.0", "2.0", "102.4", "1.50", "33.3"]
    assert lines_with(page, "| 93.40 |")[0] == ["8", "32", "10", "93.40", "+0.40", "60", "9.5"]
    assert lines_with(page, "(the paper's) |")[0][:5] == ["8", "64", "512 (the paper's)", "102.4", "measured"]
    for assumed in ("1,281,167 images", "the model is vit at 2 bits", "reading images keeps up", "hosts of 8 GPUs", "50 GB/s"):
        assert assumed in page
    assert lines_with(page, "| 64 | 64 | 4,096 |")[0][3:5] == ["105.5", "3.1"]


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("page.md", 2)])
def test_nothing_is_written_but_when_run_as_it_is_meant_to(
    argument: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_results, "PAGE", tmp_path / "results.md")
    with pytest.raises(SystemExit) as stopped:
        make_results.main([argument])
    assert stopped.value.code == status
    assert not list(tmp_path.iterdir())
