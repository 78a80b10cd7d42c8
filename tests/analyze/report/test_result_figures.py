"""Rows of result files: which accuracy counts, what is drawn, what is said of what is not there."""

from __future__ import annotations

from typing import Any

import pytest

from qvit.analyze.report.result_figures import _span, _ticks, accuracy_of, results_section


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"integer_top1": 90, "fake_top1": 91.0, "float_top1": 95.0}, ("integers", 90.0)),
        ({"integer_top1": None, "fake_top1": 91.0}, ("graph", 91.0)),
        ({"method": "float", "float_top1": 95.0}, ("float", 95.0)),
        ({"weight_bits": 32, "float_top1": 95.0}, ("float", 95.0)),
        # A quantized row names its float model's accuracy, which is not its own.
        ({"method": "qvit", "weight_bits": 2, "float_top1": 95.0}, None),
        ({"ms_median": 3.0}, None),
        ({"fake_top1": True}, None),
    ],
)
def test_the_accuracy_of_a_row(row: dict[str, Any], expected: tuple[str, float] | None) -> None:
    assert accuracy_of(row) == expected


ROWS = [
    {"data": "a", "method": "qvit", "weight_bits": 4, "act_bits": 4, "integer_top1": 90.0, "file_bytes": 2e5, "source": "x"},
    {"data": "a", "method": "float", "weight_bits": 32, "act_bits": 32, "float_top1": 91.0, "file_bytes": 1e6, "source": "x"},
    {"data": "b", "method": "new", "weight_bits": 4, "act_bits": 8, "fake_top1": 80.0, "file_bytes": 3e5, "source": "y"},
    {"model": "m", "weight_bits": 4, "act_bits": 4, "ms_median": 3.5, "engine": "cpu", "threads": 1, "batch": 2, "source": "z"},
]


def test_one_plot_for_each_data_set_and_none_for_latency_alone() -> None:
    section = results_section(ROWS)
    assert [panel.id for panel in section.panels] == ["results-bytes-0", "results-bytes-1"]
    assert "Q-ViT 4: 200 kB, 90.00 %" in section.panels[0].description
    assert "float 32: 1 MB, 91.00 %" in section.panels[0].description
    assert "4/8" in section.panels[1].svg
    assert section.table is not None
    assert len(section.table.rows) == 4
    assert section.table.rows[3][-3:] == ["3.5", "cpu, 2 images, 1 thread", "z"]
    assert section.missing == ["1 row holds a latency and no accuracy, and can only be seen in the table of the numbers."]
    assert [key.label for key in section.keys] == ["Q-ViT", "float", "new"]


def test_rows_that_hold_both_are_drawn_against_latency() -> None:
    section = results_section([{**ROWS[0], "ms_median": 1.5, "own": True}])
    assert [panel.id for panel in section.panels] == ["results-bytes-0", "results-latency-0"]
    assert "1.5, 90.00 %" in section.panels[1].description
    assert section.keys[-1].mark == "ring"


@pytest.mark.parametrize("sizes", [[5e4], [9e4, 1.1e5], [1e3, 1e9], [0.3, 0.5]])
def test_axes_have_a_few_ticks_whatever_they_span(sizes: list[float]) -> None:
    low, high = _span(sizes)
    assert low < min(sizes)
    assert max(sizes) < high
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def test_nothing_to_show() -> None:
    section = results_section([{"model": "m"}], ["hint"])
    assert section.empty
    assert section.missing == ["No row holds an accuracy or a latency: give result files with --results.", "hint"]
