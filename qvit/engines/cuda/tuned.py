"""Tiles that were measured to be the fastest on one kind of GPU: a file for each, written by ``benchmarks/tune_gpu.py``.

A GPU without a file, and a product that the file does not know, get the tiles that `qvit.engines.cuda.tiles` chooses by rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvit.engines.cuda.tiles import HopperTile, MmaTile
from qvit.files import write_atomically

FILES = Path(__file__).parent / "tuned"
_NEAR = 1.25  # a choice counts for so many times more or fewer rows
_KINDS = {tile.kernel: tile for tile in (MmaTile, HopperTile)}


@dataclass(frozen=True)
class Choice:
    """How one product [m, k] x [k, n] is computed.

    Attributes:
        kind: what leaves it: ``codes``, ``floats``, ``rows`` (floats, and the codes of their LayerNorm), or ``planes``:
            whatever it is, of codes that may be multiplied as planes of bits.
        m, n, k: of the product.
        bits: whether the product is of planes of bits.
        tile: ``None``: not in this way.
        half: whether the floats of ``floats`` and ``rows`` are float16, and the residual stream of ``planes``; ``codes`` have
            nothing of either.
    """

    kind: str
    m: int
    n: int
    k: int
    bits: bool
    tile: MmaTile | HopperTile | None
    half: bool = False

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        tile = None if self.tile is None else {"kernel": self.tile.kernel, **asdict(self.tile)}
        product = {"kind": self.kind, "m": self.m, "n": self.n, "k": self.k, "bits": self.bits, "half": self.half}
        return {**product, "tile": tile}

    @classmethod
    def of_json(cls, row: dict[str, Any]) -> Choice:
        """The choice that `to_json` wrote."""
        fields = None if row["tile"] is None else dict(row["tile"])
        return cls(**{**row, "tile": None if fields is None else _KINDS[fields.pop("kernel")](**fields)})


class Tuned:
    """The choices for one kind of GPU."""

    def __init__(self, choices: Iterable[Choice] = ()) -> None:
        self._choices: dict[tuple[str, int, int, bool, bool], list[Choice]] = {}
        for choice in choices:
            self._choices.setdefault((choice.kind, choice.n, choice.k, choice.bits, choice.half), []).append(choice)

    def find(self, kind: str, m: int, n: int, k: int, bits: bool, half: bool) -> Choice | None:
        """The choice for the nearest number of rows; ``None`` where there is none near it."""
        known = self._choices.get((kind, n, k, bits, half), ())
        nearest = min(known, key=lambda choice: _ratio(choice.m, m), default=None)
        return nearest if nearest is not None and _ratio(nearest.m, m) <= _NEAR else None

    def all(self) -> list[Choice]:
        """Every choice."""
        return [choice for choices in self._choices.values() for choice in choices]


def tuned_for(gpu: str) -> Tuned:
    """What is known of a GPU, by its driver's name for it (``NVIDIA H100 80GB HBM3``)."""
    path = FILES / f"{file_name(gpu)}.json"
    return Tuned(map(Choice.of_json, json.loads(path.read_text())["choices"])) if path.exists() else Tuned()


def file_name(gpu: str) -> str:
    """A GPU's name as that of a file, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def write(path: Path, gpu: str, choices: Sequence[Choice], measured: dict[str, Any]) -> None:
    """Writes a GPU's file: what was measured, and the choices, one a line."""
    lines = ",\n".join(f"    {json.dumps(choice.to_json())}" for choice in choices)
    text = f'{{\n  "gpu": {json.dumps(gpu)},\n  "measured": {json.dumps(measured)},\n  "choices": [\n{lines}\n  ]\n}}\n'
    write_atomically(path, text.encode())


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)
