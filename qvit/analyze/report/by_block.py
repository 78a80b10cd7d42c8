"""Plots over the blocks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qvit.analyze.report import theme


@dataclass(frozen=True)
class Line:
    """A number a block.

    Attributes:
        values: [L].
        colour: a name of `theme.COLOURS`.
        marker: Matplotlib's; empty for none.
        dashed: drawn with gaps.
        spread: values of the single heads of each block, [H] each, shown as points behind the line.
    """

    values: Sequence[float] | np.ndarray
    colour: str
    marker: str
    dashed: bool = False
    spread: Sequence[np.ndarray] | np.ndarray | None = None


def plot_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Draws lines over blocks, the last on top."""
    blocks = max(len(line.values) for line in lines)
    for line in lines:
        colour = theme.light(line.colour)
        x = np.arange(len(line.values))
        if line.spread is not None:
            for block, heads in enumerate(line.spread):
                axes.plot(np.full(len(heads), block), heads, "o", color=colour, markersize=3.2, alpha=0.4, mew=0)
        axes.plot(x, line.values, "--" if line.dashed else "-", color=colour, marker=line.marker or None)
    axes.set_xlim(-0.4, blocks - 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(min(blocks, 12), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("block")
