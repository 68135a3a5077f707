"""The HTTP API on the real stack: every command, its replay, its refusals, and bad input."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from reference.uuid7 import uuid7

Reply = tuple[int, Any, Any]


class Client:
    """A small caller that knows the header of the key."""

    def __init__(self, session: aiohttp.ClientSession, bases: list[str]) -> None:
        self._session = session
        self.bases = bases

    async def post(
        self,
        path: str,
        body: object = None,
        *,
        key: str | None = None,
        api: int = 0,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        headers = {"idempotency-key": key or uuid.uuid4().hex} | (headers or {})
        async with self._session.post(self.bases[api] + path, json=body, headers=headers) as response:
            return response.status, await response.json(content_type=None), response.headers

    async def get(self, path: str, *, api: int = 0) -> Reply:
        async with self._session.get(self.bases[api] + path) as response:
            return response.status, await response.json(content_type=None), response.headers

    async def funded(self, amount: int = 10_000) -> int:
        user_id = uuid.uuid4().int % 10**15 + 1
        status, answer, _ = await self.post(f"/v1/wallets/{user_id}/deposits", {"amount_minor": amount})
        assert (status, answer["balance_minor"]) == (202, amount)
        return user_id

    async def match(self, closes_in_s: float = 3600) -> str:
        match_id = str(uuid7())
        body = {"match_id": match_id, "closes_at_ms": int((time.time() + closes_in_s) * 1000)}
        status, _, _ = await self.post("/v1/matches", body)
        assert status == 202
        return match_id

    async def bet(
        self, user_id: int, match_id: str, side: str = "BACK", *, key: str | None = None, api: int = 0, **changes
    ) -> Reply:
        body = {"match_id": match_id, "outcome": "HOME", "side": side, "odds": 250, "stake_minor": 100} | changes
        return await self.post(f"/v1/wallets/{user_id}/bets", body, key=key, api=api)

    async def until(self, path: str, wanted, within_s: float = 20) -> Any:
        """Poll a view until `wanted(view)`; fails with the last view."""
        deadline = time.monotonic() + within_s
        while True:
            _, view, _ = await self.get(path)
            if wanted(view):
                return view
            assert time.monotonic() < deadline, f"not within {within_s} s: {view}"
            await asyncio.sleep(0.05)


@pytest.fixture
async def client(api_bases: list[str], operator: dict[str, str]) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(headers=operator) as session:
        yield Client(session, api_bases)


async def test_a_replayed_deposit_answers_the_original_on_either_process(client) -> None:
    user_id, key = uuid.uuid4().int % 10**15 + 1, uuid.uuid4().hex
    path = f"/v1/wallets/{user_id}/deposits"
    first = await client.post(path, {"amount_minor": 500}, key=key)
    await client.post(path, {"amount_minor": 7})
    second = await client.post(path, {"amount_minor": 500}, key=key, api=1)
    assert first[:2] == (
        202,
        {"outcome": "ACCEPTED", "user_id": user_id, "seq": 1, "balance_minor": 500, "replayed": False},
    )
    assert second[:2] == (202, first[1] | {"replayed": True})


async def test_a_key_with_another_body_is_refused_naming_the_field(client) -> None:
    user_id, key = await client.funded(), uuid.uuid4().hex
    match_id = await client.match()
    assert (await client.bet(user_id, match_id, key=key))[0] == 202
    status, answer, _ = await client.bet(user_id, match_id, key=key, odds=260)
    assert (status, answer["outcome"], answer["field"]) == (409, "REPLAYED_DIFFERENTLY", "odds")
    status, answer, _ = await client.post(f"/v1/wallets/{user_id}/deposits", {"amount_minor": 5}, key=key)
    assert (status, answer["field"]) == (409, "op")


async def test_a_refusal_is_stored_and_final(client) -> None:
    user_id, key = await client.funded(100), uuid.uuid4().hex
    path = f"/v1/wallets/{user_id}/withdrawals"
    status, answer, _ = await client.post(path, {"amount_minor": 101}, key=key)
    assert (status, answer["outcome"], answer["replayed"]) == (422, "INSUFFICIENT_FUNDS", False)
    await client.post(f"/v1/wallets/{user_id}/deposits", {"amount_minor": 1000})
    status, answer, _ = await client.post(path, {"amount_minor": 101}, key=key)
    assert (status, answer["outcome"], answer["replayed"]) == (422, "INSUFFICIENT_FUNDS", True)


async def test_an_accepted_bet_replays_after_its_match_closed_but_a_new_one_is_refused(client) -> None:
    user_id, key = await client.funded(), uuid.uuid4().hex
    match_id = await client.match()
    accepted = await client.bet(user_id, match_id, key=key)
    assert (await client.post(f"/v1/matches/{match_id}/close"))[1]["state"] == "CLOSED"
    assert (await client.bet(user_id, match_id, key=key))[1] == accepted[1] | {"replayed": True}
    status, answer, _ = await client.bet(user_id, match_id)
    assert (status, answer["outcome"]) == (422, "MATCH_CLOSED")


async def test_bets_on_an_unknown_match_or_outcome_are_refused(client) -> None:
    user_id = await client.funded()
    assert (await client.bet(user_id, str(uuid7())))[1]["outcome"] == "UNKNOWN_MATCH"
    assert (await client.bet(user_id, await client.match(), outcome="MOON"))[1]["outcome"] == "UNKNOWN_OUTCOME"


async def test_a_match_runs_from_open_to_settled_and_pays_the_winner_once(client) -> None:
    backer, layer = await client.funded(), await client.funded()
    match_id = await client.match()
    assert (await client.bet(backer, match_id, "BACK"))[1]["balance_minor"] == 9_900
    assert (await client.bet(layer, match_id, "LAY"))[1]["balance_minor"] == 9_850
    path = f"/v1/matches/{match_id}"
    assert (await client.post(f"{path}/settle", {"result": "HOME"}))[1]["outcome"] == "ILLEGAL_TRANSITION"
    # Both orders must be in the book before the close, or they would be refunded as late.
    layers_bet = (await client.get(f"/v1/wallets/{layer}/entries"))[1]["entries"][1]["bet_id"]
    view = await client.until(f"/v1/wallets/{layer}/bets/{layers_bet}", lambda view: view["state"] == "MATCHED")
    assert (view["matched_stake_minor"], view["reserve_minor"]) == (100, 150)
    assert (await client.post(f"{path}/close"))[0] == 202
    assert (await client.post(f"{path}/settle", {"result": "MOON"}))[1]["outcome"] == "UNKNOWN_OUTCOME"
    assert (await client.post(f"{path}/settle", {"result": "HOME"}))[1]["replayed"] is False
    await client.until(path, lambda view: view["state"] == "SETTLED")
    assert (await client.post(f"{path}/settle", {"result": "HOME"}))[1]["replayed"] is True
    assert (await client.post(f"{path}/settle", {"result": "AWAY"}))[:1] == (409,)
    assert (await client.post(f"{path}/void"))[1]["outcome"] == "ILLEGAL_TRANSITION"
    entries = (await client.get(f"/v1/wallets/{backer}/entries"))[1]["entries"]
    # Stake 100 at 2.50: pot 250, commission 2 % of 150.
    assert [(entry["type"], entry["amount_minor"], entry["contra"]) for entry in entries] == [
        ("CREDIT", 10_000, "EXTERNAL"),
        ("DEBIT", -100, "ESCROW"),
        ("PAYOUT", 250, "ESCROW"),
        ("DEBIT", -3, "HOUSE"),
    ]
    assert (await client.get(f"/v1/wallets/{layer}/balance?consistency=strong"))[1]["balance_minor"] == 9_850


async def test_a_void_match_gives_every_reserve_back(client) -> None:
    backer, layer = await client.funded(), await client.funded()
    match_id = await client.match()
    await client.bet(backer, match_id, "BACK")
    await client.bet(layer, match_id, "LAY")
    assert (await client.post(f"/v1/matches/{match_id}/void"))[1]["state"] == "VOID"
    await client.until(f"/v1/matches/{match_id}", lambda view: view["settled"])
    for user_id in (backer, layer):
        await client.until(
            f"/v1/wallets/{user_id}/balance?consistency=strong", lambda view: view["balance_minor"] == 10_000
        )


async def test_a_cancelled_bet_is_refunded_once(client) -> None:
    user_id, key = await client.funded(), uuid.uuid4().hex
    match_id = await client.match()
    bet_id = (await client.bet(user_id, match_id))[1]["bet_id"]
    path = f"/v1/wallets/{user_id}/bets/{bet_id}/cancel"
    assert (await client.post(path, key=key))[0] == 202
    await client.until(
        f"/v1/wallets/{user_id}/balance?consistency=strong", lambda view: view["balance_minor"] == 10_000
    )
    assert (await client.post(path, key=key))[1]["replayed"] is True
    assert (await client.post(path))[1]["outcome"] == "NOTHING_TO_CANCEL"
    stranger = await client.funded()
    assert (await client.post(f"/v1/wallets/{stranger}/bets/{bet_id}/cancel"))[1]["outcome"] == "UNKNOWN_BET"


async def test_a_read_with_min_seq_is_never_behind_unflagged(client) -> None:
    user_id = await client.funded(1000)
    for number in range(2, 30):
        seq = (await client.post(f"/v1/wallets/{user_id}/withdrawals", {"amount_minor": 1}))[1]["seq"]
        assert seq == number
        _, view, _ = await client.get(f"/v1/wallets/{user_id}/balance?min_seq={seq}", api=number % 2)
        assert view["seq"] >= seq or view["stale"]
        _, view, _ = await client.get(f"/v1/wallets/{user_id}/balance?consistency=strong")
        assert (view["seq"], view["balance_minor"], view["source"], view["stale"]) == (
            seq,
            1001 - number,
            "ledger",
            False,
        )
    await client.until(f"/v1/wallets/{user_id}/balance", lambda view: view["source"] == "redis" and view["seq"] == 29)


async def test_history_pages_by_cursor_without_gap_or_repeat(client) -> None:
    user_id = await client.funded()
    for _ in range(6):
        await client.post(f"/v1/wallets/{user_id}/deposits", {"amount_minor": 1})
    seen, cursor = [], ""
    while cursor is not None:
        _, page, _ = await client.get(f"/v1/wallets/{user_id}/entries?limit=3{cursor and '&cursor=' + cursor}")
        seen += [entry["seq"] for entry in page["entries"]]
        cursor = page["next_cursor"]
    assert seen == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/wallets/0/deposits", {"amount_minor": 1}, "user_id"),
        ("/v1/wallets/9223372036854775808/deposits", {"amount_minor": 1}, "user_id"),
        ("/v1/wallets/abc/deposits", {"amount_minor": 1}, "user_id"),
        ("/v1/wallets/1/deposits", {"amount_minor": 0}, "amount_minor"),
        ("/v1/wallets/1/deposits", {"amount_minor": -5}, "amount_minor"),
        ("/v1/wallets/1/deposits", {"amount_minor": 10**30}, "amount_minor"),
        ("/v1/wallets/1/deposits", {"amount_minor": 1.5}, "amount_minor"),
        ("/v1/wallets/1/deposits", {"amount_minor": "5"}, "amount_minor"),
        ("/v1/wallets/1/deposits", {}, "body"),
        ("/v1/wallets/1/deposits", {"amount_minor": 1, "bonus": 1}, "body"),
        ("/v1/wallets/1/deposits", [], "body"),
        ("/v1/wallets/1/bets/xyz/cancel", {}, "bet_id"),
        ("/v1/matches/xyz/close", {}, "match_id"),
        ("/v1/matches", {"match_id": str(uuid.UUID(int=1)), "closes_at_ms": 1, "outcomes": ["A"]}, "outcomes"),
        ("/v1/matches", {"match_id": str(uuid.UUID(int=1)), "closes_at_ms": 1, "outcomes": ["A", "A"]}, "outcomes"),
        ("/v1/matches", {"match_id": str(uuid.UUID(int=1)), "closes_at_ms": 1, "outcomes": ["A", "\x00"]}, "outcomes"),
        ("/v1/matches", {"match_id": str(uuid.UUID(int=1)), "closes_at_ms": 10**18}, "closes_at_ms"),
    ],
)
async def test_malformed_commands_are_refused_naming_the_field(client, path, body, field) -> None:
    status, answer, headers = await client.post(path, body)
    assert (status, answer["field"]) == (400, field), answer
    assert headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("key", ["", "ledger:PAYOUT:1:1", "k" * 256])
async def test_keys_that_are_empty_reserved_or_too_long_are_refused(client, operator, key) -> None:
    async with (
        aiohttp.ClientSession(headers=operator) as session,
        session.post(
            f"{client.bases[0]}/v1/wallets/1/deposits", json={"amount_minor": 1}, headers={"idempotency-key": key}
        ) as response,
    ):
        answer = await response.json(content_type=None)
    assert (response.status, answer["field"]) == (400, "Idempotency-Key")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"null", b"9" * 10_000, b'{"amount_minor": 1e400}'])
async def test_bodies_that_are_no_command_are_refused(client, operator, body) -> None:
    headers = operator | {"idempotency-key": "k", "content-type": "application/json"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{client.bases[0]}/v1/wallets/1/deposits", data=body) as response,
    ):
        answer = json.loads(await response.read())
    assert response.status == 400, answer


async def test_unknown_routes_and_wallets_are_404(client) -> None:
    assert (await client.get("/v1/nothing"))[0] == 404
    assert (await client.get(f"/v1/matches/{uuid7()}"))[0] == 404
    assert (await client.get(f"/v1/wallets/{10**16}/balance"))[0] == 404
    assert (await client.get(f"/v1/wallets/1/bets/{uuid7()}"))[0] == 404


async def test_the_openapi_document_names_every_route(client) -> None:
    _, document, _ = await client.get("/openapi.json")
    assert document["openapi"].startswith("3.1")
    assert "/v1/wallets/{user_id}/bets" in document["paths"]
    for name, path in document["paths"].items():
        for operation in path.values() if name != "/openapi.json" else ():
            assert {"400", "503"} <= operation["responses"].keys()


async def test_metrics_carry_the_seeds_names(client) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{client.bases[0]}/metrics") as response:
        text = await response.text()
    for name in (
        "http_request_duration_seconds",
        "http_requests_total",
        "http_request_errors_total",
        "ledger_entries_total",
    ):
        assert name in text
