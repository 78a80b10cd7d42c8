"""What the page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qvit.analyze.report.svg import Panel

# Identifier of a section -> its title.
TITLES = {
    "results": "Accuracy against size and latency",
    "training": "Training",
    "distributions": "Queries and keys, and what their codes hold",
    "distance": "How far attention reaches",
    "maps": "Where the class token looks",
    "similarity": "Token similarities against the teacher’s",
    "sensitivity": "What hurts: one part or one layer quantized alone",
}


@dataclass(frozen=True)
class Key:
    """A line of a figure's legend.

    Attributes:
        label: what it stands for.
        colour: a name of `theme.COLOURS`.
        mark: ``line``, ``dashed``, ``dotted``, ``fill``, ``dot``, ``ring``, ``heat`` (the colours of maps, whatever the
            colour), or a line with a marker: ``o``, ``s``, ``^``.
    """

    label: str
    colour: str
    mark: str = "line"


@dataclass(frozen=True)
class Thumbnail:
    """A small picture.

    Attributes:
        source: a data URI.
        alt: what it shows, for those who do not see it.
        caption: below it.
        coarse: has so few pixels that they are to be seen as squares.
    """

    source: str
    alt: str
    caption: str
    coarse: bool = True


@dataclass(frozen=True)
class Strip:
    """Pictures in a row, those of one column belonging together over all strips of a section."""

    label: str
    pictures: Sequence[Thumbnail]


@dataclass(frozen=True)
class Group:
    """Panels or strips of pictures of which the reader sees one group at a time; all of them where scripts do not run."""

    label: str
    panels: Sequence[Panel] = ()
    strips: Sequence[Strip] = ()


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure, already formatted; the first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One figure with all that belongs to it.

    Attributes:
        id, title: of the section.
        source: what it follows ("figure 6 of the paper"); empty where there is nothing.
        reading: how to read it.
        caption: what was measured, and on how many images.
        keys: the legend.
        panels, strips: seen always.
        choice: what the groups are, in one word ("Block").
        groups: seen one at a time.
        chosen: the group that is seen first.
        table: the numbers.
        missing: why there is nothing, or not all, to see, and what to do about it.
    """

    id: str
    title: str
    source: str = ""
    reading: str = ""
    caption: str = ""
    keys: Sequence[Key] = ()
    panels: Sequence[Panel] = ()
    strips: Sequence[Strip] = ()
    choice: str = ""
    groups: Sequence[Group] = ()
    chosen: int = 0
    table: Table | None = None
    missing: Sequence[str] = field(default_factory=tuple)

    @property
    def empty(self) -> bool:
        """Whether nothing is shown."""
        return not (self.panels or self.groups or self.table)
