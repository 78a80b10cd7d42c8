"""How far attention reaches, where the class token looks, and how similar tokens stay to each other (Q-ViT, figure 6)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from qvit.analyze.attention_statistics import TENSORS, AttentionStatistics
from qvit.analyze.report import theme
from qvit.analyze.report.by_block import Line, plot_lines
from qvit.analyze.report.section import TITLES, Group, Key, Section, Strip, Table, Thumbnail
from qvit.analyze.report.svg import Panel, draw

MAP_COLOURS = "viridis"  # as readable without colour vision, and in grey
_COARSE = 64  # pixels a side below which they are shown as squares


def distance_section(statistics: Mapping[str, AttentionStatistics], titles: Mapping[str, str], images: int) -> Section:
    """Mean attention distance by block, of every model that has one."""
    shown = {role: s for role, s in statistics.items() if s.distance is not None}
    section = partial(Section, id="distance", title=TITLES["distance"], source="figure 6 of the paper")
    if "student" not in shown:
        why = "Attention of this model does not run over one grid of patches, so it has no distance that blocks could share."
        return section(missing=[why])
    means: dict[str, np.ndarray] = {role: np.nanmean(s.distance, axis=1) for role, s in shown.items()}  # type: ignore[arg-type]
    every = np.concatenate([s.distance.ravel() for s in shown.values()])  # type: ignore[union-attr]
    uniform = shown["student"].uniform or 0.0
    low, high = min(np.nanmin(every), uniform), max(np.nanmax(every), uniform)
    margin = 0.06 * (high - low)

    def panel(identifier: str, title: str, roles: Sequence[str], heads: bool) -> Panel:
        lines = [
            Line(means[role], theme.ROLES[role], theme.MARKERS[role], spread=shown[role].distance if heads else None)
            for role in roles
        ]

        def plot(axes: Axes) -> None:
            plot_lines(axes, lines)
            axes.axhline(uniform, color=theme.light("muted"), linewidth=1, linestyle=":")
            axes.set_ylim(low - margin, high + margin)
            axes.set_ylabel("distance, pixels")

        parts = (f"{titles[role]}: " + ", ".join(f"{v:.1f}" for v in means[role]) + " pixels by block" for role in roles)
        return draw(f"distance-{identifier}", title, "; ".join(parts), plot)

    skipped = ", ".join(f"{100 * s.skipped:.1f} % in {titles[role]}" for role, s in shown.items() if s.skipped)
    return section(
        reading=(
            "Low blocks of a trained vision transformer have heads that look nearby beside heads that look everywhere. A "
            "student whose attention has gone flat lies on the dotted line in every head."
        ),
        caption=(
            f"Distance from a patch to those it attends to, weighted by its attention, mean over all patches of {images} "
            "images; lines are means of the heads, points single heads. Attention of quantized models is the quantized "
            "map that multiplies v. Attention to and from the class token is left out, and the rest of a row is scaled to one."
            + (f" Rows whose codes are all zeros look at nothing and are not counted ({skipped})." if skipped else "")
        ),
        keys=[
            *(Key(titles[role], theme.ROLES[role], theme.MARKERS[role]) for role in shown),
            Key("attention that is the same everywhere", "muted", "dotted"),
        ],
        panels=[
            *([panel("means", "means of the heads", list(shown), heads=False)] if len(shown) > 1 else []),
            *(panel(role, f"heads of {titles[role]}", [role], heads=True) for role in shown),
        ],
        table=Table(
            ["block", *(titles[role] for role in shown), *(f"heads of {titles[role]}" for role in shown)],
            [
                [
                    str(block),
                    *(f"{mean[block]:.2f}" if block < len(mean) else "" for mean in means.values()),
                    *(_heads(s.distance, block) for s in shown.values()),
                ]
                for block in range(len(means["student"]))
            ],
        ),
    )


def _heads(values: np.ndarray | None, block: int) -> str:
    return ", ".join(f"{v:.2f}" for v in values[block]) if values is not None and block < len(values) else ""


def similarity_section(
    statistics: Mapping[str, AttentionStatistics], titles: Mapping[str, str], images: int, no_teacher: str
) -> Section:
    """Distance of the similarity matrices to the teacher's, by block; ``no_teacher`` says why there is none."""
    section = partial(
        Section,
        id="similarity",
        title=TITLES["similarity"],
        source="equations 2.22 and 2.23 of the book chapter on Q-ViT",
    )
    shown = {role: s.similarity for role, s in statistics.items() if s.similarity is not None}
    if "student" not in shown:
        why = (
            no_teacher
            if "teacher" not in statistics
            else "The teacher has other blocks, heads or tokens than the student, so their similarities have no distance."
        )
        return section(missing=[why])

    def panel(name: str):  # type: ignore[no-untyped-def]
        lines = {
            role: Line([heads.mean() for heads in values[name]], theme.ROLES[role], theme.MARKERS[role], spread=values[name])
            for role, values in shown.items()
        }

        def plot(axes: Axes) -> None:
            plot_lines(axes, list(lines.values()))
            axes.set_ylim(bottom=0)
            axes.set_ylabel("distance")

        description = "; ".join(
            f"{titles[role]}: " + ", ".join(f"{v:.2f}" for v in line.values) + " by block" for role, line in lines.items()
        )
        return draw(f"similarity-{name}", f"similarities of {name}", description, plot)

    return section(
        reading=(
            "0 where tokens are as similar to each other as in the teacher, at most √2 where the similarities have nothing in "
            "common. Distribution-guided distillation lowers it; without it q and k may drift as long as the answer stays "
            "right."
        ),
        caption=(
            f"‖G(teacher) − G(student)‖ with G(x) = x xᵀ / ‖x xᵀ‖ for q and k as they enter the quantizer, mean over {images} "
            f"images; lines are means of the heads, points single heads."
        ),
        keys=[Key(titles[role], theme.ROLES[role], theme.MARKERS[role]) for role in shown],
        panels=[panel(name) for name in TENSORS],
        table=Table(
            ["block", *(f"{titles[role]}, {name}" for role in shown for name in TENSORS)],
            [
                [str(block), *(f"{values[name][block].mean():.3f}" for values in shown.values() for name in TENSORS)]
                for block in range(len(shown["student"]["q"]))
            ],
        ),
    )


