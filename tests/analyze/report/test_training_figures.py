"""Training curves."""

from __future__ import annotations

from typing import Any

from qvit.analyze.report.training_figures import training_section

_TITLES = {"student": "Q-ViT W2A2", "baseline": "baseline W2A2"}


def _log(first: int, count: int, **more: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(first, first + count):
        lines.append({"kind": "train", "step": step, "epoch": 0, "loss": 1 / step, "lr": 1e-3, **more})
    return [*lines, {"kind": "eval", "step": first + count - 1, "epoch": 1, "top1": 50.0 + first, **more}]


def test_a_panel_for_accuracy_and_each_term() -> None:
    section = training_section({"student": _log(1, 4), "baseline": _log(1, 2)}, _TITLES)
    assert [panel.id for panel in section.panels] == ["training-top1", "training-loss", "training-lr"]
    assert section.panels[0].description == "student: 51.00 % at the end; baseline: 51.00 % at the end"
    assert section.panels[1].description == "student: from 1 to 0.25; baseline: from 1 to 0.5"
    assert "cascade" not in section.caption


def test_where_the_second_stage_of_a_cascade_begins() -> None:
    cascade = [*_log(1, 4, first_stage=True), *_log(5, 3)]
    section = training_section({"student": cascade, "baseline": _log(1, 7)}, _TITLES)
    assert "Up to the dotted line it is the first stage of a cascade" in section.caption
    plain = training_section({"student": [*_log(1, 4), *_log(5, 3)], "baseline": _log(1, 7)}, _TITLES)
    for panel, other in zip(section.panels, plain.panels, strict=True):
        assert panel.description == other.description
        # One line more, the student's.
        assert panel.svg.count("stroke-dasharray") == other.svg.count("stroke-dasharray") + 1
