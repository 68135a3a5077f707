"""The pages of a load in a real browser: they fit phones and desks, their labels are readable and apart."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from ledgerproof.loading import compare
from reports.compare_page import render_comparison
from reports.render import render
from tests.load_files import MATCH_DAY, STEADY, Part, knee_of, made_load, write_load_run
from tests.page_looks import overlaps, smallest_text_px, texts_beyond

WIDTHS = (400, 719, 720, 1280)
PAGES = ("match_day", "knee", "one_second", "compared")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loads")
    day = made_load(
        MATCH_DAY,
        profile="match_day",
        freeze_s=(48, 51),
        lost=lambda t: 60 <= t < 61.5,
        dropped=lambda t: 90 <= t < 90.7,
    )
    knee = write_load_run(folder / "knee", made_load([Part("window", 20, 100)]))
    (knee / "knee.json").write_text(json.dumps(knee_of()))
    one = write_load_run(folder / "one", made_load([Part("only", 1, 40)]))
    a, b = made_load(STEADY), made_load(STEADY, seed=6, slower=1.4, freeze_s=(12, 12.6))
    places = (write_load_run(folder / "a", a), write_load_run(folder / "b", b))
    found = compare.told(compare.compare(a, b, ("a", "b")))
    return {
        "match_day": render(write_load_run(folder / "day", day)),
        "knee": render(knee),
        "one_second": render(one),
        "compared": render_comparison(found, places, compare.NOTICED, folder / "compared.html"),
    }


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_is_quiet(browser: Browser, pages: dict[str, Path], name: str, scheme: str) -> None:
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    try:
        page = context.new_page()
        noise: list[str] = []
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(pages[name].as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert texts_beyond(page) == []
        assert noise == []
    finally:
        context.close()


@pytest.mark.parametrize("name", PAGES)
def test_labels_are_readable_and_do_not_overlap(browser: Browser, pages: dict[str, Path], name: str) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(pages[name].as_uri())
            assert overlaps(page) == []
            assert smallest_text_px(page) >= 10
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_steps_of_the_heat_map_differ_from_paper_and_from_each_other(
    browser: Browser, pages: dict[str, Path], scheme: str
) -> None:
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    try:
        page = context.new_page()
        page.goto(pages["match_day"].as_uri())
        colours = page.evaluate(
            """() => { const style = getComputedStyle(document.documentElement);
                return ['--paper', ...[1, 2, 3, 4, 5, 6, 7].map(n => `--h${n}`)]
                    .map(name => style.getPropertyValue(name).trim()) }"""
        )

        def luminance(colour: str) -> float:
            parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        shades = [luminance(colour) for colour in colours]
        assert shades == sorted(shades, reverse=scheme == "light")
        for one, other in pairwise(shades):
            assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 1.2
    finally:
        context.close()
