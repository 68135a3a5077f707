"""The page of a benchmark in a real browser: it fits phones and desks, in both colour schemes, and logs nothing."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from reports.bench_page import render_bench

ROW = {
    "variant": "",
    "unit": "bets/s",
    "rate": 4600.0,
    "p50_ms": 20.0,
    "p99_ms": 80.0,
    "ratio_to_floor": 0.46,
    "floor": "floor_unnest",
    "valid": True,
    "reason": "",
    "loop": "open, Poisson arrivals; latency from the intended time",
    "data_age": 20_000,
    "duration_s": 6.0,
    "samples": 27_600,
    "cpu_ms_per_op": dict.fromkeys(("api", "generator", "kafka", "matcher", "postgres", "projector"), 0.123),
    "fsync": "Postgres, at every COMMIT (fsync on, synchronous_commit on)",
    "details": {},
}
SEARCH = [
    {"rate": 800.0, "held": "held", "why": "", "confirming": False},
    {"rate": 1600.0, "held": "not held", "why": "at 1,600/s matcher lag grows by 131/s", "confirming": True},
]
GROWN = {"wallet_ledger (shard, user_id, idempotent_key)": 92.5, "bets": 300.0, "WAL": 1200.0}
RESULT = {
    "version": "0.1.0",
    "commit": "0123456789ab-dirty",
    "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gb": 23.5, "os": "Linux 6.1", "python": "3.11.7"},
    "started_at": "2026-01-01T00:00:00+00:00",
    "duration_s": 560.0,
    "quick": True,
    "servers": 1,
    "apis": 1,
    "rows": [
        {**ROW, "name": "floor_unnest", "variant": "batch 256", "rate": 10_000.0},
        {**ROW, "name": "http_single_bets_accepted", "details": {"search": SEARCH}},
        {**ROW, "name": "reads_redis", "valid": False, "reason": "only 366 of 1008 answers came from redis"},
        {
            **ROW,
            "name": "bytes_per_bet",
            "rate": None,
            "details": {
                "bytes_per_bet": {"accepted": 392.5, "whole_life": 392.5},
                "when_accepted": GROWN,
                "when_settled": GROWN,
            },
        },
    ],
    "checked": True,
    "checks": {"broken_chain": 0, "acknowledged_bet_missing": 0},
    "unchecked": "",
    "peak_rss_mb": {"api0": 95.0, "pg0": 159.2},
    "residue": [],
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bench_page_fits_and_is_quiet(browser: Browser, tmp_path: Path, scheme: str) -> None:
    address = render_bench(RESULT, tmp_path / "bench.html").as_uri()
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
        bars = page.evaluate(
            "() => [...document.querySelectorAll('.bars path')].map(bar => getComputedStyle(bar).fill)"
        )
        assert len(set(bars)) == 3, "the empty bar, a floor or invalid row, and a row of the service"
        assert noise == []
        assert set(requested) <= {address, "data:,"}
    finally:
        context.close()
