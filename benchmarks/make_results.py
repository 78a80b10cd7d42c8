"""Writes docs/results.md from the committed result files, and nothing else: `python benchmarks/make_results.py`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from estimate import EPOCHS, HOST_GB_PER_S, IMAGES, PAPER_BATCH, PAPER_MODEL, estimates
from harness import PAPER_METHODS, TITLES, settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"

# Top-1 on ImageNet-1k in percent: (backbone, its float accuracy, then at 4, 3 and 2 bits). Q-ViT's student is the distilled
# DeiT; where a figure was not published, or not in what we have, it is None.
PUBLISHED: list[tuple[str, str, float | None, float | None, float | None, float | None]] = [
    ("Q-ViT", "DeiT-T", None, 74.3, None, None),
    ("Q-ViT", "DeiT-S", 81.2, 80.9, 79.1, 72.0),
    ("OFQ", "DeiT-T", None, 75.5, 72.7, 64.3),
    ("OFQ", "DeiT-S", None, 81.1, 79.6, 75.7),
    ("OFQ", "Swin-T", None, 81.9, 81.1, 78.5),
    ("VVTQ", "DeiT-T", None, 74.7, 71.2, 59.7),
    ("VVTQ", "Swin-T", None, 82.4, 81.4, 77.7),
]
DATA = {
    "imagenette": "Imagenette, ViT-S/14 at 224 from a DINOv2 teacher",
    "imagenette-deit-tiny": "Imagenette, DeiT-T at 224, float model from our own recipe and the same teacher",
    "imagenette-swin-tiny": "Imagenette, Swin-T at 224, float model from our own recipe and the same teacher",
    "cifar10": "CIFAR-10, DeiT-T's shape with patches of 4 at 32 x 32, float model from our own recipe",
    "digits": "handwritten digits, a ViT of four small blocks",
}
# What a reader should know of a file's rows of a data set.
NOTES: dict[str, dict[str, str]] = {
    "ablation-h100x4.json": {
        "imagenette": "The main table. Learning rates: the paper's methods 5e-4, at 4 bits 2e-4; ours 3e-4.",
        "imagenette-deit-tiny": "Features that weigh 30, a learning rate of 3e-4 and at 2 bits a first stage at 4 bits, in "
        "half of the epochs above.",
    },
    "ablation-imagenette-h100.json": {
        "imagenette": "Earlier settings: features of all blocks weigh 1, and no first stage at 4 bits."
    },
    "ablation-imagenette-levers-h100.json": {
        "imagenette": "Earlier settings, six epochs at a learning rate of 5e-4; the second row has 1e-3."
    },
    "ablation-imagenette-ours-h100.json": {
        "imagenette": "Seed 0 of ours with 30 and 20 epochs; the other seeds are in the main table."
    },
}
ABLATION = ("baseline", "irm", "dgd", "qvit", "ours")

Row = dict[str, Any]
Report = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)  # for --help, and against mistaken arguments
    PAGE.write_text(render(RESULTS), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)


def render(folder: Path) -> str:
    """The page, from the result files in a folder."""
    reports = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    parts = [
        "# Results",
        "Written by `python benchmarks/make_results.py` from the files in `benchmarks/results`: change those, not this page. "
        "Accuracies are top-1 in percent. Float is the accuracy of the very model that the student starts from, on the same "
        "images; graph is the fake-quantized training graph with scales, offsets and norms rounded to float16, as freezing "
        "leaves them, and integers the frozen file on the reference engine.",
    ]
    parts += ablations({name: report for name, report in reports.items() if name.startswith("ablation-")})
    found = len(parts) > 2
    sections = (
        ("digits-levers", digits_levers),
        ("train_step-", training_steps),
        ("transfer-", transfer),
        ("train_scaling-", scaling),
    )
    for prefix, section in sections:
        for name, report in reports.items():
            if name.startswith(prefix) and report["rows"]:
                parts += section(name, report)
                found = True
    if not found:
        parts.append("Nothing of this has been measured yet; what has been is in the README.")
    return "\n\n".join([*parts, published()]) + "\n"


def published() -> str:
    """What others report."""
    lines = [(name, backbone, *(_number(value, ".1f") for value in values)) for name, backbone, *values in PUBLISHED]
    return "\n\n".join(
        [
            "## Published, ImageNet-1k",
            "The papers' own figures, to compare what is lost against float; a data set of ten classes says nothing of "
            "accuracy on a thousand. Q-ViT's DeiT-S is the distilled one, whose own float accuracy is given.",
            _table(("method", "backbone", "float", "4 bits", "3 bits", "2 bits"), lines),
        ]
    )


def ablations(reports: dict[str, Report]) -> list[str]:
    """A section for each data set; in it the file with the paper's methods, or else the float model, comes first."""
    parts = []
    found = dict.fromkeys(row["data"] for report in reports.values() for row in report["rows"])
    for data in sorted(found, key=lambda data: [*DATA, data].index(data)):
        title = DATA.get(data, data)
        parts.append(f"## {title[0].upper()}{title[1:]}")
        rows = {name: [row for row in report["rows"] if row["data"] == data] for name, report in reports.items()}
        for number, name in enumerate(sorted((name for name in rows if rows[name]), key=lambda name: _rank(rows[name]))):
            if number:
                parts.append(f"### Further runs: `{name.removesuffix('.json')}`")
            parts += ablation(name, reports[name], rows[name])
    return parts


