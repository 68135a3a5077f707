"""The settler on real servers: everybody is paid exactly once, whoever dies when."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from exchange_floor import OUTCOMES, PLENTY, Floor, arrival, crowd, message, wallets

from reference import settler as settler_module
from reference.bus import Message, Poison
from reference.commands import MatchState, Side
from reference.config import ServiceConfig
from reference.errors import LedgerError, ServerUnavailable, UnknownOutcome
from reference.exchange import cancel_bet
from reference.matcher import BookCache
from reference.settler import Settlement, SettlementTaken, Settler
from reference.store import Store

TEST_CLASS = 9_000
"""The class of the tests' own settlement locks."""


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


async def played(floor: Floor, keep_away: Any, bets: int = 60, seed: int = 5) -> tuple[UUID, list[Any]]:
    """A closed match with paid bets, some of them cancelled, some late."""
    match_id = await floor.open_match()
    await keep_away(match_id)
    users = wallets(6)
    await floor.fund(users)
    everything = crowd(seed, [match_id], users, bets)
    late = [arrival(match_id, users[0], Side.LAY, 333, 7), arrival(match_id, users[1], Side.BACK, 150, 9)]
    await floor.pay(everything + late)
    books = BookCache()
    for start in range(0, len(everything), 20):
        await floor.apply(books, everything[start : start + 20])
    for bet in everything[::9]:
        await cancel_bet(floor.api, match_id, bet.bet.bet_id, bet.bet.user_id, uuid4().hex)
    await floor.move(match_id, MatchState.CLOSED)
    await floor.apply(books, late)
    return match_id, users


async def finished(floor: Floor, match_id: UUID, state: str = "SETTLED") -> None:
    home = floor.at(match_id)
    match = await home.fetchrow("SELECT state, settlement_version FROM matches WHERE match_id = $1", match_id)
    assert tuple(match) == (state, 1)
    settlement = await home.fetchrow("SELECT state, finished_at FROM settlements WHERE match_id = $1", match_id)
    assert settlement["state"] == "DONE"
    assert settlement["finished_at"] is not None
    states = {row["state"] for row in await floor.orders(match_id)}
    assert states <= {state, "CANCELLED"}
    assert state in states
    assert await floor.escrow(match_id) == 0


async def transitions(floor: Floor, match_id: UUID) -> list[tuple[Any, ...]]:
    query = """SELECT from_state, to_state, settlement_version, result FROM match_transitions
                WHERE match_id = $1 ORDER BY transition_no"""
    return [tuple(row) for row in await floor.at(match_id).fetch(query, match_id)]


@pytest.mark.parametrize("result", OUTCOMES)
async def test_a_settled_match_paid_everybody_and_its_escrow_is_empty(
    floor: Floor, store: Store, keep_away: Any, result: str
) -> None:
    match_id, users = await played(floor, keep_away)
    await floor.move(match_id, MatchState.SETTLING, result)
    settlement = Settlement(store, match_id)
    assert await settlement.run(page_orders=17)
    assert settlement.bets == 62
    await finished(floor, match_id)
    assert await transitions(floor, match_id) == [
        (None, "OPEN", 0, None),
        ("OPEN", "CLOSED", 0, None),
        ("CLOSED", "SETTLING", 1, result),
        ("SETTLING", "SETTLED", 1, result),
    ]
    commission = [-amount for _, kind, amount, _ in await floor.entries(match_id) if kind == "DEBIT"]
    assert sum(commission) > 0
    held = [await floor.api.fetchrow(floor.api.server_of(user), "head", user % 100, user) for user in users]
    assert sum(row["balance"] for row in held) == len(users) * PLENTY - sum(commission)


