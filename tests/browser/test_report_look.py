"""The report in a real browser: it fits phones and desks, in both colour schemes, and logs nothing."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from reports.render import render
from tests.page_looks import overlaps, texts_beyond
from tests.report_runs import Kind, write_run

WIDTHS = (400, 719, 720, 1280)
SHOWN: tuple[Kind, ...] = ("pass", "violated", "aborted")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {kind: render(write_run(folder, kind, rate_per_s=100)) for kind in SHOWN}


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_is_quiet(browser: Browser, pages: dict[Kind, Path], kind: Kind, scheme: str) -> None:
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    try:
        page = context.new_page()
        noise: list[str] = []
        requested: list[str] = []
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(pages[kind].as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            # A label of a drawing that ends beyond the page would be cut off, not scrolled to.
            assert texts_beyond(page) == []
        assert noise == []
        assert set(requested) <= {pages[kind].as_uri(), "data:,"}
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_and_ink_follow_the_colour_scheme(browser: Browser, pages: dict[Kind, Path], scheme: str) -> None:
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    try:
        page = context.new_page()
        page.goto(pages["pass"].as_uri())
        paper, ink = page.evaluate(
            "() => { const style = getComputedStyle(document.body); return [style.backgroundColor, style.color] }"
        )

        def brightness(colour: str) -> int:
            return sum(int(part) for part in colour[4:-1].split(","))

        assert (brightness(paper) < brightness(ink)) is (scheme == "dark")
        line = page.evaluate(
            "() => getComputedStyle(document.querySelector('#fig-throughput .wide path[style*=\"--c1\"]')).stroke"
        )
        assert brightness(line) > 0
    finally:
        context.close()


def test_text_in_figures_is_readable_on_a_phone(browser: Browser, pages: dict[Kind, Path]) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 900})
    try:
        page = context.new_page()
        page.goto(pages["pass"].as_uri())
        heights = page.evaluate(
            """() => [...document.querySelectorAll('figure .narrow text')]
                .map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"""
        )
        assert len(heights) > 100
        assert min(heights) >= 10
    finally:
        context.close()


def test_labels_of_a_figure_do_not_overlap(browser: Browser, pages: dict[Kind, Path]) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(pages["pass"].as_uri())
            assert overlaps(page) == []
    finally:
        context.close()