def _rank(rows: Sequence[Row]) -> tuple[bool, bool, bool]:
    """Orders a data set's files: the paper's methods before a float model's students, ours before single levers."""
    variants = {row["variant"] for row in rows}
    return variants.isdisjoint(PAPER_METHODS), "float" not in variants, "ours" not in variants


def ablation(name: str, report: Report, rows: Sequence[Row]) -> list[str]:
    """Tables of one data set and file: the paper's ablation, single levers, and every run with its command."""
    parts = [_source(name, report)]
    if note := NOTES.get(name, {}).get(rows[0]["data"]):
        parts.append(note)
    main_rows = [row for row in rows if row["variant"] in ABLATION]
    levers = [row for row in rows if row["variant"] not in (*ABLATION, "float")]
    own = [row for row in levers if row["variant"].startswith("ours-")]
    if main_rows:
        images = ", ".join(sorted({f"{row['images']:,}" for row in main_rows}))
        paper = any(row["variant"] in PAPER_METHODS for row in main_rows)
        what = "The paper's ablation, ours beside it," if paper else "Ours,"
        losses = f" {', '.join(TITLES[m] for m in PAPER_METHODS)}: the paper's loss." if paper else ""
        parts.append(
            f"{what} on all {images} validation images; means over seeds ± standard deviation.{losses}"
            f"\n\n{_accuracies(main_rows)}"
        )
    if others := [row for row in levers if row not in own]:
        parts.append(f"On top of Q-ViT with soft teacher logits.\n\n{_accuracies(others)}")
    if own:
        same = [row for row in rows if row["variant"] == "ours" and _alike(row, own)]
        parts.append(f"One thing each, on top of ours, as many epochs.\n\n{_accuracies([*same, *own])}")
    parts.append(f"<details><summary>Every run</summary>\n\n{_runs(rows)}\n\n</details>")
    return parts


def _alike(row: Row, levers: Sequence[Row]) -> bool:
    return any(all(row[key] == lever[key] for key in ("weight_bits", "epochs")) for lever in levers)