async def test_a_void_match_gives_everything_back(floor: Floor, store: Store, keep_away: Any) -> None:
    match_id, users = await played(floor, keep_away)
    await floor.move(match_id, MatchState.VOID)
    assert await Settlement(store, match_id).run()
    await finished(floor, match_id, "VOID")
    assert (await transitions(floor, match_id))[-1][:2] == ("CLOSED", "VOID")
    for user in users:
        row = await floor.api.fetchrow(floor.api.server_of(user), "head", user % 100, user)
        assert row["balance"] == PLENTY


async def test_a_settlement_killed_at_any_step_pays_nobody_twice(
    floor: Floor, store: Store, keep_away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    match_id, _ = await played(floor, keep_away, bets=40)
    await floor.move(match_id, MatchState.SETTLING, "HOME")
    post, fetch = settler_module.post_entries, Settlement._fetch
    # How often to die at each point. The settlement is over after "finish", so nobody gets there twice.
    deaths = {"after post": 3, "before mark_page": 3, "after mark_page": 3, "after finish": 1}

    def die_at(point: str) -> None:
        if deaths.get(point, 0) > 0:
            deaths[point] -= 1
            raise UnknownOutcome(f"killed {point}")

    async def posting(*args: Any) -> Any:
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
    for _ in range(20):
        try:
            if not await Settlement(store, match_id).run(page_orders=6):
                break
        except UnknownOutcome:
            continue
    assert set(deaths.values()) == {0}
    monkeypatch.undo()
    await finished(floor, match_id)
    paid = await floor.entries(match_id)
    assert len({(user, key) for user, _, _, key in paid}) == len(paid)


async def test_of_settlers_that_want_the_same_match_one_gets_it(floor: Floor, store: Store, keep_away: Any) -> None:
    match_id, _ = await played(floor, keep_away)
    await floor.move(match_id, MatchState.SETTLING, "AWAY")
    outcomes = await asyncio.gather(*(Settlement(store, match_id).run(page_orders=5) for _ in range(3)))
    assert sorted(outcomes) == [False, False, True]
    await finished(floor, match_id)


async def test_settlers_that_both_believe_they_hold_the_match_still_pay_once(
    floor: Floor, store: Store, keep_away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    match_id, _ = await played(floor, keep_away)
    await floor.move(match_id, MatchState.SETTLING, "AWAY")
    fetch = Settlement._fetch

    async def fetching(self: Settlement, query: str, *args: object) -> Any:
        return [{"granted": True}] if query == "try_lock" else await fetch(self, query, *args)

    monkeypatch.setattr(Settlement, "_fetch", fetching)

    async def one() -> None:
        try:
            await Settlement(store, match_id).run(page_orders=5)
        except SettlementTaken:
            await one()

    await asyncio.gather(one(), one(), one())
    await finished(floor, match_id)


async def test_a_server_that_is_down_delays_its_payments_and_loses_none(
    floor: Floor, store: Store, keep_away: Any, service_config: ServiceConfig
) -> None:
    match_id, _ = await played(floor, keep_away)
    await floor.move(match_id, MatchState.SETTLING, "HOME")
    servers = list(service_config.servers)
    servers[-1] = msgspec.structs.replace(servers[-1], port=1)
    halved = Store(msgspec.structs.replace(service_config, servers=servers), "ledger_settler")
    with pytest.raises(ServerUnavailable):
        await Settlement(halved, match_id).run()
    await halved.close()
    assert await floor.escrow(match_id) > 0
    assert await Settlement(store, match_id).run()
    await finished(floor, match_id)


async def test_a_settlement_needs_no_event_to_be_found(floor: Floor, store: Store, keep_away: Any) -> None:
    match_ids = [(await played(floor, keep_away, bets=20, seed=seed))[0] for seed in range(3)]
    for match_id in match_ids:
        await floor.move(match_id, MatchState.SETTLING, "DRAW")
    stopping = asyncio.Event()
    running = asyncio.create_task(Settler(store).settle_all(stopping))
    query = "SELECT count(*) FROM settlements WHERE match_id = ANY ($1) AND state = 'DONE'"
    async with asyncio.timeout(20):
        while True:
            if await floor.owner[0].fetchval(query, match_ids) == len(match_ids):
                break
            await asyncio.sleep(0.05)
    stopping.set()
    async with asyncio.timeout(5):
        await running
    for match_id in match_ids:
        await finished(floor, match_id)


async def test_the_search_for_settlements_outlives_a_server_that_is_down(service_config: ServiceConfig) -> None:
    gone = [msgspec.structs.replace(server, port=1) for server in service_config.servers]
    stopping = asyncio.Event()
    store = Store(msgspec.structs.replace(service_config, servers=gone), "ledger_settler")
    running = asyncio.create_task(Settler(store).settle_all(stopping))
    done, _ = await asyncio.wait([running], timeout=0.5)
    assert not done
    stopping.set()
    async with asyncio.timeout(5):
        await running


def event(payload: dict[str, Any], event_type: str = "BetCancelled") -> Message:
    return message("bet.matched", event_type, payload)


async def test_a_cancelled_bet_is_refunded_once_however_often_its_event_comes(
    floor: Floor, store: Store, keep_away: Any
) -> None:
    match_id = await floor.open_match()
    await keep_away(match_id)
    (user,) = wallets(1)
    await floor.fund([user])
    bet = arrival(match_id, user, Side.BACK, 250, 70)
    await floor.pay([bet])
    refund = {"match_id": str(match_id), "bet_id": str(bet.bet.bet_id), "user_id": user, "refund": 70}
    settler = Settler(store)
    lane = settler.lane_of(event(refund))
    assert lane == store.server_of(user)
    await settler.handle(lane, [event(refund), event(refund)])
    await settler.handle(lane, [event(refund)])
    assert await floor.entries(match_id) == [(user, "REFUND", 70, f"ledger:REFUND:{bet.bet.bet_id}:0")]
    assert await floor.escrow(match_id) == 0


async def test_a_refund_of_nothing_is_no_entry(floor: Floor, store: Store) -> None:
    nothing = {"match_id": str(uuid4()), "bet_id": str(uuid4()), "user_id": 100, "refund": 0}
    settler = Settler(store)
    await settler.handle(settler.lane_of(event(nothing)), [event(nothing)])
    assert await floor.entries(UUID(nothing["match_id"])) == []


@pytest.mark.parametrize(
    ("payload", "event_type"),
    [({"user_id": 100}, "BetCancelled"), ({}, "MatchSettled"), ({"match_id": "x"}, "MatchSettled")],
)
async def test_an_event_that_makes_no_sense_is_poison(store: Store, payload: dict[str, Any], event_type: str) -> None:
    settler = Settler(store)
    bad = event(payload, event_type)
    with pytest.raises(Poison):
        await settler.handle(settler.lane_of(bad), [bad])


async def test_trades_are_left_alone(store: Store) -> None:
    settler = Settler(store)
    trade = event({"match_id": str(uuid4())}, "BetMatched")
    await settler.handle(settler.lane_of(trade), [trade])


async def test_a_contradictory_order_stops_its_settlement_and_pays_nothing_of_the_page(
    floor: Floor, store: Store, keep_away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    match_id, _ = await played(floor, keep_away, bets=10)
    await floor.move(match_id, MatchState.SETTLING, "HOME")
    entries_of = settler_module.entries_of

    def contradicting(*args: Any) -> Any:
        raise ValueError("used more than it reserved")

    monkeypatch.setattr(settler_module, "entries_of", contradicting)
    with pytest.raises(LedgerError, match="used more"):
        await Settlement(store, match_id).run()
    # Refunds of cancelled bets come by their own events, under version 0, whenever they come.
    assert all(key.endswith(":0") for _, _, _, key in await floor.entries(match_id))
    monkeypatch.setattr(settler_module, "entries_of", entries_of)
    assert await Settlement(store, match_id).run()
    await finished(floor, match_id)
