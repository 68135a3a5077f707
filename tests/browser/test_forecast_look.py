"""The page of a run with a forecast in a real browser: it fits phones and desks, its labels are readable and apart."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from reports.render import render
from sim.faults import Fault
from tests.model_costs import made_forecast
from tests.page_looks import overlaps, smallest_text_px, texts_beyond
from tests.report_runs import write_run
from tests.unit.test_report_forecast import FIGURES, write_forecast

WIDTHS = (400, 719, 720, 1280)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    faults = [Fault("kill", "pg1", 13.0, 7.3), Fault("kill", "relay", 26.0, 5.2), Fault("pause", "redis", 33.5, 7.5)]
    said = made_forecast(100.0, 60.0, faults=faults, servers=4)
    return render(write_forecast(write_run(tmp_path_factory.mktemp("runs"), "pass", rate_per_s=100), said))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_is_quiet(browser: Browser, page_file: Path, scheme: str) -> None:
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    try:
        page = context.new_page()
        noise: list[str] = []
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(page_file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert texts_beyond(page, "#forecast ") == []
        assert noise == []
    finally:
        context.close()


def test_labels_are_readable_and_do_not_overlap(browser: Browser, page_file: Path) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(page_file.as_uri())
            assert overlaps(page, "#forecast ") == []
            assert smallest_text_px(page, "#forecast ") >= 10
    finally:
        context.close()


@pytest.mark.parametrize("name", FIGURES)
def test_every_band_is_painted_in_the_colour_of_its_line(browser: Browser, page_file: Path, name: str) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(page_file.as_uri())
        fills, strokes = page.evaluate(
            """name => { const paths = [...document.querySelectorAll(`#fig-${name} .wide svg path`)]
                const styles = paths.map(path => getComputedStyle(path))
                return [styles.filter(style => 0.2 < style.opacity * style.fillOpacity
                                            && style.opacity * style.fillOpacity < 0.35).map(style => style.fill),
                        styles.map(style => style.stroke)] }""",
            name,
        )
        assert fills
        assert set(fills) - {"none"} <= set(strokes)
    finally:
        context.close()
