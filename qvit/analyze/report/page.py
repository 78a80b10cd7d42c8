"""The page: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.colors import to_hex

from qvit.analyze.report import theme
from qvit.analyze.report.attention_figures import MAP_COLOURS
from qvit.analyze.report.section import Key, Section

_MARKS = {
    "line": '<path d="M1 6H23" stroke="{c}" stroke-width="2.5"/>',
    "dashed": '<path d="M1 6H23" stroke="{c}" stroke-width="2" stroke-dasharray="5 3"/>',
    "dotted": '<path d="M1 6H23" stroke="{c}" stroke-width="2" stroke-dasharray="2 3"/>',
    "fill": '<rect x="2" y="1" width="20" height="10" fill="{c}" opacity=".7"/>',
    "heat": "".join(
        f'<rect x="{5 * place}" y="1" width="5" height="10" fill="{to_hex(matplotlib.colormaps[MAP_COLOURS](place / 4))}"/>'
        for place in range(5)
    ),
    "dot": '<circle cx="12" cy="6" r="4" fill="{c}"/>',
    "ring": '<circle cx="12" cy="6" r="4.5" fill="none" stroke="{c}" stroke-width="1.5"/>',
    "o": '<path d="M1 6H23" stroke="{c}" stroke-width="2"/><circle cx="12" cy="6" r="4" fill="{c}"/>',
    "s": '<path d="M1 6H23" stroke="{c}" stroke-width="2"/><rect x="8" y="2" width="8" height="8" fill="{c}"/>',
    "^": '<path d="M1 6H23" stroke="{c}" stroke-width="2"/><path d="M12 1l5 9H7z" fill="{c}"/>',
}


def render(heading: str, facts: Mapping[str, str], sections: Sequence[Section], numbers: Mapping[str, Any], made: str) -> str:
    """The page as text.

    Args:
        heading: the model and how it is quantized.
        facts: name -> value, above the figures.
        sections: the figures in their order.
        numbers: a JSON object with all that the figures show; ``command`` of it is quoted.
        made: versions and hardware, one sentence.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_part("page.html.jinja"))
    drawings, styles = _drawings(sections)
    return template.render(
        title=f"{heading}: qvit report",
        heading=heading,
        facts=facts,
        sections=sections,
        # What closes a script element must not occur in one.
        numbers=json.dumps(numbers, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
        command=" ".join(numbers["command"]),
        made=made,
        css=Markup(theme.css() + _part("page.css") + styles),
        drawings=drawings,
        script=_part("page.js"),
        swatch=_swatch,
    )


def _drawings(sections: Sequence[Section]) -> tuple[dict[str, Markup], str]:
    """Panel identifier -> its element, and CSS: styles, which repeat, as classes, which saves about a third."""
    names: dict[str, str] = {}
    drawings = {}
    for section in sections:
        for panel in (*section.panels, *(panel for group in section.groups for panel in group.panels)):
            root = ET.fromstring(panel.svg)
            for element in root.iter():
                if (style := element.attrib.pop("style", None)) is not None:
                    element.set("class", names.setdefault(style, f"s{len(names)}"))
            drawings[panel.id] = Markup(ET.tostring(root, encoding="unicode"))
    return drawings, "".join(f".{name}{{{style}}}" for style, name in names.items())


def _part(name: str) -> str:
    return (resources.files("qvit.analyze.report") / name).read_text(encoding="utf-8")


def _swatch(key: Key) -> Markup:
    """A legend's sample of a line."""
    mark = _MARKS[key.mark].format(c=f"var(--{key.colour})")
    return Markup(f'<svg viewBox="0 0 24 12" aria-hidden="true" fill="none">{mark}</svg>')
