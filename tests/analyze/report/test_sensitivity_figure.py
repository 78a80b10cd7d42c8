"""The bars of sensitivity."""

from __future__ import annotations

import pytest

from qvit.analyze.report.sensitivity_figure import sensitivity_section
from qvit.analyze.sensitivity import PARTS, Sensitivity


@pytest.mark.parametrize("level", [90.0, 0.0, 100.0])
def test_every_part_and_layer_is_drawn(level: float) -> None:
    parts = dict.fromkeys(PARTS, level)
    measured = Sensitivity(level, level, parts, {"blocks.0": level, "head": level / 2})
    section = sensitivity_section(measured, 100)
    assert [panel.id for panel in section.panels] == ["sensitivity-parts", "sensitivity-layers"]
    for title in (*PARTS.values(), "everything"):
        assert f">{title}<" in section.panels[0].svg
    assert f"head {level / 2:.1f} %" in section.panels[1].description
    assert section.table is not None
    assert section.table.rows[0] == ["nothing", f"{level:.2f}", "+0.00"]
    assert len(section.table.rows) == 2 + 5 + 2


def test_the_standard_error_is_binomial() -> None:
    section = sensitivity_section(Sensitivity(90.0, 90.0, {}, {}), 10_000)
    assert "0.3 points" in section.caption  # sqrt(0.9 * 0.1 / 10000)
