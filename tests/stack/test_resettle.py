"""A match that is settled again: corrections add to the ledger, nobody is taken below zero, and nothing is lost."""

import asyncio
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import msgspec
import pytest
from exchange_floor import PLENTY, Floor, arrival, crowd, wallets

from compose.stack import Stack
from reference import settler as settler_module
from reference.commands import MatchState, ResettleMatch, Side
from reference.config import ServiceConfig
from reference.errors import UnknownOutcome
from reference.exchange import advances, cancel_bet, resettle_match
from reference.matcher import BookCache
from reference.settler import Settlement
from reference.store import Store

TEST_CLASS = 9_001
"""The class of these tests' own settlement locks."""
DEATHS = 4
"""How often a settler process is killed in each version of a match."""


@pytest.fixture
async def store(service_config: ServiceConfig) -> AsyncIterator[Store]:
    opened = Store(service_config, "ledger_settler")
    yield opened
    await opened.close()


@pytest.fixture
def keep_away(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that reserves a match for this test: the stack's own settler finds it locked."""
    monkeypatch.setattr(settler_module, "SETTLEMENT_CLASS", TEST_CLASS)
    return floor.reserve


async def played(
    floor: Floor, keep_away: Any, bets: int = 60, seed: int = 5, users: list[int] | None = None
) -> tuple[UUID, list[int]]:
    """A closed match with paid bets, some of them cancelled."""
    match_id = await floor.open_match()
    await keep_away(match_id)
    users = users or wallets(8)
    await floor.fund(users)
    everything = crowd(seed, [match_id], users, bets)
    books = BookCache()
    for start in range(0, bets, 500):
        batch = everything[start : start + 500]
        await floor.pay(batch)
        await floor.apply(books, batch)
    for bet in everything[:90:9]:
        await cancel_bet(floor.api, match_id, bet.bet.bet_id, bet.bet.user_id, uuid4().hex)
    await floor.move(match_id, MatchState.CLOSED)
    return match_id, users


async def ask(
    floor: Floor, match_id: UUID, result: str | None, corrects: int | None = None, key: str | None = None
) -> tuple[str, str | None, int | None]:
    """Ask for another result; return status, state and version."""
    row = await resettle_match(floor.api, match_id, ResettleMatch(result, corrects), key or uuid4().hex)
    return row["status"], row["state"], row["version"]


async def settled(floor: Floor, store: Store, match_id: UUID, result: str) -> None:
    await floor.move(match_id, MatchState.SETTLING, result)
    assert await Settlement(store, match_id).run(page_orders=17)


async def right_nets(floor: Floor, match_id: UUID, result: str | None) -> dict[int, int]:
    """What the match changes for each wallet in the end, by the fills and other arithmetic than the service's."""
    won: dict[tuple[Any, int], int] = defaultdict(int)
    nets: dict[int, int] = defaultdict(int)
    exact: dict[Any, Fraction] = defaultdict(Fraction)
    for fill in await floor.fills(match_id):
        profit = Fraction(fill["stake"] * (fill["odds"] - 100), 100)
        before = exact[fill["lay_bet_id"]]
        exact[fill["lay_bet_id"]] = before + profit
        liability = ceil(before + profit) - ceil(before)
        if result is None:
            continue
        if fill["outcome"] == result:
            won[fill["back_bet_id"], fill["back_user"]] += profit.__floor__()
            nets[fill["lay_user"]] -= liability
        else:
            won[fill["lay_bet_id"], fill["lay_user"]] += fill["stake"]
            nets[fill["back_user"]] -= fill["stake"]
    for (_, user), amount in won.items():
        nets[user] += amount - ceil(Fraction(amount * floor.api.config.commission_bps, 10_000))
    return nets


async def nobody_is_wrong(
    floor: Floor, match_id: UUID, users: list[int], result: str | None, spent: dict[int, int] | None = None
) -> None:
    """Every wallet holds what the result gives it, less what it spent, plus what the house advanced."""
    nets = await right_nets(floor, match_id, result)
    for user in users:
        balance, _ = await floor.head(user)
        owed = sum(row["owed"] for row in await advances(floor.api, user))
        assert balance - owed == PLENTY + nets[user] - (spent or {}).get(user, 0), user
    assert await floor.escrow(match_id) == 0


async def transitions(floor: Floor, match_id: UUID) -> list[tuple[Any, ...]]:
    query = """SELECT from_state, to_state, settlement_version, result FROM match_transitions
                WHERE match_id = $1 ORDER BY transition_no"""
    return [tuple(row) for row in await floor.at(match_id).fetch(query, match_id)]


async def test_a_match_settled_again_and_again_pays_each_time_what_its_last_result_gives(
    floor: Floor, store: Store, keep_away: Any
) -> None:
    match_id, users = await played(floor, keep_away, bets=90)
    await settled(floor, store, match_id, "HOME")
    await nobody_is_wrong(floor, match_id, users, "HOME")
    first = await floor.entries(match_id)
    for version, result in enumerate(["AWAY", None, "DRAW", "HOME", "AWAY"], 2):
        assert await ask(floor, match_id, result, version - 1) == ("ACCEPTED", "SETTLING", version)
        assert await Settlement(store, match_id).run(page_orders=17)
        await nobody_is_wrong(floor, match_id, users, result)
        state = "VOID" if result is None else "SETTLED"
        row = await floor.at(match_id).fetchrow("SELECT * FROM matches WHERE match_id = $1", match_id)
        assert (row["state"], row["settlement_version"], row["result"]) == (state, version, result)
        assert {order["state"] for order in await floor.orders(match_id)} == {state, "CANCELLED"}
    assert (await transitions(floor, match_id))[4:8] == [
        ("SETTLED", "SETTLING", 2, "AWAY"),
        ("SETTLING", "SETTLED", 2, "AWAY"),
        ("SETTLED", "SETTLING", 3, None),
        ("SETTLING", "VOID", 3, None),
    ]
    told = [msgspec.json.decode(row["payload"]) for row in await floor.events(match_id, "MatchSettled")]
    assert [event["settlement_version"] for event in told] == [1, 2, 3, 4, 5, 6]
    assert [event["result"] for event in told] == ["HOME", "AWAY", None, "DRAW", "HOME", "AWAY"]
    assert set(first) <= set(await floor.entries(match_id)), "corrections add, they rewrite nothing"


async def test_a_wallet_that_spent_its_wrong_payout_stays_at_zero_and_owes_the_house(
    floor: Floor, store: Store, keep_away: Any
) -> None:
    match_id, users = await played(floor, keep_away, bets=90)
    await settled(floor, store, match_id, "HOME")
    spent = await floor.spend(users)
    for version, result in enumerate(["AWAY", None, "HOME"], 2):
        assert (await ask(floor, match_id, result))[0] == "ACCEPTED"
        assert await Settlement(store, match_id).run(page_orders=17)
        await nobody_is_wrong(floor, match_id, users, result, spent)
        assert version > 2 or any([await advances(floor.api, user) for user in users])
    for connection in floor.owner:
        assert await connection.fetchval("SELECT count(*) FROM wallet_ledger WHERE balance_snapshot < 0") == 0


async def test_what_a_wallet_owes_is_part_of_what_the_api_says(
    floor: Floor, store: Store, keep_away: Any, api_bases: list[str], operator: dict[str, str]
) -> None:
    match_id = await floor.open_match()
    await keep_away(match_id)
    winner, loser = wallets(2)
    await floor.fund([winner, loser], 100)
    bets = [arrival(match_id, loser, Side.LAY, 200, 100), arrival(match_id, winner, Side.BACK, 200, 100)]
    await floor.pay(bets)
    await floor.apply(BookCache(), bets)
    await floor.move(match_id, MatchState.CLOSED)
    await settled(floor, store, match_id, "HOME")
    assert await floor.spend([winner]) == {winner: 198}
    async with aiohttp.ClientSession(api_bases[0], headers=operator) as http:
        url, headers = f"/v1/matches/{match_id}/resettle", {"Idempotency-Key": "again"}
        answers = []
        for body in ({"result": "AWAY"}, {"result": "AWAY"}, {"result": "DRAW"}):
            async with http.post(url, json=body, headers=headers) as response:
                answers.append((response.status, await response.json()))
        assert answers[0] == (
            202,
            {
                "outcome": "ACCEPTED",
                "replayed": False,
                "match_id": str(match_id),
                "state": "SETTLING",
                "settlement_version": 2,
            },
        )
        assert answers[1] == (202, answers[0][1] | {"replayed": True})
        assert (answers[2][0], answers[2][1]["field"]) == (409, "result")
        for body in ({}, {"result": 7}, {"result": "AWAY", "corrects_version": 0}, {"result": "\x00"}):
            async with http.post(url, json=body, headers={"Idempotency-Key": uuid4().hex}) as response:
                assert response.status == 400, body
        assert await Settlement(store, match_id).run()
        async with http.get(f"/v1/wallets/{winner}/advances") as response:
            bet_id = str(bets[1].bet.bet_id)
            owed = {"match_id": str(match_id), "bet_id": bet_id, "owed_minor": 198}
            assert (response.status, await response.json()) == (200, {"owed_minor": 198, "bets": [owed]})
    # The commission comes back first, the house advances what is lacking, and only then the payout is taken back.
    entries = await floor.entries(match_id)
    kept = [(kind, amount, key.split(":")[1]) for user, kind, amount, key in entries if user == winner]
    assert kept[2:] == [("REFUND", 2, "COMMISSION_BACK"), ("CREDIT", 198, "ADVANCE"), ("DEBIT", -200, "TAKE_BACK")]
    assert (await floor.head(winner))[0] == 0
    assert (await floor.head(loser))[0] == 198
    # What the bet is paid again goes to the house first.
    assert (await ask(floor, match_id, "HOME"))[0] == "ACCEPTED"
    assert await Settlement(store, match_id).run()
    assert await advances(floor.api, winner) == []
    assert (await floor.head(winner))[0] == 0
    assert (await floor.head(loser))[0] == 0


async def test_a_resettle_is_refused_unless_the_match_stands_still_and_at_the_version_it_names(
    floor: Floor, store: Store, keep_away: Any
) -> None:
    match_id, users = await played(floor, keep_away, bets=20)
    assert (await ask(floor, uuid4(), "HOME"))[0] == "UNKNOWN_MATCH"
    assert await ask(floor, match_id, "HOME") == ("ILLEGAL_TRANSITION", "CLOSED", 0)
    await floor.move(match_id, MatchState.SETTLING, "HOME")
    assert await ask(floor, match_id, "AWAY") == ("ILLEGAL_TRANSITION", "SETTLING", 1)
    assert await ask(floor, match_id, "HOME") == ("REPLAYED", "SETTLING", 1)
    assert await Settlement(store, match_id).run()
    assert await ask(floor, match_id, "SNOW") == ("UNKNOWN_OUTCOME", "SETTLED", 1)
    assert await ask(floor, match_id, "AWAY", corrects=2) == ("ILLEGAL_TRANSITION", "SETTLED", 1)
    assert await ask(floor, match_id, "HOME") == ("REPLAYED", "SETTLED", 1)
    assert await ask(floor, match_id, "AWAY", corrects=1) == ("ACCEPTED", "SETTLING", 2)
    # The steps that led here are replays of what they were.
    row = await floor.api.fetchrow(floor.api.home_of(match_id), "transition_match", match_id, "SETTLING", "HOME")
    assert row is not None
    assert row["status"] == "REPLAYED"
    row = await floor.api.fetchrow(floor.api.home_of(match_id), "transition_match", match_id, "SETTLING", "AWAY")
    assert row is not None
    assert (row["status"], row["field"]) == ("REPLAYED_DIFFERENTLY", "result")
    assert await Settlement(store, match_id).run()
    await nobody_is_wrong(floor, match_id, users, "AWAY")


async def test_a_resettle_delivered_late_does_not_undo_the_one_that_followed_it(
    floor: Floor, store: Store, keep_away: Any
) -> None:
    match_id, users = await played(floor, keep_away, bets=20)
    await settled(floor, store, match_id, "HOME")
    assert await ask(floor, match_id, "HOME", key="nothing to do") == ("REPLAYED", "SETTLED", 1)
    assert (await ask(floor, match_id, "AWAY", key="first"))[0] == "ACCEPTED"
    assert (await ask(floor, match_id, "DRAW", key="too soon"))[0] == "ILLEGAL_TRANSITION"
    assert await Settlement(store, match_id).run()
    assert (await ask(floor, match_id, "DRAW", key="second"))[0] == "ACCEPTED"
    assert await Settlement(store, match_id).run()
    assert await ask(floor, match_id, "AWAY", key="first") == ("REPLAYED", "SETTLED", 2)
    assert await ask(floor, match_id, "HOME", key="nothing to do") == ("REPLAYED", "SETTLED", 1)
    assert (await ask(floor, match_id, "DRAW", key="too soon"))[0] == "ILLEGAL_TRANSITION"
    assert (await ask(floor, match_id, "HOME", key="first"))[0] == "REPLAYED_DIFFERENTLY"
    assert not await Settlement(store, match_id).run()
    await nobody_is_wrong(floor, match_id, users, "DRAW")


async def test_of_resettles_at_the_same_time_one_happens(floor: Floor, store: Store, keep_away: Any) -> None:
    match_id, users = await played(floor, keep_away, bets=20)
    await settled(floor, store, match_id, "HOME")
    answers = await asyncio.gather(*(ask(floor, match_id, result) for result in ("AWAY", "DRAW", None)))
    assert sorted(status for status, _, _ in answers) == ["ACCEPTED", "ILLEGAL_TRANSITION", "ILLEGAL_TRANSITION"]
    assert await Settlement(store, match_id).run()
    result = await floor.at(match_id).fetchval("SELECT result FROM matches WHERE match_id = $1", match_id)
    await nobody_is_wrong(floor, match_id, users, result)


async def test_a_match_that_was_voided_by_mistake_can_be_settled(floor: Floor, store: Store, keep_away: Any) -> None:
    match_id, users = await played(floor, keep_away, bets=40)
    await floor.move(match_id, MatchState.VOID)
    assert await ask(floor, match_id, "HOME") == ("ILLEGAL_TRANSITION", "VOID", 1)
    assert await Settlement(store, match_id).run()
    assert await ask(floor, match_id, "HOME") == ("ACCEPTED", "SETTLING", 2)
    assert await Settlement(store, match_id).run()
    await nobody_is_wrong(floor, match_id, users, "HOME")


async def test_a_bet_that_arrives_after_the_match_was_settled_twice_is_refunded_once(
    floor: Floor, store: Store, keep_away: Any
) -> None:
    match_id, users = await played(floor, keep_away, bets=20)
    late = [arrival(match_id, user, Side.LAY, 333, 7) for user in users[:3]]
    await floor.pay(late)
    for version, (bet, result) in enumerate(zip(late, ["HOME", "AWAY", "DRAW"], strict=True), 1):
        if version == 1:
            await floor.move(match_id, MatchState.SETTLING, result)
        else:
            assert (await ask(floor, match_id, result))[0] == "ACCEPTED"
        await floor.apply(BookCache(), [bet])
        assert await Settlement(store, match_id).run()
    await nobody_is_wrong(floor, match_id, users, "DRAW")
    refunds = [user for user, _, amount, key in await floor.entries(match_id) if amount == 17 and key.endswith(":0")]
    assert sorted(refunds) == sorted(users[:3])


async def test_the_commission_of_a_correction_is_that_of_the_first_settlement(
    floor: Floor, store: Store, keep_away: Any, service_config: ServiceConfig
) -> None:
    match_id, users = await played(floor, keep_away, bets=40)
    await settled(floor, store, match_id, "HOME")
    assert (await ask(floor, match_id, "AWAY"))[0] == "ACCEPTED"
    dearer = Store(msgspec.structs.replace(service_config, commission_bps=5_000), "ledger_settler")
    assert await Settlement(dearer, match_id).run()
    await dearer.close()
    await nobody_is_wrong(floor, match_id, users, "AWAY")


async def test_a_correction_killed_at_any_step_takes_back_once_and_advances_once(
    floor: Floor, store: Store, keep_away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    match_id, users = await played(floor, keep_away, bets=60)
    await settled(floor, store, match_id, "HOME")
    spent = await floor.spend(users)
    assert (await ask(floor, match_id, "AWAY"))[0] == "ACCEPTED"
    post, fetch = settler_module.post_entries, Settlement._fetch
    deaths = {"before post": 3, "after post": 3, "before mark_page": 3, "after mark_page": 3, "after finish": 1}

    def die_at(point: str) -> None:
        if deaths.get(point, 0) > 0:
            deaths[point] -= 1
            raise UnknownOutcome(f"killed {point}")

    async def posting(*args: Any) -> Any:
        die_at("before post")
        rows = await post(*args)
        die_at("after post")
        return rows

    async def fetching(self: Settlement, query: str, *args: object) -> Any:
        die_at(f"before {query}")
        rows = await fetch(self, query, *args)
        die_at(f"after {query}")
        return rows

    monkeypatch.setattr(settler_module, "post_entries", posting)
    monkeypatch.setattr(Settlement, "_fetch", fetching)
    for _ in range(30):
        try:
            if not await Settlement(store, match_id).run(page_orders=6):
                break
        except UnknownOutcome:
            continue
    assert set(deaths.values()) == {0}
    monkeypatch.undo()
    await nobody_is_wrong(floor, match_id, users, "AWAY", spent)


SETTLE_ONE = """
import asyncio, sys
from pathlib import Path
from uuid import UUID
from reference import settler
from reference.config import load_config
from reference.store import Store

async def main():
    settler.SETTLEMENT_CLASS = int(sys.argv[3])
    store = Store(load_config(Path(sys.argv[1])), "ledger_settler")
    await settler.Settlement(store, UUID(sys.argv[2])).run(page_orders=40)

asyncio.run(main())
"""


async def reached(connection: asyncpg.Connection, match_id: UUID) -> tuple[str, int]:
    """State of the newest settlement of a match, and how far it is."""
    query = """SELECT state, last_arrival FROM settlements
                WHERE match_id = $1 ORDER BY settlement_version DESC LIMIT 1"""
    return tuple(await connection.fetchrow(query, match_id))


async def test_a_settler_process_killed_again_and_again_pays_every_wallet_of_thousands_of_bets_right(
    floor: Floor, keep_away: Any, stack: Stack
) -> None:
    users = wallets(60)
    match_id, _ = await played(floor, keep_away, bets=3_000, seed=9, users=users)
    home, chance = floor.at(match_id), random.Random(9)
    command = [sys.executable, "-c", SETTLE_ONE, str(stack.config_path), str(match_id), str(TEST_CLASS)]
    root = str(Path(__file__).parents[2])
    spent = dict.fromkeys(users, 0)
    for version, result in ((1, "HOME"), (2, "AWAY")):
        if version == 1:
            await floor.move(match_id, MatchState.SETTLING, result)
        else:
            spent = await floor.spend(users[::2])
            assert (await ask(floor, match_id, result))[0] == "ACCEPTED"
        for death in range(1, DEATHS + 1):
            _, from_arrival = await reached(home, match_id)
            process = await asyncio.create_subprocess_exec(*command, env=os.environ | {"PYTHONPATH": root})
            # Somewhere past a page that it marked itself, and so in the middle of one of those that follow.
            target = max(from_arrival, 3_000 * (death - 1) // (DEATHS + 1)) + 1
            async with asyncio.timeout(60):
                while True:
                    if (await reached(home, match_id))[1] >= target:
                        break
                    await asyncio.sleep(0.002)
            await asyncio.sleep(chance.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL
            assert (await reached(home, match_id))[0] == "RUNNING", "killed before it was through"
        process = await asyncio.create_subprocess_exec(*command, env=os.environ | {"PYTHONPATH": root})
        async with asyncio.timeout(120):
            assert await process.wait() == 0
        assert await reached(home, match_id) == ("DONE", 3_000)
        await nobody_is_wrong(floor, match_id, users, result, spent)
    paid = await floor.entries(match_id)
    assert len({(user, key) for user, _, _, key in paid}) == len(paid)
