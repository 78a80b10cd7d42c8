"""The page of ``qvit report`` in a browser: no error, every plot to be seen, selectors and themes work, on a phone too.

Needs Chromium (Debian's ``chromium``, or QVIT_CHROMIUM) and ``pip install 'qvit[browser]'``; skipped without.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .reports import FIGURES, expected_panels

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install 'qvit[browser]'")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("QVIT_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: install it, or set QVIT_CHROMIUM")

# Text of a plot that is not within it, as the browser sets it.
_CUT_OFF = """() => [...document.querySelectorAll('svg[role=img] text')].filter((text) => {
  const inner = text.getBoundingClientRect(), outer = text.closest('svg').getBoundingClientRect();
  return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1
    || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1);
}).map((text) => text.closest('svg').id + ': ' + text.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # The sandbox needs rights that a container does not give; the page is our own.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, full_report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a window of the width, and with the colour scheme, that the test asks for."""
    width, scheme, scripts = getattr(request, "param", (1200, "light", True))
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=scripts)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    page.goto((full_report / "page.html").as_uri())
    yield page
    assert complaints == []
    context.close()


@pytest.mark.parametrize("opened", [(1200, "light", True), (1200, "dark", True), (360, "light", True)], indirect=True)
def test_every_plot_is_seen_and_nothing_is_cut_off(opened: Any) -> None:
    for name in FIGURES:
        assert opened.locator(f"section#{name} figure").is_visible(), name
    ids = opened.eval_on_selector_all("svg[role=img]", "all => all.map((svg) => svg.id)")
    assert set(ids) == expected_panels(blocks=1, baseline=True)
    for identifier in ids:
        box = opened.locator(f"[id='{identifier}']").bounding_box()
        assert box, identifier
        assert box["width"] > 200, identifier
        assert box["height"] > 100, identifier
    assert opened.evaluate(_CUT_OFF) == []
    # Nothing makes the page scroll sideways.
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    assert opened.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


@pytest.mark.parametrize("opened", [(360, "light", True)], indirect=True)
def test_text_of_plots_is_legible_on_a_phone(opened: Any) -> None:
    script = (
        "all => Math.min(...all.filter((t) => t.getBoundingClientRect().width).map((t) => t.getBoundingClientRect().height))"
    )
    assert opened.eval_on_selector_all("svg[role=img] text:not([transform])", script) >= 10  # pixels from ascent to descent


@pytest.mark.parametrize("opened", [(1200, "light", True), (1200, "dark", True)], indirect=True)
def test_the_theme_follows_the_system_until_the_button_changes_it(opened: Any) -> None:
    colours = (
        "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"
    )
    first, button = opened.evaluate(colours), opened.locator("#theme")
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert button.text_content() == ("Light" if dark else "Dark")
    button.click()
    second = opened.evaluate(colours)
    assert button.text_content() == ("Dark" if dark else "Light")
    assert all(a != b for a, b in zip(first, second, strict=True))
    button.click()
    assert opened.evaluate(colours) == first
    light, darker = (first, second) if not dark else (second, first)
    assert _brightness(light[0]) > 600 > _brightness(darker[0])
    assert _brightness(light[1]) < _brightness(darker[1])


def _brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_the_numbers_can_be_downloaded(opened: Any) -> None:
    with opened.expect_download() as download:
        opened.locator("#download").click()
    numbers = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert download.value.suggested_filename == "report.json"
    assert numbers["schema"] == 1
    assert {row["figure"] for row in numbers["rows"]} == set(FIGURES) - {"maps"}
    assert numbers["histograms"]


@pytest.mark.parametrize("opened", [(1200, "light", False)], indirect=True)
def test_without_scripts_everything_is_shown(opened: Any) -> None:
    assert all(group.is_visible() for group in opened.locator(".group").all())
    assert not any(opened.locator(selector).first.is_visible() for selector in ("#theme", "#download", ".choice"))