def _accuracies(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(settings(row), []).append(row)
    order = {variant: number for number, variant in enumerate(TITLES)}
    lines = []
    for (_, bits, variant, _), group in sorted(groups.items(), key=lambda item: (-item[0][1], order[item[0][2]])):
        integers = [row["integer_top1"] for row in group]
        float_top1 = _mean(group, "float_top1")
        lines.append(
            (
                f"{bits}/{bits}",
                TITLES[variant],
                ", ".join(str(row["seed"]) for row in sorted(group, key=lambda row: row["seed"])),
                group[0]["epochs"],
                f"{float_top1:.2f}",
                f"{_mean(group, 'fake_top1'):.2f}",
                f"{fmean(integers):.2f}" + (f" ± {stdev(integers):.2f}" if len(integers) > 1 else ""),
                f"{fmean(integers) - float_top1:+.2f}",
                f"{min(row['codes_agreement'] for row in group):.3f}",
                f"{_mean(group, 'train_seconds'):.0f}",
                f"{_mean(group, 'train_images_per_s'):,.0f}",
                f"{max(row['peak_gb'] for row in group):.1f}",
                f"{_mean(group, 'file_bytes') / 1e6:.2f}",
            )
        )
    columns = ("bits W/A", "method", "seeds", "epochs", "float", "graph", "integers", "to float", "codes equal, least %")
    return _table((*columns, "training s", "images/s", "peak GB", "file MB"), lines)


def _runs(rows: Sequence[Row]) -> str:
    lines = [
        (
            TITLES[row["variant"]],
            f"{row['weight_bits']}/{row['act_bits']}",
            row["seed"],
            row["epochs"],
            _number(row["float_top1"]),
            _number(row.get("integer_top1")),
            f"{row['train_seconds']:.0f}",
            f"`{row['command']}`",
        )
        for row in rows
    ]
    return _table(("method", "bits", "seed", "epochs", "float", "integers", "training s", "command"), lines)


def digits_levers(name: str, report: Report) -> list[str]:
    """Levers beyond the paper's method on the digits, where each can be run many times."""
    groups: dict[str, list[Row]] = {}
    for row in report["rows"]:
        groups.setdefault(row["variant"], []).append(row)
    lines = []
    for variant, group in groups.items():
        top1 = [row["fake_top1"] for row in group]
        error = f" ± {stdev(top1) / len(top1) ** 0.5:.2f}" if len(top1) > 1 else ""
        lines.append((variant, len(group), f"{fmean(top1):.2f}{error}", f"{_mean(group, 'val_loss'):.4f}"))
    facts = report["rows"][0]
    return [
        f"## Levers on handwritten digits, {facts['weight_bits']} bits",
        _source(name, report),
        f"{facts['images']} validation images, of which one is {100 / facts['images']:.2f} points; means over seeds ± standard "
        "error of the mean, and the mean cross-entropy of the validation labels. Times are left out: runs shared the cores.",
        _table(("variant", "seeds", "graph", "loss"), lines),
    ]


def training_steps(name: str, report: Report) -> list[str]:
    """What a step costs."""
    rows = report["rows"]
    lines = [
        (
            TITLES.get(row["method"], "images alone, no training"),
            f"{row['weight_bits']}/{row['act_bits']}" if row["method"] != "images" else "",
            f"{row['train_images_per_s']:,.0f}" if "train_images_per_s" in row else row["error"],
            f"{row['ms_median']:.1f} ({row['ms_p10']:.1f} to {row['ms_p90']:.1f})" if "ms_median" in row else "",
            _number(row.get("ratio_to_peer"), ".3f"),
            _number(row.get("peak_gb"), ".1f"),
            _number(row.get("compile_seconds"), ".0f"),
        )
        for row in rows
    ]
    columns = (
        "method",
        "bits W/A",
        "images/s",
        "ms a step, median (p10 to p90)",
        "of float's images/s",
        "peak GB",
        "compiling s",
    )
    return [
        f"## A training step: {rows[0]['model']}, {rows[0]['batch']} images",
        _source(name, report),
        "Random images on the device, the teacher's forward pass included, soft teacher logits.",
        _table(columns, lines),
    ]


def transfer(name: str, report: Report) -> list[str]:
    """Nearest neighbours on CIFAR-10."""
    rows = report["rows"]
    lines = [
        (
            "float teacher" if row["method"] == "float" else f"`{row['file']}`",
            f"{row['weight_bits']}/{row['act_bits']}",
            f"{row['knn_top1']:.2f}",
            f"{row['difference']:+.2f}" if "difference" in row else "",
            f"{row['knn_top1_majority']:.2f}",
        )
        for row in rows
    ]
    counts = f"{rows[0]['train_images']:,} training and {rows[0]['images']:,} test images"
    return [
        f"## Transfer: {rows[0]['neighbours']} nearest neighbours on CIFAR-10",
        _source(name, report),
        f"Features before the head, images upscaled to the model's size; {counts}; votes weighted by exp(cosine / 0.07).",
        _table(("features of", "bits W/A", "top-1", "to float", "by plain majority"), lines),
    ]


def scaling(name: str, report: Report) -> list[str]:
    """Several GPUs of a host, and what that makes of the paper's recipe."""
    rows = report["rows"]
    timed = [row for row in rows if "gradient_mb" in row]
    trained = [row for row in rows if "integer_top1" in row]
    parts = [f"## Several GPUs: {rows[0]['model']}\n\n{_source(name, report)}"]
    if timed:
        lines = [
            (
                row["processes"],
                row["batch"],
                f"{row['train_images_per_s']:,.0f}",
                _number(row.get("efficiency"), ".1f"),
                f"{row['communication']:.1f}",
                f"{row['ms_median']:.1f}",
                f"{row['allreduce_ms']:.2f}",
                f"{row['peak_gb']:.1f}",
            )
            for row in timed
        ]
        columns = (
            "GPUs",
            "images each",
            "images/s",
            "efficiency %",
            "exchanging gradients %",
            "ms a step",
            "all-reduce alone ms",
        )
        parts.append(
            f"Q-ViT with soft teacher logits, 2 bits, random images on the device.\n\n{_table((*columns, 'peak GB'), lines)}"
        )
    if trained:
        lines = [
            (
                row["processes"],
                row["batch"],
                row["epochs"],
                f"{row['integer_top1']:.2f}",
                _number(row.get("difference"), "+.2f"),
                f"{row['train_seconds']:.0f}",
                _number(row.get("peak_gb"), ".1f"),
            )
            for row in trained
        ]
        columns = ("GPUs", "images each", "epochs", "integers", "to one GPU", "training s", "peak GB")
        parts.append(f"Trained to the end, the same number of images a step in all.\n\n{_table(columns, lines)}")
    if guessed := estimates(timed):
        lines = [
            (
                e.gpus,
                e.batch,
                f"{e.batch_total:,}" + (" (the paper's)" if e.batch_total == PAPER_BATCH else ""),
                f"{e.step_ms:.1f}",
                "measured" if e.measured else f"{e.exchange_ms:.1f}",
                f"{e.images_per_s:,.0f}",
                f"{e.hours:.1f}",
            )
            for e in guessed
        ]
        columns = (
            "GPUs",
            "images each",
            "images a step",
            "ms a step",
            "of them between hosts, estimated",
            "images/s",
            f"hours for {EPOCHS} epochs",
        )
        parts.append(
            f"On paper: the paper's {EPOCHS} epochs of {IMAGES:,} images of ImageNet-1k at these step times. Assumed: the "
            f"model is {timed[0]['model']} at {timed[0]['weight_bits']} bits (the paper's is {PAPER_MODEL}); reading images "
            f"keeps up; hosts of {max(row['processes'] for row in timed)} GPUs exchange gradients in a ring after the backward "
            f"pass at {HOST_GB_PER_S:g} GB/s each way and hide nothing of it; no stragglers and no failures; evaluation and "
            f"checkpoints not counted. Another number of images a step than the paper's {PAPER_BATCH} needs another learning "
            f"rate.\n\n{_table(columns, lines)}"
        )
    return parts


def _source(name: str, report: Report) -> str:
    hardware, versions = report["hardware"], report["versions"]
    gpu = f"{hardware['gpus']} x {hardware['gpu']}" if "gpu" in hardware else f"{hardware['cpu']}, {hardware['cores']} cores"
    used = ", ".join(f"{key} {versions[key]}" for key in ("python", "qvit", "torch", "timm", "numpy") if key in versions)
    return f"{gpu}; {used}. `{' '.join(report['command'])}`; [`{name}`](../benchmarks/results/{name})."


def _mean(rows: Sequence[Row], key: str) -> float:
    return fmean(row[key] for row in rows)


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
