"""The bars of sensitivity."""

from __future__ import annotations

import pytest

from qvit.analyze.part_sensitivity import PARTS, PartSensitivity
from qvit.analyze.report.sensitivity_figure import _standard_error, sensitivity_section


@pytest.mark.parametrize("level", [90.0, 0.0, 100.0])
def test_every_part_and_layer_is_drawn(level: float) -> None:
    parts = dict.fromkeys(PARTS, level)
    measured = PartSensitivity(level, level, parts, {"blocks.0": level, "head": level / 2})
    section = sensitivity_section(measured, 100)
    assert [panel.id for panel in section.panels] == ["sensitivity-parts-after", "sensitivity-layers-after"]
    assert "Before training" not in section.caption
    for title in (*PARTS.values(), "everything"):
        assert f">{title}<" in section.panels[0].svg
    assert f"head {level / 2:.1f} %" in section.panels[1].description
    assert section.table is not None
    assert section.table.rows[0] == ["nothing", f"{level:.2f}", "+0.00"]
    assert len(section.table.rows) == 2 + 6 + 2


def test_before_and_after_training_side_by_side() -> None:
    before = PartSensitivity(80.0, 10.0, {"mlp": 70.0}, {"head": 79.0})
    after = PartSensitivity(78.0, 77.0, {"mlp": 76.0}, {"head": 78.0})
    section = sensitivity_section(after, 100, before)
    assert [panel.id.removeprefix("sensitivity-") for panel in section.panels] == [
        *("parts-before", "parts-after", "layers-before", "layers-after")
    ]
    assert "everything 10.0 %" in section.panels[0].description
    assert "everything 77.0 %" in section.panels[1].description
    assert section.table is not None
    assert section.table.rows[1] == [PARTS["mlp"], "70.00", "−10.00", "76.00", "−2.00"]
    assert len(section.table.columns) == 5


@pytest.mark.parametrize(("top1", "images", "points"), [(90.0, 10_000, 0.3), (0.0, 98, 1.0), (100.0, 98, 1.0)])
def test_the_standard_error_is_binomial(top1: float, images: int, points: float) -> None:
    """sqrt(0.9 * 0.1 / 10000); with one image more on either side, sqrt(0.01 * 0.99 / 98) where all are right, or none."""
    assert _standard_error(top1, images) == pytest.approx(points, rel=0.01)
