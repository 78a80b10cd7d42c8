"""What finer scales cost the integers: one network with scales of several granularities, in turns on the CPU engine.

    python benchmarks/granularity.py --json benchmarks/results/granularity-epyc-zen4-2cores.json

What they gain is in the ablation (variants ``ours-per-token``, ``ours-v-per-head``, ``ours-groups-64``). Weights are random;
one image at a time, on one thread. The CUDA engine runs neither scales per token nor per group.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from harness import TITLES, VARIANTS, public

from qvit.bench.models import write_random_model
from qvit.bench.run import Settings, compare
from qvit.cli.show import show_table
from qvit.errors import QvitError
from qvit.report_file import write_report

GRANULARITIES = ("per-token", "v-per-head", "groups-64", "groups-128")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    rows: list[dict[str, Any]] = []
    for bits in options.bits:
        rows += _measured(bits, options)
        if options.json:
            write_report(options.json, rows, ["python", "benchmarks/granularity.py", *public(arguments)])
    default = {row["weight_bits"]: row["ms_median"] for row in reversed(rows)}  # the first of each width
    lines = [
        (
            f"{row['weight_bits']}/{row['act_bits']}",
            row["granularity"],
            f"{row['ms_median']:.2f} ({row['ms_p10']:.2f} to {row['ms_p90']:.2f})",
            f"{row['ms_median'] / default[row['weight_bits']]:.2f}",
            f"{row['file_bytes'] / 1e6:.2f}",
        )
        for row in rows
    ]
    show_table(f"{options.model}, batch 1, one thread", ("bits", "scales", "ms", "to the default", "file MB"), lines, left=2)


def _measured(bits: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one width: the default's, then those of each granularity."""
    with tempfile.TemporaryDirectory(prefix="qvit-bench-") as name:
        names, paths = ["default", *GRANULARITIES], []
        for granularity in names:
            paths.append(Path(name) / f"{granularity}.qvit")
            write_random_model(options.model, bits, paths[-1], overrides_of(granularity))
        settings = Settings("cpu", rounds=options.rounds)
        rows = compare(paths, [], settings, Path(name), _quietly, lambda note: print(f"note: {note}", file=sys.stderr))
    titles = ["the default", *(TITLES[granularity].removeprefix("soft, ") for granularity in GRANULARITIES)]
    return [row | {"granularity": title} for title, row in zip(titles, rows, strict=True)]


def overrides_of(granularity: str) -> dict[str, Any]:
    """What a variant of the ablation changes in the spec; nothing for ``default``."""
    for change in VARIANTS.get(granularity, [])[::-1]:
        if change.startswith("quant.overrides="):
            return yaml.safe_load(change.partition("=")[2])
    return {}


def _quietly(items: Iterable[Any], _total: int, _what: str) -> Iterator[Any]:
    yield from items


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2], help="of weights and activations")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--json", type=Path, help="result file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except QvitError as error:
        sys.exit(f"error: {error}")
