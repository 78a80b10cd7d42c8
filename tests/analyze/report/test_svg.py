"""Panels: valid, themed, with unique identifiers, and with text that is text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes

from qvit.analyze.report import theme
from qvit.analyze.report.svg import draw


def _plot(axes: Axes) -> None:
    axes.stairs(np.asarray([1.0, 3.0, 2.0]), fill=True, color=theme.light("blue"), alpha=0.5)
    axes.plot([0, 1, 2], [1.25, 2.5, 1.125], "o", color=theme.light("ink"))
    axes.text(0.5, 2, "bold", fontweight="bold")
    axes.set_xlabel("a < b & c")


def test_a_panel() -> None:
    panel = draw("first", "title", "1 & 2 < 3", _plot)
    root = ET.fromstring(panel.svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "first-title first-desc"
    assert (root[0].tag, root[0].text, root[1].tag, root[1].text) == ("title", "title", "desc", "1 & 2 < 3")
    assert "width" not in root.attrib  # it takes the width it is given
    assert [float(n) for n in root.attrib["viewBox"].split()[2:]] == pytest.approx([72 * theme.WIDTH, 72 * theme.HEIGHT])
    texts = {text.text for text in root.iter("text")}
    assert {"title", "a < b & c", "bold"} <= texts
    styles = {text.text: text.get("style", "") for text in root.iter("text")}
    assert "font-weight:700" in styles["bold"]
    assert "font-weight" not in styles["a < b & c"]
    assert "var(--muted)" in styles["a < b & c"]
    assert "font-family" not in panel.svg


def test_every_colour_follows_the_theme() -> None:
    svg = draw("themed", "title", "", _plot).svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert {"var(--blue)", "var(--ink)", "var(--rule)", "var(--muted)"} <= set(re.findall(r"var\(--\w+\)", svg))


def test_references_stay_within_a_panel_and_identifiers_are_unique() -> None:
    panels = [draw(name, "title", "", _plot).svg for name in ("one", "two")]
    ids = [value for svg in panels for value in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for name, svg in zip(("one", "two"), panels, strict=True):
        referred = re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
        assert referred
        assert all(reference.startswith(f"{name}-") and f'id="{reference}"' in svg for reference in referred)
    assert "http" not in panels[0]


def test_two_colours_of_a_theme_are_never_equal() -> None:
    """Else a figure's colour would not say which variable it stands for."""
    lights = [light for light, _ in theme.COLOURS.values()]
    assert len(set(lights)) == len(lights)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_contrast_in_both_themes() -> None:
    """WCAG: 4.5 to 1 for text, 3 to 1 for graphics."""
    for theme_index in (0, 1):
        for ground in ("page", "card"):
            back = _luminance(theme.COLOURS[ground][theme_index])
            for name, least in (
                *((name, 4.5) for name in ("ink", "muted")),
                *((name, 3.0) for name in ("blue", "vermilion", "grey", "green", "purple")),
            ):
                front = _luminance(theme.COLOURS[name][theme_index])
                ratio = (max(front, back) + 0.05) / (min(front, back) + 0.05)
                assert ratio >= least, (name, ground, theme_index, ratio)
