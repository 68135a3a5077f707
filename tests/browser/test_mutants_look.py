"""The page of the planted bugs in a real browser: it fits phones and desks in both colour schemes, and is quiet."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from ledgerproof.mutants import matrix, page
from ledgerproof.mutants.workshop import SOURCE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_of_planted_bugs_fits_and_is_quiet(browser: Browser, tmp_path: Path, scheme: str) -> None:
    stored = matrix.load(SOURCE / matrix.STORED)
    path = tmp_path / "mutants.html"
    path.write_text(page.render(stored), encoding="utf-8")
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    try:
        shown = context.new_page()
        noise: list[str] = []
        requested: list[str] = []
        shown.on("console", lambda message: noise.append(message.text))
        shown.on("pageerror", lambda error: noise.append(str(error)))
        shown.on("request", lambda request: requested.append(request.url))
        for width in (400, 1280):
            shown.set_viewport_size({"width": width, "height": 900})
            shown.goto(path.as_uri())
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
        listed = shown.evaluate(
            "() => [...document.querySelectorAll('tbody tr td:first-child code')].map(c => c.innerText)"
        )
        assert {row.id for row in stored.rows} <= set(listed)
        assert noise == []
        assert set(requested) <= {path.as_uri(), "data:,"}
    finally:
        context.close()
