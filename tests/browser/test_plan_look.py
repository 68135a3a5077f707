"""The page of a plan in a real browser: it fits phones and desks, in both schemes, and logs nothing."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from ledgerproof.modelling.plan_command import as_json
from reports.plan_page import render_plan
from sim.demands import read_demands
from sim.plan import PLANS, read_plan, read_prices
from sim.plan_answer import answer


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plan_page_fits_and_is_quiet(browser: Browser, tmp_path: Path, scheme: str) -> None:
    plan = read_plan(PLANS / "million.toml", ("max_connections=20",))
    found = answer(plan, read_demands(), read_prices(), samples=50)
    address = render_plan(as_json(found), tmp_path / "plan.html").as_uri()
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    try:
        page = context.new_page()
        noise: list[str] = []
        requested: list[str] = []
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        for width in (400, 719, 720, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            shown = "#fig-tornado .narrow" if width < 720 else "#fig-tornado .wide"
            assert page.locator(shown).is_visible()
        assert "workers alone hold" in page.locator("#verdict").inner_text()
        # Labels of bars stand left of their bars, inside the drawing.
        boxes = page.locator("#fig-tornado .wide text").evaluate_all(
            "all => all.map(each => each.getBoundingClientRect().x)"
        )
        left = page.locator("#fig-tornado .wide svg").bounding_box()
        assert left is not None
        assert min(boxes) >= left["x"]
        assert noise == []
        assert set(requested) <= {address, "data:,"}
    finally:
        context.close()
