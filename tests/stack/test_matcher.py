"""The matcher on a real server: every bet gets into its book once, and the book is what the rows say."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import exchange_floor
import pytest
from exchange_floor import Floor, arrival, crowd, redelivered, wallets

from reference import matcher as matcher_module
from reference.bus import Message, Poison
from reference.commands import MatchState, Side
from reference.config import ServiceConfig
from reference.errors import LedgerError, NotPosted, ServerUnavailable
from reference.exchange import cancel_bet
from reference.matcher import BookCache, Matcher, apply_orders
from reference.orderbook import Book, Order
from reference.store import Store


@pytest.fixture
async def working(floor: Floor) -> AsyncIterator[Matcher]:
    matcher = Matcher(floor.matcher)
    yield matcher
    matcher.close()


def message(payload: dict[str, Any], event_type: str = "BetCreated") -> Message:
    return exchange_floor.message("bet.created", event_type, payload)


def payload_of(match_id: object, **changes: object) -> dict[str, Any]:
    bet = {"bet_id": str(uuid4()), "user_id": 7, "seq": 1, "amount": -100, "balance": 0, "match_id": str(match_id)}
    return bet | {"outcome": "HOME", "side": "BACK", "odds": 250, "stake": 100, "reserve": 100} | changes


async def rows_replay(floor: Floor, match_id: Any) -> None:
    """Replaying the stored arrivals through an empty book gives exactly the stored progress and fills."""
    orders = await floor.orders(match_id)
    assert [row["arrival"] for row in orders] == list(range(1, len(orders) + 1))
    book, replay, fills = Book(match_id), {}, []
    for row in orders:
        order = Order(
            *(row[name] for name in ("bet_id", "match_id", "user_id", "outcome")),
            Side(row["side"]),
            *(row[name] for name in ("odds", "stake", "reserve", "arrival")),
        )
        replay[order.bet_id] = order
        fills += book.place(order)
    names = ("matched_stake", "matched_liability", "winnings", "liability_hundredths", "state")
    for row in orders:
        order = replay[row["bet_id"]]
        assert [row[name] for name in names] == [getattr(order, name) for name in names]
    stored = await floor.fills(match_id)
    names = ("fill_no", "odds", "stake", "liability", "winnings")
    assert [[row[name] for name in names] for row in stored] == [
        [getattr(fill, name) for name in names] for fill in fills
    ]
    assert [(row["back_bet_id"], row["lay_bet_id"]) for row in stored] == [
        (fill.back.bet_id, fill.lay.bet_id) for fill in fills
    ]
    head = await floor.at(match_id).fetchrow("SELECT arrivals, fills FROM matches WHERE match_id = $1", match_id)
    assert tuple(head) == (len(orders), len(fills))


async def test_a_trade_commits_with_its_fill_its_progress_and_its_event(floor: Floor) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    lay = arrival(match_id, 11, Side.LAY, 250, 100)
    back = arrival(match_id, 22, Side.BACK, 200, 40)
    assert (await floor.apply(books, [lay])).placed == 1
    result = await floor.apply(books, [back])
    assert (result.placed, result.fills) == (1, 1)
    first, second = await floor.orders(match_id)
    assert (first["state"], first["matched_stake"], first["matched_liability"]) == ("PART_MATCHED", 40, 60)
    assert (second["state"], second["winnings"], second["event_id"]) == ("MATCHED", 60, back.event_id)
    (event,) = await floor.events(match_id, "BetMatched")
    assert event["partition_key"] == str(match_id)
    assert json.loads(event["payload"]) == {
        "match_id": str(match_id),
        "fill_no": 1,
        "outcome": "HOME",
        "odds": 250,
        "stake": 40,
        "liability": 60,
        "winnings": 60,
        "back_bet_id": str(back.bet.bet_id),
        "back_user": 22,
        "lay_bet_id": str(lay.bet.bet_id),
        "lay_user": 11,
    }


async def test_a_redelivered_bet_changes_nothing(floor: Floor) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    bets = crowd(1, [match_id], wallets(5), 30)
    assert (await floor.apply(books, [*bets, *map(redelivered, bets)])).redelivered == 30
    before = (await floor.orders(match_id), await floor.fills(match_id))
    for cache in (books, BookCache()):
        result = await floor.apply(cache, [redelivered(bet) for bet in reversed(bets)])
        assert (result.placed, result.fills, result.redelivered) == (0, 0, 30)
    assert (await floor.orders(match_id), await floor.fills(match_id)) == before
    await rows_replay(floor, match_id)


async def test_the_rows_are_what_one_book_would_have_done_however_bets_were_batched(floor: Floor) -> None:
    match_ids = [await floor.open_match() for _ in range(3)]
    bets = crowd(2, match_ids, wallets(6), 150)
    # A cache of one book reloads most of the time, an ample one almost never.
    for number, cache in enumerate((BookCache(books_max=1), BookCache(), BookCache(orders_max=3))):
        mine = bets[number * 50 : number * 50 + 50]
        for start in range(0, 50, 7):
            await floor.apply(cache, mine[start : start + 7])
    for match_id in match_ids:
        await rows_replay(floor, match_id)


async def test_matchers_that_work_at_the_same_time_never_trade_an_order_twice(floor: Floor) -> None:
    match_ids = [await floor.open_match() for _ in range(2)]
    bets = crowd(3, match_ids, wallets(6), 240)

    async def one_matcher(mine: list[Any]) -> None:
        books = BookCache()
        for start in range(0, len(mine), 10):
            await floor.apply(books, mine[start : start + 10])

    await asyncio.gather(*(one_matcher(bets[number::3]) for number in range(3)))
    for match_id in match_ids:
        await rows_replay(floor, match_id)


async def test_a_bet_after_the_close_is_refunded_and_not_dropped(floor: Floor) -> None:
    closed, past = await floor.open_match(), await floor.open_match(closes_in_s=-1)
    await floor.move(closed, MatchState.CLOSED)
    for match_id in (closed, past):
        late = arrival(match_id, 11, Side.LAY, 333, 7)
        result = await floor.apply(BookCache(), [late])
        assert (result.late, result.placed) == (1, 0)
        (row,) = await floor.orders(match_id)
        assert (row["state"], row["cancel_reason"], row["cancelled_stake"]) == ("CANCELLED", "LATE", 7)
        (event,) = await floor.events(match_id, "BetCancelled")
        assert event["partition_key"] == "11"
        assert json.loads(event["payload"]) == {
            "match_id": str(match_id),
            "bet_id": str(late.bet.bet_id),
            "user_id": 11,
            "refund": 17,
            "cancelled_stake": 7,
            "reason": "LATE",
        }


@pytest.mark.parametrize("marked", [True, False])
async def test_a_change_behind_a_cached_book_counts_whether_it_left_a_mark_or_not(floor: Floor, marked: bool) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    lay, other = arrival(match_id, 11, Side.LAY, 300, 100), arrival(match_id, 33, Side.LAY, 250, 100)
    await floor.apply(books, [lay, other])
    home = floor.at(match_id)
    await home.execute("UPDATE matches SET book_version = book_version + 1 WHERE match_id = $1", match_id)
    await home.execute(
        """UPDATE orders SET state = 'CANCELLED', cancelled_stake = stake, cancel_refund = reserve,
                  cancel_reason = 'REQUESTED', book_version = CASE WHEN $2 THEN 2 ELSE book_version END
            WHERE bet_id = $1""",
        lay.bet.bet_id,
        marked,
    )
    assert (await floor.apply(books, [arrival(match_id, 22, Side.BACK, 200, 10)])).fills == 1
    assert [row["odds"] for row in await floor.fills(match_id)] == [250]


async def test_matchers_that_take_turns_see_each_others_every_change(floor: Floor) -> None:
    match_id = await floor.open_match()
    bets = crowd(4, [match_id], wallets(4), 80)
    caches = [BookCache(), BookCache(), BookCache()]
    # Uneven turns: some books are one version behind, some several, some with a change that another covers up.
    turns = [0, 1, 0, 0, 2, 1, 1, 1, 2, 0] * 8
    for turn, bet in zip(turns, bets, strict=True):
        await floor.apply(caches[turn], [bet])
    await rows_replay(floor, match_id)


async def test_a_book_that_was_cached_before_the_close_trades_no_more(floor: Floor) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    await floor.apply(books, [arrival(match_id, 11, Side.LAY)])
    await floor.move(match_id, MatchState.CLOSED)
    result = await floor.apply(books, [arrival(match_id, 22, Side.BACK)])
    assert (result.late, result.fills) == (1, 0)


async def test_a_cancel_that_overtook_its_bet_is_applied_when_the_bet_arrives(floor: Floor) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    await floor.apply(books, [arrival(match_id, 22, Side.LAY)])
    bet = arrival(match_id, 11, Side.BACK)
    row = await cancel_bet(floor.api, match_id, bet.bet.bet_id, 11, uuid4().hex)
    assert (row["status"], row["cancelled_stake"]) == ("ACCEPTED", 0)
    result = await floor.apply(books, [bet])
    assert (result.cancelled, result.fills) == (1, 0)
    stored = (await floor.orders(match_id))[1]
    assert (stored["cancel_reason"], stored["cancel_refund"]) == ("REQUESTED", 100)
    assert len(await floor.events(match_id, "BetCancelled")) == 1
    waiting = "SELECT waiting FROM cancels WHERE bet_id = $1"
    assert await floor.at(match_id).fetchval(waiting, bet.bet.bet_id) is False


async def test_a_stranger_cannot_cancel_a_bet_before_it_arrives(floor: Floor) -> None:
    match_id = await floor.open_match()
    bet = arrival(match_id, 11, Side.BACK)
    await cancel_bet(floor.api, match_id, bet.bet.bet_id, 12, uuid4().hex)
    assert (await floor.apply(BookCache(), [bet])).placed == 1


async def test_a_cancelled_order_leaves_a_cached_book(floor: Floor) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    lay = arrival(match_id, 11, Side.LAY, 250, 100)
    await floor.apply(books, [lay, arrival(match_id, 22, Side.BACK, 250, 30)])
    row = await cancel_bet(floor.api, match_id, lay.bet.bet_id, 11, uuid4().hex)
    assert (row["cancelled_stake"], row["refund"]) == (70, 105)
    assert (await floor.apply(books, [arrival(match_id, 22, Side.BACK, 250, 30)])).fills == 0


async def test_own_orders_are_passed_over_and_everybody_else_trades(floor: Floor) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    own, other = arrival(match_id, 11, Side.LAY, 300, 100), arrival(match_id, 22, Side.LAY, 250, 60)
    result = await floor.apply(books, [own, other, arrival(match_id, 11, Side.BACK, 200, 100)])
    assert result.fills == 1
    (fill,) = await floor.fills(match_id)
    assert (fill["lay_user"], fill["odds"], fill["stake"]) == (22, 250, 60)
    # Neither of the crossed orders is cancelled: the next wallet trades with the better one.
    assert (await floor.apply(books, [arrival(match_id, 33, Side.BACK, 200, 100)])).fills == 1
    assert (await floor.fills(match_id))[1]["odds"] == 300
    with pytest.raises(asyncpg.CheckViolationError, match="fills_two_wallets"):
        await floor.at(match_id).execute("UPDATE fills SET back_user = lay_user WHERE match_id = $1", match_id)


async def test_cancels_that_race_with_fills_lose_no_stake_and_cancel_nothing_twice(floor: Floor) -> None:
    match_id = await floor.open_match()
    bets = crowd(8, [match_id], wallets(6), 200)
    answers: dict[Any, list[Any]] = {}

    async def matching(mine: list[Any]) -> None:
        books = BookCache()
        for start in range(0, len(mine), 4):
            await floor.apply(books, mine[start : start + 4])

    async def cancelling(mine: list[Any]) -> None:
        for bet in mine:
            row = await cancel_bet(floor.api, match_id, bet.bet.bet_id, bet.bet.user_id, uuid4().hex)
            answers.setdefault(bet.bet.bet_id, []).append(row)

    # Some cancels overtake their bet, some meet it in the book, some come twice at once, some after it was filled.
    await asyncio.gather(
        matching(bets[::2]), matching(bets[1::2]), cancelling(bets[::3]), cancelling(bets[::3]), cancelling(bets[::-4])
    )
    filled: dict[Any, list[Any]] = {}
    for fill in await floor.fills(match_id):
        for bet_id in (fill["back_bet_id"], fill["lay_bet_id"]):
            filled.setdefault(bet_id, []).append(fill)
    told = {json.loads(event["payload"])["bet_id"] for event in await floor.events(match_id, "BetCancelled")}
    orders = await floor.orders(match_id)
    assert len(orders) == len(bets)
    for row in orders:
        mine = filled.get(row["bet_id"], [])
        assert row["matched_stake"] == sum(fill["stake"] for fill in mine)
        used = sum(fill["stake" if row["side"] == "BACK" else "liability"] for fill in mine)
        asked = [answer["status"] for answer in answers.get(row["bet_id"], [])]
        if row["cancelled_stake"]:
            assert row["matched_stake"] + row["cancelled_stake"] == row["stake"]
            assert row["cancel_refund"] == row["reserve"] - used
            assert "ACCEPTED" in asked
        else:
            assert row["cancel_refund"] == 0
            assert set(asked) <= {"NOTHING_TO_CANCEL"}
        assert (str(row["bet_id"]) in told) is (row["cancelled_stake"] > 0)
    assert any(row["cancelled_stake"] and row["matched_stake"] for row in orders)


@pytest.mark.parametrize("step", ["before", "after"])
async def test_a_batch_that_fails_leaves_neither_rows_nor_a_changed_book(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    match_id = await floor.open_match()
    books = BookCache()
    await floor.apply(books, [arrival(match_id, 11, Side.LAY, 250, 100)])
    bet = arrival(match_id, 22, Side.BACK, 250, 30)
    write = matcher_module._write

    async def failing(*args: Any) -> None:
        if step == "after":
            await write(*args)
        raise OSError("the connection broke")

    monkeypatch.setattr(matcher_module, "_write", failing)
    with pytest.raises(LedgerError):
        await floor.apply(books, [bet])
    monkeypatch.undo()
    assert len(await floor.orders(match_id)) == 1
    assert len(books) == 0
    assert (await floor.apply(books, [redelivered(bet)])).fills == 1
    await rows_replay(floor, match_id)


async def test_a_batch_that_waits_too_long_gives_up_and_loses_nothing(floor: Floor) -> None:
    match_id = await floor.open_match()
    bet = arrival(match_id, 22, Side.BACK)
    blocker = floor.at(match_id)
    async with blocker.transaction():
        await blocker.execute("SELECT FROM matches WHERE match_id = $1 FOR UPDATE", match_id)
        with pytest.raises(LedgerError):
            async with floor.matcher.connection(0) as connection:
                await apply_orders(connection, BookCache(), [bet], timeout_s=0.2)
    assert (await floor.apply(BookCache(), [bet])).placed == 1


async def test_an_unknown_match_is_poison_and_the_others_of_its_batch_are_placed(
    floor: Floor, working: Matcher
) -> None:
    match_id, nowhere = await floor.open_match(), uuid4()
    good = message(payload_of(match_id))
    for bad in (payload_of(nowhere), payload_of(match_id, outcome="SNOW")):
        with pytest.raises(Poison) as raised:
            await working.handle(0, [message(bad), good])
        assert raised.value.message.payload is bad
    await working.handle(0, [good])
    assert len(await floor.orders(match_id)) == 1


@pytest.mark.parametrize(
    "changes",
    [{"odds": 100}, {"odds": "many"}, {"stake": 0}, {"side": "MIDDLE"}, {"bet_id": "7"}, {"user_id": 2**63}],
)
async def test_a_message_that_makes_no_sense_is_poison(working: Matcher, changes: dict[str, object]) -> None:
    with pytest.raises(Poison):
        await working.handle(0, [message(payload_of(uuid4(), **changes))])


async def test_another_event_on_the_topic_is_poison(working: Matcher) -> None:
    with pytest.raises(Poison):
        await working.handle(0, [message(payload_of(uuid4()), "EntryPosted")])


async def test_with_its_connection_a_matcher_forgets_the_books_it_read(floor: Floor, working: Matcher) -> None:
    match_id = await floor.open_match()
    lane = floor.matcher.home_of(match_id)
    await working.handle(lane, [message(payload_of(match_id, user_id=11, side="LAY", reserve=150))])
    home = working._homes[lane]
    assert len(home.books) == 1
    killed = "SELECT pg_terminate_backend($1, 5000)"
    assert await floor.at(match_id).fetchval(killed, home.connection.get_server_pid())
    bet = message(payload_of(match_id, user_id=22))
    try:
        await working.handle(lane, [bet])
    except LedgerError:
        # Whether the driver noticed the broken connection before or while it was used is a matter of moments.
        await working.handle(lane, [bet])
    assert working._homes[lane].books is not home.books
    await rows_replay(floor, match_id)
    assert len(await floor.fills(match_id)) == 1


async def test_a_server_that_is_down_is_an_error_the_consumer_can_wait_out(service_config: ServiceConfig) -> None:
    import msgspec

    gone = [msgspec.structs.replace(server, port=1) for server in service_config.servers]
    store = Store(msgspec.structs.replace(service_config, servers=gone), "ledger_matcher")
    with pytest.raises(ServerUnavailable):
        await Matcher(store).handle(0, [message(payload_of(uuid4()))])


async def test_the_matcher_cannot_touch_wallets(floor: Floor) -> None:
    for table in ("wallet_ledger", "bets"):
        with pytest.raises(NotPosted, match="permission denied"):
            async with floor.matcher.connection(0) as connection:
                await connection.execute(f"INSERT INTO {table} DEFAULT VALUES")
