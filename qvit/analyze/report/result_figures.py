"""Accuracy against size and latency, from rows of result files and of the run itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from qvit.analyze.report import theme
from qvit.analyze.report.section import TITLES, Key, Section, Table
from qvit.analyze.report.svg import Panel, draw

_TITLES = {"float": "float", "baseline": "baseline", "irm": "IRM", "dgd": "DGD", "qvit": "Q-ViT"}
_OTHER = "muted"

Row = Mapping[str, Any]


def accuracy_of(row: Row) -> tuple[str, float] | None:
    """What a row says of accuracy, the most deployed figure first: (``integers``, ``graph`` or ``float``, percent)."""
    for key, name in (("integer_top1", "integers"), ("fake_top1", "graph")):
        if _is_number(row.get(key)):
            return name, float(row[key])
    if _is_number(row.get("float_top1")) and (row.get("method") == "float" or row.get("weight_bits") == 32):
        return "float", float(row["float_top1"])
    return None


def results_section(rows: Sequence[Row], hints: Sequence[str] = ()) -> Section:
    """The section.

    Args:
        rows: of result files, each with ``source`` (the file's name); ``own`` marks those of the run itself.
        hints: what is not there, and how to get it.
    """
    sized = [row for row in rows if accuracy_of(row) and _is_number(row.get("file_bytes"))]
    timed = [row for row in rows if accuracy_of(row) and _is_number(row.get("ms_median"))]
    used = [row for row in rows if accuracy_of(row) or _is_number(row.get("ms_median"))]
    section = partial(Section, id="results", title=TITLES["results"])
    if not used:
        nothing = "No row holds an accuracy or a latency: give result files with --results."
        return section(missing=[nothing, *hints])
    panels = []
    for number, data in enumerate(dict.fromkeys(_data(row) for row in sized)):
        mine = [row for row in sized if _data(row) == data]
        panels.append(_scatter(f"results-bytes-{number}", f"size, {data}", mine, "file_bytes", "file, bytes", _bytes))
    for number, data in enumerate(dict.fromkeys(_data(row) for row in timed)):
        mine = [row for row in timed if _data(row) == data]
        label = "latency of a batch, ms"
        panels.append(_scatter(f"results-latency-{number}", f"latency, {data}", mine, "ms_median", label, _plain))
    methods = list(dict.fromkeys(_method(row) for row in (*sized, *timed)))
    keys = [Key(_TITLES.get(method, method), theme.METHODS.get(method, _OTHER), "dot") for method in methods]
    unplaced = sum(accuracy_of(row) is None for row in used)
    if unplaced:
        rows_hold = "1 row holds" if unplaced == 1 else f"{unplaced} rows hold"
        hints = [*hints, f"{rows_hold} a latency and no accuracy, and can only be seen in the table of the numbers."]
    if any(row.get("own") for row in (*sized, *timed)):
        keys.append(Key("this run and its float model", "ink", "ring"))
    return section(
        missing=list(hints),
        reading="Up and to the left is better. Numbers at points are bits of weights and activations.",
        caption=(
            "Points are single rows of the result files and of this run, nothing averaged: top-1 of the integers where it was "
            "measured, else of the fake-quantized graph; a float model counts four bytes a parameter. Latencies are medians of "
            "rows that hold both, as the table says on what machine, engine, batch and threads."
        ),
        keys=keys,
        panels=panels,
        table=_table(used),
    )


def _scatter(identifier: str, title: str, rows: Sequence[Row], key: str, label: str, form: Callable[[float], str]) -> Panel:
    points = [(float(row[key]), accuracy_of(row)[1], row) for row in rows]  # type: ignore[index]

    def plot(axes: Axes) -> None:
        named = set()
        for x, y, row in points:
            colour = theme.light(theme.METHODS.get(_method(row), _OTHER))
            axes.plot(x, y, "o", color=colour, markersize=5, alpha=0.8, mew=0)
            if row.get("own"):
                axes.plot(x, y, "o", color=theme.light("ink"), markersize=9, fillstyle="none", mew=1)
            place = (_bits(row), round(x, 2))
            if place not in named:
                named.add(place)
                left = _method(row) == "baseline"
                axes.annotate(
                    _bits(row),
                    (x, y),
                    xytext=(-5 if left else 5, 3),
                    textcoords="offset points",
                    ha="right" if left else "left",
                    fontsize=7,
                    color=theme.light("muted"),
                )
        axes.set_xscale("log")
        low, high = _span([x for x, _, _ in points])
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: form(x)))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(y=0.18)
        axes.set_xlabel(f"{label} (logarithmic)")
        axes.set_ylabel("top-1, %")

    description = "; ".join(f"{_TITLES.get(_method(r), _method(r))} {_bits(r)}: {form(x)}, {y:.2f} %" for x, y, r in points)
    return draw(identifier, title, description, plot, height=2.9)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis: room on both sides, and a factor of ten at least, so that few points do not fill it."""
    middle = math.sqrt(min(values) * max(values))
    half = max(1.6 * math.sqrt(max(values) / min(values)), math.sqrt(10))
    return middle / half, middle * half


def _ticks(low: float, high: float) -> list[float]:
    """Ones, twos and fives of each power of ten, the ones alone where these would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _table(rows: Sequence[Row]) -> Table:
    columns = ["model", "data", "method", "bits W/A", "top-1, %", "of", "bytes", "ms", "on", "from"]
    lines = []
    for row in rows:
        accuracy = accuracy_of(row)
        where = [row.get("engine") or row.get("peer"), _count(row, "batch", "image"), _count(row, "threads", "thread")]
        lines.append(
            [
                str(row.get("model", "")),
                str(row.get("data", "")),
                _TITLES.get(_method(row), _method(row)),
                _bits(row),
                f"{accuracy[1]:.2f}" if accuracy else "",
                accuracy[0] if accuracy else "",
                f"{row['file_bytes']:,.0f}" if _is_number(row.get("file_bytes")) else "",
                f"{row['ms_median']:.3g}" if _is_number(row.get("ms_median")) else "",
                ", ".join(str(part) for part in (*where, row.get("machine")) if part) if row.get("ms_median") else "",
                str(row.get("source", "")),
            ]
        )
    return Table(columns, lines)


def _count(row: Row, key: str, name: str) -> str:
    value = row.get(key)
    return "" if value is None else f"{value} {name}{'' if value == 1 else 's'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _data(row: Row) -> str:
    return str(row.get("data") or "data not named")


def _method(row: Row) -> str:
    return str(row.get("method") or "not named")


def _bits(row: Row) -> str:
    weight, act = row.get("weight_bits"), row.get("act_bits")
    if weight is None:
        return ""
    return f"{weight}" if weight == act or act is None else f"{weight}/{act}"


def _bytes(value: float) -> str:
    return f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB" if value >= 1e3 else f"{value:g} B"


def _plain(value: float) -> str:
    return f"{value:g}"
