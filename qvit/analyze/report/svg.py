"""From a Matplotlib figure to an SVG element of the page: its colours follow the theme, its text is text."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qvit.analyze.report import theme

_XLINK = "http://www.w3.org/1999/xlink"
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in theme.COLOURS.items()}
_FONT = re.compile(r"font[-a-z]*:[^;]*;?\s*")
_SIZE = re.compile(r"font(?:-size)?:[^;]*?([\d.]+)px")
_BOLD = re.compile(r"font(?:-weight)?:\s*(?:bold|700)")
_REFERENCE = re.compile(r"""(?:url\(#|href="#)([^)"]+)""")
_NUMBER = re.compile(r"-?\d+\.\d+")
_MARGIN = 0.025  # of a panel's width, left free
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True)
class Panel:
    """One plot of the page.

    Attributes:
        id: unique on the page.
        title: what it shows, in a few words; read aloud by screen readers.
        description: what is to be seen in it, in numbers.
        svg: the element.
    """

    id: str
    title: str
    description: str
    svg: str


@contextmanager
def _canvas(height: float) -> Iterator[tuple[Figure, Axes]]:
    settings: Any = theme.settings()  # the names that rc_context knows change between versions of Matplotlib
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(theme.WIDTH, height))
        yield figure, figure.add_axes((0.165, 0.44 / height, 0.81, 1 - 0.74 / height))


def draw(identifier: str, title: str, description: str, plot: Callable[[Axes], None], height: float = theme.HEIGHT) -> Panel:
    """Draws a panel: ``plot(axes)`` fills it in the light colours of `theme`."""
    with _canvas(height) as (figure, axes):
        axes.set_title(title)
        plot(axes)
        _fit(figure, axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return Panel(identifier, title, description, _inline(buffer.getvalue(), identifier, title, description))


def _fit(figure: Figure, axes: Axes) -> None:
    """Makes room for labels beside the axes that are wider than usual."""
    box, place = axes.get_tightbbox(), axes.get_position()
    if box is None:
        return
    left = max(0.0, _MARGIN - box.x0 / figure.dpi / theme.WIDTH)
    right = max(0.0, box.x1 / figure.dpi / theme.WIDTH - (1 - _MARGIN))
    axes.set_position((place.x0 + left, place.y0, place.width - left - right, place.height))


def _inline(text: str, identifier: str, title: str, description: str) -> str:
    """The file's SVG as an element: unique identifiers, theme colours, the page's font, a name for screen readers."""
    root = ET.fromstring(text)
    referred = set(_REFERENCE.findall(text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = None if element.text and not element.text.strip() else element.text
        element.tail = None
        own = element.attrib.pop("id", None)
        element.attrib = {key: _attribute(key, value, identifier) for key, value in element.attrib.items()}
        if f"{{{_XLINK}}}href" in element.attrib:
            element.set("href", element.attrib.pop(f"{{{_XLINK}}}href"))
        if own in referred:
            element.set("id", f"{identifier}-{own}")
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    _flatten(root)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{identifier}-title {identifier}-desc", "id": identifier}
    for position, (tag, content) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, {"id": f"{identifier}-{tag}"})
        element.text = content
        root.insert(position, element)
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, identifier: str) -> str:
    if key == "style":
        return _style(value)
    if value.startswith("url(#"):
        return f"url(#{identifier}-{value[5:]}"
    if key.endswith("href"):
        return f"#{identifier}-{value[1:]}"
    if key in ("d", "transform", "x", "y", "width", "height", "points"):
        return re.sub(r"\s*([A-Za-z])\s*", r"\1", re.sub(r"\s+", " ", _NUMBER.sub(_shorter, value))).strip()
    return value


def _style(style: str) -> str:
    """One style attribute: a colour becomes the theme's variable, the font that of the page."""
    size = _SIZE.search(style)
    if size:
        style = f"font-size:{float(size[1]):g}px;{'font-weight:700;' if _BOLD.search(style) else ''}" + _FONT.sub("", style)
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, variable)
    return re.sub(r"\s*([:;])\s*", r"\1", style).strip()


def _flatten(element: ET.Element) -> None:
    """Removes metadata and groups that say nothing."""
    kept: list[ET.Element] = []
    for child in element:
        _flatten(child)
        if child.tag in ("metadata", "style"):
            continue
        if child.tag == "g" and not child.attrib:
            kept += list(child)
        elif child.tag != "path" or child.get("style") != "fill:none":
            kept.append(child)
    element[:] = kept


def _shorter(number: re.Match[str]) -> str:
    """A tenth of a point is finer than a screen."""
    return f"{float(number[0]):.1f}".removesuffix(".0")
