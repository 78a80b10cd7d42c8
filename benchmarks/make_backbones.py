"""Writes docs/backbones.md, from timm's names and what qvit does with them: `python benchmarks/make_backbones.py`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from backbone_road import drive
from zoo import PREFIXES, Kind, Refusal, names, survey, tiny

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "backbones.md"

# Options of a description that a reader would ask for; sizes are those of the tiny model and say nothing.
_SIZES = (
    "name",
    "img_size",
    "in_chans",
    "num_classes",
    "embed_dim",
    "depth",
    "depths",
    "num_heads",
    "mlp_hidden",
    "window_size",
)


def main() -> None:
    torch.set_num_threads(1)
    kinds, refusals = survey(names())
    PAGE.write_text(render(kinds, [drive(tiny(kind.names[0])) for kind in kinds], refusals), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)


def render(kinds: Sequence[Kind], cpu: Sequence[str], refusals: Sequence[Refusal]) -> str:
    """The page.

    Args:
        kinds: of the names that are taken.
        cpu: for each kind what `backbone_road.drive` returned.
        refusals: of the others.
    """
    taken, refused = sum(len(kind.names) for kind in kinds), sum(len(refusal.names) for refusal in refusals)
    prefixes = ", ".join(f"`{prefix}`" for prefix in PREFIXES)
    parts = [
        "# Backbones",
        "Written by `python benchmarks/make_backbones.py`, which tries every name: change the code, not this page. "
        "`tests/benchmarks/test_make_backbones.py` does the same again and compares.",
        f"timm {timm.__version__} has {taken + refused} names that begin with {prefixes}. "
        f"qvit takes {taken} of them and refuses {refused}.",
        "How a name is checked: it is built with all of its own options, but tiny (two narrow blocks or four narrow "
        "stages, a few patches, windows of a third of the size, five classes). Names whose tiny models are the same are "
        "one row below. The first model of each row, with random parameters, is converted at 4 bits, calibrated, trained "
        "for one step with labels, teacher and DGD, rebuilt from its description and state dict, and frozen. Then the "
        "training graph, the reference engine and the CPU engine must give the same codes at every quantization point and "
        "the same logits, bit for bit. No pretrained weights are loaded, and nothing here speaks of accuracy.",
        "Models that timm makes without a classifier (CLIP, DINOv2, RADIO) need `num_classes=..` when they are created.",
        "## Taken",
        *(_table(family, group) for family, group in _by_family(kinds, cpu).items()),
        "## Refused",
        "\n\n".join(
            f"- {refusal.sentence}\n  {len(refusal.names)}: {', '.join(f'`{name}`' for name in refusal.names)}"
            for refusal in sorted(refusals, key=lambda refusal: (-len(refusal.names), refusal.sentence))
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _by_family(kinds: Sequence[Kind], cpu: Sequence[str]) -> dict[str, list[tuple[Kind, str]]]:
    groups: dict[str, list[tuple[Kind, str]]] = {}
    for kind, answer in zip(kinds, cpu, strict=True):
        groups.setdefault(kind.family, []).append((kind, answer))
    return groups


def _table(family: str, group: Sequence[tuple[Kind, str]]) -> str:
    """One row a kind: its names and the options in which it differs from what most kinds of the family have."""
    described = [_options(kind.architecture) for kind, _ in group]
    common = {name: Counter(str(options[name]) for options in described).most_common(1)[0][0] for name in described[0]}
    usual = ", ".join(f"{name} {value}" for name, value in common.items() if name != "patch_size")
    lines = ["| names | patch | other than usual | CPU engine |", "| --- | --- | --- | --- |"]
    for (kind, answer), options in zip(group, described, strict=True):
        listed = ", ".join(f"`{name}`" for name in kind.names)
        odd = ", ".join(f"{n} {v}" for n, v in options.items() if n != "patch_size" and str(v) != common[n])
        patch = " x ".join(str(extent) for extent in options.get("patch_size", ()))
        lines.append(f"| {listed} | {patch} | {odd} | {answer} |")
    count = sum(len(kind.names) for kind, _ in group)
    return f"### Family `{family}`: {count} names, {len(group)} kinds\n\nUsual options: {usual}.\n\n" + "\n".join(lines)


def _options(architecture: Any) -> dict[str, Any]:
    options = {f.name: getattr(architecture, f.name) for f in fields(architecture) if f.name not in _SIZES}
    hidden = architecture.mlp_hidden
    options["mlp_ratio"] = f"{(hidden if isinstance(hidden, int) else hidden[0]) / architecture.embed_dim:.1f}"
    if "windows" in options:
        options["windows"] = ", ".join(f"{height} x {width}" for height, width in options["windows"])
    return options


if __name__ == "__main__":
    main()
