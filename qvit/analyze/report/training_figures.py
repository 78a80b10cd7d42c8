"""Training curves, from the log of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qvit.analyze.report import theme
from qvit.analyze.report.section import TITLES, Key, Section
from qvit.analyze.report.svg import Panel, draw

# Terms of the loss as the log names them -> title and the axis of the plot.
_TERMS = {
    "loss": ("loss, all terms weighted", "loss"),
    "label": ("cross-entropy, labels", "nats"),
    "hard": ("cross-entropy, teacher’s answer", "nats"),
    "soft": ("divergence from the teacher", "nats"),
    "dgd": ("similarity distance (DGD)", "sum over blocks, heads"),
    "feature": ("distance of features", "share of variance"),
}
_RATE = ("learning rate", "learning rate")

Log = Sequence[Mapping[str, Any]]


def training_section(logs: Mapping[str, Log], titles: Mapping[str, str]) -> Section:
    """The curves of ``student`` and, where there is one, ``baseline``.

    Args:
        logs: role -> lines of ``metrics.jsonl`` (`qvit.training.cascade.read_stages`).
        titles: role -> what the page calls it.
    """
    panels = [_accuracy(logs)]
    names = [name for name in _TERMS if any(name in line for log in logs.values() for line in log)]
    panels += [_curve(logs, name, *_TERMS[name]) for name in names]
    if any("lr" in line for log in logs.values() for line in log):
        panels.append(_curve(logs, "lr", *_RATE))
    caption = (
        "From the log of the run. Losses are means over the steps since the point before, on augmented training images; "
        "top-1 is on the validation images, in fake quantization, as the log has it."
    )
    if _switches(logs):
        caption += " Up to the dotted line it is the first stage of a cascade, with a student of more bits."
    return Section(
        id="training",
        title=TITLES["training"],
        caption=caption,
        keys=[Key(titles[role], theme.ROLES[role], "line") for role in logs],
        panels=[panel for panel in panels if panel is not None],
    )


def _accuracy(logs: Mapping[str, Log]) -> Panel | None:
    points = {role: [(line["step"], line["top1"]) for line in log if line["kind"] == "eval"] for role, log in logs.items()}
    points = {role: values for role, values in points.items() if values}
    if not points:
        return None

    def plot(axes: Axes) -> None:
        for role, values in points.items():
            x, y = zip(*values, strict=True)
            axes.plot(x, y, color=theme.light(theme.ROLES[role]), marker=theme.MARKERS[role])
        _steps(axes, logs)
        axes.set_ylabel("top-1, %")

    description = "; ".join(f"{role}: {values[-1][1]:.2f} % at the end" for role, values in points.items())
    return draw("training-top1", "validation top-1", description, plot)


def _curve(logs: Mapping[str, Log], name: str, title: str, unit: str) -> Panel:
    points = {role: [(line["step"], line[name]) for line in log if name in line] for role, log in logs.items()}
    points = {role: values for role, values in points.items() if values}

    def plot(axes: Axes) -> None:
        for role, values in points.items():
            x, y = zip(*values, strict=True)
            axes.plot(x, y, color=theme.light(theme.ROLES[role]), marker=theme.MARKERS[role] if len(x) == 1 else None)
        _steps(axes, logs)
        axes.set_ylabel(unit)
        if name == "lr":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    description = "; ".join(f"{role}: from {v[0][1]:.3g} to {v[-1][1]:.3g}" for role, v in points.items())
    return draw(f"training-{name}", title, description, plot)


def _switches(logs: Mapping[str, Log]) -> dict[str, int]:
    """role -> the step after which the second stage of its cascade begins; without the roles that have one stage."""
    first = {role: [line["step"] for line in log if line.get("first_stage")] for role, log in logs.items()}
    return {role: max(steps) for role, steps in first.items() if steps}


def _steps(axes: Axes, logs: Mapping[str, Log]) -> None:
    for role, step in _switches(logs).items():
        axes.axvline(step, color=theme.light(theme.ROLES[role]), linestyle=":", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step")
