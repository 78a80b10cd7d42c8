"""The page: what it holds is escaped, what is missing is said, and it asks for nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from qvit.analyze.report.page import render
from qvit.analyze.report.section import Group, Key, Section, Strip, Table, Thumbnail
from qvit.analyze.report.svg import draw

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _render(*sections: Section, heading: str = "vit, Q-ViT W2A2") -> str:
    return render(heading, {"bits": "2"}, sections, {"command": ["qvit", "report"], "rows": []}, "made here")


def test_names_cannot_break_out() -> None:
    panel = draw("p", ATTACK, ATTACK, lambda axes: axes.set_xlabel("x") and None)
    picture = Thumbnail("data:image/png;base64,AA==", ATTACK, ATTACK)
    section = Section(
        id="s",
        title=ATTACK,
        reading=ATTACK,
        caption=ATTACK,
        keys=[Key(ATTACK, "blue")],
        panels=[panel],
        choice="Block",
        groups=[Group(ATTACK, strips=[Strip(ATTACK, [picture])])],
        table=Table([ATTACK], [[ATTACK]]),
        missing=[ATTACK],
    )
    numbers = {"command": ["qvit", ATTACK], "rows": [{"model": ATTACK}]}
    page = render(ATTACK, {ATTACK: ATTACK}, [section], numbers, ATTACK)
    elements = _Elements()
    elements.feed(page)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 2  # the numbers and the page's own
    assert tags.count("img") == 1
    assert not any("onerror" in attributes for _, attributes in elements.found)
    text = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)
    assert text
    assert json.loads(text[1]) == numbers


def test_an_empty_section_says_why_and_has_no_figure() -> None:
    page = _render(Section(id="s", title="t", missing=["There is no log."]))
    assert "There is no log." in page
    assert "<figure>" not in page
    assert Section(id="s", title="t", missing=["x"]).empty
    assert not Section(id="s", title="t", table=Table(["a"], [["1"]])).empty


@pytest.mark.parametrize("chosen", [0, 2])
def test_one_group_is_chosen(chosen: int) -> None:
    groups = [Group(f"Block {i}", [draw(f"g{i}", "t", "", lambda axes: None)]) for i in range(3)]
    page = _render(Section(id="s", title="t", choice="Block", groups=groups, chosen=chosen))
    elements = _Elements()
    elements.feed(page)
    shown = [attributes for _, attributes in elements.found if attributes.get("data-group") == "s"]
    assert ["data-chosen" in attributes for attributes in shown] == [i == chosen for i in range(3)]
    radios = [attributes for tag, attributes in elements.found if tag == "input"]
    assert ["checked" in attributes for attributes in radios] == [i == chosen for i in range(3)]


def test_nothing_is_fetched() -> None:
    page = _render(Section(id="s", title="t", panels=[draw("p", "t", "", lambda axes: None)]))
    assert "http://" not in page
    assert "https://" not in page
    elements = _Elements()
    elements.feed(page)
    policy = next(a["content"] for tag, a in elements.found if tag == "meta" and "content" in a and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for tag, attributes in elements.found:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
