"""One trace leads from the request through Postgres and Kafka to the payout, over every process that took part."""

import asyncio
import secrets
import time
from pathlib import Path

import aiohttp
import pytest
from test_api import Client

from ledgerproof.traces import Trace, read_traces

WITHIN_S = 60.0


@pytest.fixture
async def client(api_bases, operator):
    async with aiohttp.ClientSession(headers=operator) as session:
        yield Client(session, api_bases)


def _asked(*, sampled: bool) -> tuple[str, str]:
    """Return a new trace id and a traceparent in it."""
    trace_id = secrets.token_hex(16)
    return trace_id, f"00-{trace_id}-{secrets.token_hex(8)}-{'01' if sampled else '00'}"


def _orphans(trace: Trace) -> list[str]:
    """Return the spans whose parent is not in the trace; complete, there is one: what the caller's own span began."""
    known = {span.span_id for span in trace.spans}
    return [span.name for span in trace.spans if span.parent_id not in known]


async def _trace(folder: Path, trace_id: str, wanted: set[tuple[str, str]]) -> Trace:
    """Wait until a trace has the spans it should have.

    Each process writes its spans about once a second, so one may be there before the one that caused it.
    """
    deadline = time.monotonic() + WITHIN_S
    seen: set[tuple[str, str]] = set()
    orphans: list[str] = []
    while time.monotonic() < deadline:
        for trace in await asyncio.to_thread(read_traces, folder):
            if trace.trace_id == trace_id:
                seen = {(span.process.rstrip("0123456789"), span.name) for span in trace.spans}
                orphans = _orphans(trace)
                if wanted <= seen and len(orphans) == 1:
                    return trace
        await asyncio.sleep(0.2)
    raise AssertionError(f"after {WITHIN_S} s {sorted(wanted - seen)} are missing; without a parent: {orphans}")


async def _resting(client: Client, match_id: str) -> None:
    """Wait until an order rests in the match's book."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        status, book, _ = await client.get(f"/v1/matches/{match_id}/book")
        assert status == 200
        if any(outcome["back"] or outcome["lay"] for outcome in book["outcomes"]):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the bet is not in the book after {WITHIN_S} s")


async def test_a_bets_trace_leads_from_the_api_to_its_payout(client, service_config) -> None:
    match_id = await client.match()
    layer, backer = await client.funded(10_000), await client.funded(10_000)
    terms = {"match_id": match_id, "outcome": "HOME", "odds": 250, "stake_minor": 1000}
    status, _, _ = await client.post(f"/v1/wallets/{layer}/bets", terms | {"side": "LAY"})
    assert status == 202
    # The fill belongs to the trace of the bet that came second, and two wallets' bets may overtake each other.
    await _resting(client, match_id)
    trace_id, traceparent = _asked(sampled=True)
    status, _, _ = await client.post(
        f"/v1/wallets/{backer}/bets", terms | {"side": "BACK"}, headers={"traceparent": traceparent}
    )
    assert status == 202
    folder = Path(service_config.trace_folder)
    await _trace(folder, trace_id, {("matcher", "matcher BetCreated")})
    for path, body in (("close", {}), ("settle", {"result": "HOME"})):
        status, _, _ = await client.post(f"/v1/matches/{match_id}/{path}", body)
        assert status == 202
    wanted = {
        ("api", "bets"),
        ("api", "ledger_post"),
        ("relay", "outbox BetCreated"),
        ("projector", "projector BetCreated"),
        ("matcher", "matcher BetCreated"),
        ("relay", "outbox BetMatched"),
        ("relay", "outbox EntryPosted"),
        ("projector", "projector EntryPosted"),
    }
    trace = await _trace(folder, trace_id, wanted)
    assert trace.root.name == "bets"
    assert trace.root.attributes["http.response.status_code"] == 202
    assert _orphans(trace) == ["bets"]
    assert all(span.started_us <= span.ended_us for span in trace.spans)


async def test_a_request_that_asks_not_to_be_traced_leaves_no_span(client, service_config) -> None:
    user_id = await client.funded(100)
    unwanted, header = _asked(sampled=False)
    wanted, last = _asked(sampled=True)
    for traceparent in (header, last):
        status, _, _ = await client.post(
            f"/v1/wallets/{user_id}/deposits", {"amount_minor": 5}, headers={"traceparent": traceparent}
        )
        assert status == 202
    folder = Path(service_config.trace_folder)
    await _trace(folder, wanted, {("projector", "projector EntryPosted")})
    assert unwanted not in {trace.trace_id for trace in await asyncio.to_thread(read_traces, folder)}
