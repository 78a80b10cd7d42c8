"""q and k before and after IRM, and the entropy of their codes (Q-ViT, figures 1 and 7)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qvit.analyze.attention_statistics import TENSORS, AttentionStatistics, TensorDistribution
from qvit.analyze.distributions import CodeShares, Histogram
from qvit.analyze.report import theme
from qvit.analyze.report.by_block import Line, plot_lines
from qvit.analyze.report.section import TITLES, Group, Key, Section, Table
from qvit.analyze.report.svg import Panel, draw


def distribution_section(statistics: Mapping[str, AttentionStatistics], titles: Mapping[str, str], images: int) -> Section:
    """The section, from the statistics of ``student`` and, where there are any, ``teacher`` and ``baseline``."""
    student = statistics["student"]
    rectified = student.distributions[0]["q"].after is not None
    groups = [
        Group(f"Block {block}", [panel for name in TENSORS for panel in _panels(statistics, titles, block, name, rectified)])
        for block in range(len(student.distributions))
    ]
    keys = [Key("values", "blue", "fill"), Key("Gaussian of the same mean and deviation", "ink")]
    if "teacher" in statistics:
        keys.append(Key(f"values, {titles['teacher']}", "grey", "fill"))
    entropy_keys = [Key("entropy of the codes", "blue", "o")]
    if rectified:
        entropy_keys.append(Key("the same without IRM", "blue", "dashed"))
    if "baseline" in statistics:
        entropy_keys.append(Key(f"codes of {titles['baseline']}", "vermilion", "^"))
    entropy_keys.append(Key("most that the codes can hold", "muted", "dotted"))
    outside = max(h.outside for block in student.distributions for d in block.values() for h in (d.before, d.after) if h)
    without = (
        "“Without IRM” is what the same number of levels would hold on the values before IRM, with the step of least squared "
        "error on the first images, which is where calibration starts. "
        if rectified
        else "This model has no IRM, so values go to the quantizer as the qkv layer gives them. "
    )
    return Section(
        id="distributions",
        title=TITLES["distributions"],
        source="figures 1 and 7 of the paper",
        reading=(
            "The closer the values are to a Gaussian and the more evenly the codes are used, the more of q and k survives "
            "quantization. Codes of b bits hold b bits at most, if all are equally frequent."
        ),
        caption=(
            f"Values of all heads of a block on {images} images; bins span four standard deviations "
            f"on either side, and {_share(outside)} of the values lie outside. Entropies are means over the heads, "
            f"each of which has a step of its own. {without}"
            "Calibration may rotate q and k within a head, which leaves their products, but not these histograms, unchanged."
        ),
        keys=[*keys, *entropy_keys],
        panels=[_entropies(statistics, titles, name) for name in TENSORS],
        choice="Block",
        groups=groups,
        table=_table(student),
    )


def _panels(
    statistics: Mapping[str, AttentionStatistics], titles: Mapping[str, str], block: int, name: str, rectified: bool
) -> list[Panel]:
    own = statistics["student"].distributions[block][name]
    start = f"distributions-{block}-{name}"
    panels = []
    teacher = statistics.get("teacher")
    if teacher is not None and block < len(teacher.distributions):
        histogram = teacher.distributions[block][name].before
        panels.append(_histogram(f"{start}-teacher", f"{name}, {titles['teacher']}", histogram, name, "grey"))
    before = f"{name}, before IRM" if rectified else f"{name}, {titles['student']}"
    panels.append(_histogram(f"{start}-before", before, own.before, name, "blue"))
    if own.after is not None:
        panels.append(_histogram(f"{start}-after", f"{name}, after IRM", own.after, f"{name} after IRM", "blue"))
    assert own.codes is not None
    baseline = statistics.get("baseline")
    other = None
    if baseline is not None and block < len(baseline.distributions):
        other = baseline.distributions[block][name].codes
    panels.append(_codes(f"{start}-codes", name, own.codes, other))
    return panels


def _histogram(identifier: str, title: str, histogram: Histogram, value: str, colour: str) -> Panel:
    def plot(axes: Axes) -> None:
        axes.stairs(histogram.density, histogram.edges, fill=True, color=theme.light(colour), alpha=0.55, linewidth=0)
        x = np.linspace(histogram.edges[0], histogram.edges[-1], 49)
        axes.plot(x, histogram.gaussian(x), color=theme.light("ink"), linewidth=1.1)
        axes.set_xlim(histogram.edges[0], histogram.edges[-1])
        _few_ticks(axes)
        axes.set_xlabel(f"value of {value}")
        axes.set_ylabel("density")
        axes.set_ylim(0, 1.3 * max(histogram.density.max(), histogram.gaussian(np.asarray(histogram.mean))))
        facts = {"mean": histogram.mean, "std": histogram.std, "ex. kurtosis": histogram.excess_kurtosis}
        for line, (fact, number) in enumerate(facts.items()):
            place = 0.98 - 0.095 * line
            axes.text(0.99, place, f"{fact} {_n(number)}", transform=axes.transAxes, ha="right", va="top", fontsize=7)

    description = (
        f"Histogram with a Gaussian over it: mean {_n(histogram.mean)}, standard deviation {_n(histogram.std)}, excess "
        f"kurtosis {_n(histogram.excess_kurtosis)}."
    )
    return draw(identifier, title, description, plot)


def _codes(identifier: str, name: str, codes: CodeShares, other: CodeShares | None) -> Panel:
    share = 100 * codes.shares

    def plot(axes: Axes) -> None:
        axes.bar(codes.levels, share, width=0.8, color=theme.light("blue"), alpha=0.85, linewidth=0)
        top = float(share.max())
        if other is not None:
            shares = 100 * other.shares
            top = max(top, float(shares.max()))
            axes.plot(other.levels, shares, "^", color=theme.light("vermilion"), markersize=4.5)
        axes.axhline(100 / codes.levels.size, color=theme.light("muted"), linewidth=1, linestyle=":")
        axes.set_ylim(0, 1.28 * top)
        _few_ticks(axes)
        axes.set_xlabel("code")
        axes.set_ylabel("share, %")
        text = f"{codes.entropy:.2f} of {codes.bits} bits"
        axes.text(0.99, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=7.5, fontweight="bold")

    description = f"Share of each code; their entropy is {codes.entropy:.2f} of {codes.bits} bits, the mean of the heads."
    if other is not None:
        description += f" Those of the baseline hold {other.entropy:.2f} of {other.bits} bits."
    return draw(identifier, f"codes of {name}", description, plot)


def _entropies(statistics: Mapping[str, AttentionStatistics], titles: Mapping[str, str], name: str) -> Panel:
    def codes(role: str) -> list[TensorDistribution]:
        return [block[name] for block in statistics[role].distributions]

    student = [d.codes.entropy for d in codes("student") if d.codes]
    lines = [Line(student, "blue", "o")]
    before = [d.codes_before.entropy for d in codes("student") if d.codes_before]
    if before:
        lines.append(Line(before, "blue", "", dashed=True))
    if "baseline" in statistics:
        lines.append(Line([d.codes.entropy for d in codes("baseline") if d.codes], "vermilion", "^"))
    bits = max(d.codes.bits for d in codes("student") if d.codes)

    def plot(axes: Axes) -> None:
        plot_lines(axes, lines)
        axes.axhline(bits, color=theme.light("muted"), linewidth=1, linestyle=":")
        axes.set_ylabel("entropy, bits")

    description = f"{titles['student']}: " + ", ".join(f"{e:.2f}" for e in student) + f" bits by block, of {bits}."
    return draw(f"entropy-{name}", f"entropy of the codes of {name}", description, plot)


def _table(student: AttentionStatistics) -> Table:
    columns = [
        "",
        "mean",
        "std",
        "ex. kurtosis",
        "mean, IRM",
        "std, IRM",
        "ex. kurtosis, IRM",
        "entropy without IRM",
        "entropy",
    ]
    rows = []
    for block, tensors in enumerate(student.distributions):
        for name, d in tensors.items():
            after = d.after
            rows.append(
                [
                    f"block {block}, {name}",
                    *(_n(v) for v in (d.before.mean, d.before.std, d.before.excess_kurtosis)),
                    *((_n(v) for v in (after.mean, after.std, after.excess_kurtosis)) if after else ("",) * 3),
                    f"{d.codes_before.entropy:.3f}" if d.codes_before else "",
                    f"{d.codes.entropy:.3f}" if d.codes else "",
                ]
            )
    if student.distributions[0]["q"].after is None:
        kept = (0, 1, 2, 3, 8)
        return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    return Table(columns, rows)


def _few_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _share(value: float) -> str:
    """A share in percent that is rounded up rather than to zero."""
    return "none" if value <= 0 else f"at most {max(0.1, 100 * value):.1f} %"


def _n(value: float) -> str:
    # Adding zero takes the sign off what is rounded to it.
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
