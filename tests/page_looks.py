"""What the tests of pages ask of figures in a browser: does all text fit, is it readable, does none lie on another."""

from typing import Any

from playwright.sync_api import Page

WITHIN = """scope => [...document.querySelectorAll(scope + 'figure svg text')]
    .filter(text => text.getBoundingClientRect().right > innerWidth
                 || text.getBoundingClientRect().left < -1)
    .map(text => text.textContent)"""
APART = """scope => [...document.querySelectorAll(scope + 'figure svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')]
        .map(text => [text.textContent, text.getBoundingClientRect()])
        .filter(([, box]) => box.width > 0)
    return boxes.flatMap(([name, a], i) => boxes.slice(i + 1)
        .filter(([, b]) => a.left < b.right - 1 && b.left < a.right - 1
                        && a.top < b.bottom - 4 && b.top < a.bottom - 4)
        .map(([other]) => `${name} / ${other}`))
})"""
SIZES = """scope => Math.min(...[...document.querySelectorAll(scope + 'figure svg text')]
    .filter(text => text.getBoundingClientRect().width > 0)
    .map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))"""


def texts_beyond(page: Page, scope: str = "") -> Any:
    """Texts of figures that reach out of the window; `scope` is a selector before `figure`, with its blank."""
    return page.evaluate(WITHIN, scope)


def overlaps(page: Page, scope: str = "") -> Any:
    """Pairs of texts of one figure that lie on each other."""
    return page.evaluate(APART, scope)


def smallest_text_px(page: Page, scope: str = "") -> Any:
    """The height of the smallest text that is shown in a figure."""
    return page.evaluate(SIZES, scope)
