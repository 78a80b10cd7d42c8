"""Finer scales are those of the ablation's variants; the default is the spec's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import granularity
import pytest

from qvit.spec import ModelSpec, Operand, PerChannel, PerGroup, PerHead, PerTensor, PerToken

POINTS = (("mlp.fc1.input", Operand.INPUT), ("mlp.fc1.weight", Operand.WEIGHT), ("attn.v", Operand.VALUE))
DEFAULT = (PerTensor(), PerChannel(), PerChannel())


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("default", DEFAULT),
        ("per-token", (PerToken(), *DEFAULT[1:])),
        ("v-per-head", (*DEFAULT[:2], PerHead())),
        ("groups-64", (PerGroup(64), PerGroup(64), DEFAULT[2])),
        ("groups-128", (PerGroup(128), PerGroup(128), DEFAULT[2])),
    ],
)
def test_scales(name: str, scales: tuple[object, ...]) -> None:
    assert name in ("default", *granularity.GRANULARITIES)
    spec = ModelSpec.of_bits(2, overrides=granularity.overrides_of(name))
    assert tuple(spec.resolve(f"blocks.3.{point}", operand).scale for point, operand in POINTS) == scales


def test_rows_name_the_scales_of_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[Path, dict[str, Any]] = {}

    def write(_name: str, _bits: int, path: Path, overrides: dict[str, Any]) -> None:
        written[path] = overrides

    def measure(paths: list[Path], peers: list[object], *_: object) -> list[dict[str, Any]]:
        assert peers == []
        return [{"ms_median": 2.0 + number, "path": path} for number, path in enumerate(paths)]

    monkeypatch.setattr(granularity, "write_random_model", write)
    monkeypatch.setattr(granularity, "compare", measure)
    rows = granularity._measured(2, granularity._options([]))
    assert {row["granularity"]: written[row["path"]] for row in rows} == {
        "the default": {},
        "inputs scaled per token": {"blocks.*.input": {"scale": "per_token"}},
        "v scaled per head": {"blocks.*.attn.v": {"scale": "per_head", "offset": "per_head"}},
        "groups of 64 channels": {point: {"scale": "per_group_64"} for point in ("blocks.*.input", "blocks.*.weight")},
        "groups of 128 channels": {point: {"scale": "per_group_128"} for point in ("blocks.*.input", "blocks.*.weight")},
    }
