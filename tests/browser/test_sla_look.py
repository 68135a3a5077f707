"""The page of the service levels in a real browser: it fits phones and desks, in both schemes, and logs nothing."""

from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Browser

from ledgerproof.sla_table import EXTRAPOLATED, MEASURED, NOT_MEASURED, Line, Source, Table
from reports.sla_page import render_sla

LONG = "100,000 events/s ÷ (0.7 × 4,005 events/s of one projector): busy for 70 % of the time, so a pause is caught up"


def line(level: str, of: str, kind: str, met: bool | None = None) -> Line:
    return Line(
        level=level,
        of=of,
        target="> 100,000 events/s",
        alert="< 80,000 events/s",
        kind=kind,
        met=met,
        measured=99.9931 if kind == MEASURED else None,
        unit="%",
        says="99.9931 % (99.9903 to 99.9999)" if kind == MEASURED else "36 of the slowest worker",
        method=LONG,
    )


TABLE = Table(
    lines=[
        line("Availability", "of this run, outside the faults", MEASURED, met=True),
        line("API latency p99", "of this run, outside the faults", MEASURED, met=False),
        line("Worker throughput", "over 100 consumers", EXTRAPOLATED),
        line("Recovery: entire region down", "", NOT_MEASURED),
    ],
    source=Source(
        run="20260101-000000-s1-abcd",
        verdict="SLA_MISSED",
        scale="200 bets/s for 60 s on 4 Postgres servers and 2 API processes of one machine",
        bench="commit abc, 2026-01-01T00:00:00+00:00, AMD EPYC",
        machine={"cpu": "AMD EPYC", "cores": 2, "memory_gb": 23.5, "os": "Linux 6.1", "python": "3.11.7"},
        commit="0123456789ab-dirty",
        version="0.1.0",
    ),
    missed=["API latency p99"],
    unproven=[],
    made_at="2026-01-01T00:00:00+00:00",
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sla_page_fits_and_is_quiet(browser: Browser, tmp_path: Path, scheme: str) -> None:
    lines = [{**msgspec.to_builtins(line), "result": line.result} for line in TABLE.lines]
    address = render_sla({**msgspec.to_builtins(TABLE), "lines": lines}, tmp_path / "sla.html").as_uri()
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
        results = page.locator("td[data-label=Result]").all_inner_texts()
        assert results == ["met", "MISSED", "extrapolated", "not measured here"]
        assert noise == []
        assert set(requested) <= {address, "data:,"}
    finally:
        context.close()
