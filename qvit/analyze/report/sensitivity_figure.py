"""Top-1 with one part, and with one layer, quantized alone (Q-ViT, figure 5)."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qvit.analyze.part_sensitivity import PARTS, PartSensitivity
from qvit.analyze.report import theme
from qvit.analyze.report.section import TITLES, Key, Section, Table
from qvit.analyze.report.svg import Panel, draw

_ROW = 0.3  # inches a bar takes, its name above it included


def sensitivity_section(trained: PartSensitivity, images: int, calibrated: PartSensitivity | None = None) -> Section:
    """The section.

    Args:
        trained: of the model itself.
        images: that it was measured on.
        calibrated: of the float model that it came from, quantized and calibrated in the same way and not trained.
    """
    states = {"after training": trained} if calibrated is None else {"before training": calibrated, "after training": trained}
    before = (
        "Before training: the float model that it came from, quantized like it and calibrated on training images. "
        if calibrated is not None
        else ""
    )
    return Section(
        id="sensitivity",
        title=TITLES["sensitivity"],
        source="figure 5 of the paper",
        reading=(
            "A bar that ends far left of the dashed line marks the part that loses most when it alone is quantized. The dashed "
            "line has nothing quantized, the last bar everything."
        ),
        caption=(
            f"Top-1 on {images} images with only the named points quantized and all else in floating point, IRM included. "
            f"{before}After training: this model as it is. Nothing is trained for a part, so these are not the accuracies of "
            "models trained in these states: a model that was trained with everything quantized has adapted to that, and may "
            "do even better so. Thin lines are one standard error on either side."
        ),
        keys=[
            Key("one part or layer alone", "blue", "fill"),
            Key("everything", "grey", "fill"),
            Key("nothing", "ink", "dashed"),
            Key("standard error", "ink"),
        ],
        panels=[
            _bars(f"sensitivity-{kind}s-{state.split()[0]}", f"by {kind}, {state}", bars(measured), measured, images)
            for kind, bars in (("part", _parts), ("layer", _layers))
            for state, measured in states.items()
        ],
        table=Table(
            ["quantized", *(f"{what}, {state}" for state in states for what in ("top-1 %", "to nothing"))],
            [
                [name, *(cell for measured in states.values() for cell in _cells(_all(measured)[name], measured.none))]
                for name in _all(trained)
            ],
        ),
    )


def _parts(measured: PartSensitivity) -> dict[str, float]:
    return {PARTS[key]: value for key, value in measured.parts.items()}


def _layers(measured: PartSensitivity) -> dict[str, float]:
    return measured.layers


def _all(measured: PartSensitivity) -> dict[str, float]:
    return {"nothing": measured.none, **_parts(measured), **_layers(measured), "everything": measured.all}


def _cells(value: float, none: float) -> tuple[str, str]:
    return f"{value:.2f}", f"{value - none:+.2f}".replace("-", "−")


def _bars(identifier: str, title: str, values: dict[str, float], measured: PartSensitivity, images: int) -> Panel:
    bars = [*((name, value, "blue") for name, value in values.items()), ("everything", measured.all, "grey")]
    lowest = min(measured.none, *(value for _, value, _ in bars))
    highest = max(measured.none, *(value for _, value, _ in bars))
    error = max(_standard_error(value, images) for _, value, _ in bars)
    left = max(0.0, math.floor(lowest - max(1.5 * error, 0.35 * (highest - lowest))))
    right = highest + max(1.2 * error, 0.1 * (highest - left))

    def plot(axes: Axes) -> None:
        for place, (name, value, colour) in enumerate(bars):
            y = -place
            axes.barh(y, value - left, left=left, height=0.38, color=theme.light(colour), alpha=0.85, linewidth=0)
            axes.vlines(measured.none, y - 0.26, y + 0.26, color=theme.light("ink"), linewidth=1, linestyle=(0, (3, 2)))
            own = _standard_error(value, images)
            axes.plot((max(left, value - own), value + own), (y, y), color=theme.light("ink"), linewidth=1)
            axes.text(left, y + 0.27, name, fontsize=7.5, va="bottom")
            axes.text(right, y + 0.27, f"{value:.1f}", fontsize=7.5, va="bottom", ha="right", fontweight="bold")
        axes.set_xlim(left, right)
        axes.set_ylim(0.8 - len(bars), 0.85)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], prune="both"))
        axes.set_xlabel("top-1, %" + (f" (the axis begins at {left:g})" if left else ""))
        axes.set_position((0.02, axes.get_position().y0, 0.96, axes.get_position().height))

    description = (
        f"Top-1 with nothing quantized {measured.none:.1f} %; " + ", ".join(f"{n} {v:.1f} %" for n, v, _ in bars) + "."
    )
    return draw(identifier, title, description, plot, height=0.85 + _ROW * len(bars))


def _standard_error(top1: float, images: int) -> float:
    """Of an accuracy in percent: binomial, with one image added on either side so that 0 and 100 have one too."""
    share = (top1 / 100 * images + 1) / (images + 2)
    return 100 * math.sqrt(share * (1 - share) / images)
