"""Colours of the page, light and dark, and the look of its figures.

Figures are drawn in the light colours; `qvit.analyze.report.svg` replaces each by the CSS variable of its name, so every colour
here is used for one thing alone. Series are Okabe and Ito's blue, vermilion, green, purple and grey, darker or lighter where
contrast with the page asks for it; they stay apart in the common forms of colour blindness.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# name -> (light, dark)
COLOURS: Mapping[str, tuple[str, str]] = {
    "page": ("#fdfdfc", "#14171b"),
    "card": ("#ffffff", "#1b1f25"),
    "ink": ("#1a1d21", "#e8eaed"),
    "muted": ("#59626d", "#a3acb7"),
    "rule": ("#d9dde2", "#343b44"),
    "blue": ("#0068a8", "#5ab4ee"),
    "vermilion": ("#c4530a", "#f0913d"),
    "grey": ("#6d7784", "#97a1ad"),
    "green": ("#00805c", "#35c79b"),
    "purple": ("#9a4a86", "#d993c2"),
}

# What stands for whom, in every figure.
ROLES: Mapping[str, str] = {"teacher": "grey", "baseline": "vermilion", "student": "blue"}
MARKERS: Mapping[str, str] = {"teacher": "s", "baseline": "^", "student": "o"}
METHODS: Mapping[str, str] = {"float": "grey", "baseline": "vermilion", "irm": "green", "dgd": "purple", "qvit": "blue"}

WIDTH, HEIGHT = 2.95, 2.1  # inches of a panel; a point is 1.25 to 1.7 pixels on the page


def light(name: str) -> str:
    """The colour that a figure is drawn in."""
    return COLOURS[name][0]


def css() -> str:
    """The variables for both themes: the system's by default, the other where ``data-theme`` on the root says so."""
    lights = "".join(f"--{name}:{pair[0]};" for name, pair in COLOURS.items())
    darks = "".join(f"--{name}:{pair[1]};" for name, pair in COLOURS.items())
    return (
        f":root{{{lights}color-scheme:light}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{darks}color-scheme:dark}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{darks}color-scheme:dark}}}}"
    )


def settings() -> dict[str, Any]:
    """Matplotlib's settings for a figure of the page."""
    return {
        "svg.fonttype": "none",
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 7,
        "axes.titlecolor": light("ink"),
        "axes.labelsize": 8,
        "axes.labelcolor": light("muted"),
        "axes.edgecolor": light("rule"),
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": light("rule"),
        "grid.linewidth": 0.5,
        "xtick.color": light("rule"),
        "ytick.color": light("rule"),
        "xtick.labelcolor": light("muted"),
        "ytick.labelcolor": light("muted"),
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "text.color": light("ink"),
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