def maps_section(
    maps: Mapping[str, np.ndarray | None], pixels: np.ndarray, labels: Sequence[str], titles: Mapping[str, str]
) -> Section:
    """Attention maps of the class token on a few images.

    Args:
        maps: role -> [images, L, rows, columns], or ``None`` where the model has no such map.
        pixels: the images, uint8 [images, C, H, W].
        labels: what each of them is.
        titles: role -> what the page calls it.
    """
    section = partial(Section, id="maps", title=TITLES["maps"])
    shown = {role: m for role, m in maps.items() if m is not None}
    if "student" not in shown:
        return section(missing=["This model has no class token over one grid of patches, so there is no map of it."])
    blocks = shown["student"].shape[1]
    originals = [
        Thumbnail(_picture(image.transpose(1, 2, 0)), f"Image {number}: {label}", label, min(image.shape[1:]) < _COARSE)
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    groups = [
        Group(
            f"Block {block}",
            strips=[
                Strip(titles[role], [_map(values[number, block], titles[role], number, block) for number in range(len(pixels))])
                for role, values in shown.items()
                if block < values.shape[1]
            ],
        )
        for block in range(blocks)
    ]
    missing = [f"{titles[role]} has no class token over one grid of patches." for role, m in maps.items() if m is None]
    return section(
        reading="Bright patches are those that the class token takes most from; each map is scaled to its own largest value.",
        caption=(
            f"Attention from the class token to the patches, mean of the heads, on {len(pixels)} images spread over the data; "
            "the number below a map is the largest share that a patch gets. "
            "Of quantized models it is the quantized map that multiplies v, so a map may hold few different values, or none."
        ),
        keys=[Key("from nothing to the largest share", "ink", "heat")],
        choice="Block",
        strips=[Strip("image", originals)],
        groups=groups,
        chosen=blocks - 1,
        missing=missing,
    )


def _map(grid: np.ndarray, title: str, number: int, block: int) -> Thumbnail:
    """A map [rows, columns] as a picture, dark for 0 and bright for its largest value."""
    top = float(grid.max())
    colours = (255 * matplotlib.colormaps[MAP_COLOURS](grid / top if top > 0 else grid)[..., :3]).astype(np.uint8)
    peak = f"{100 * top:.1f}\u00a0%"
    return Thumbnail(
        _picture(colours), f"Attention of {title} on image {number} in block {block}, at most {peak} a patch", peak
    )


def _picture(array: np.ndarray) -> str:
    """uint8 [H, W, 1 or 3] -> a data URI: PNG of what is coarse, JPEG of photographs, which would be large."""
    buffer = io.BytesIO()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    if min(image.size) < _COARSE:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88)
    kind = "png" if min(image.size) < _COARSE else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
