"""Bulk, rollback, pages, statistics, book and balance as of a time, over HTTP on the real stack."""

import asyncio
import random
import time
import uuid

import aiohttp
import asyncpg
import pytest
from test_api import Client

from reference.routing import even_routing
from reference.uuid7 import uuid7


@pytest.fixture
async def client(api_bases, operator):
    async with aiohttp.ClientSession(headers=operator) as session:
        yield Client(session, api_bases)


def bet_of(user_id: int, match_id: str, key: str, **changes) -> dict:
    fields = {"match_id": match_id, "outcome": "HOME", "side": "BACK", "odds": 250, "stake_minor": 100}
    return {"op": "bet", "user_id": user_id, "key": key} | fields | changes


# -- bulk ------------------------------------------------------------------------------------------------


async def test_every_command_of_a_bulk_has_its_own_outcome_in_order(client) -> None:
    user_id, match_id = await client.funded(1_000), await client.match()
    commands = [
        bet_of(user_id, match_id, "b1"),
        {"op": "withdraw", "user_id": user_id, "key": "w1", "amount_minor": 10**6},
        {"op": "deposit", "user_id": user_id, "key": "d1", "amount_minor": 50},
        bet_of(user_id, str(uuid7()), "b2"),
        bet_of(user_id, match_id, "b3", odds=5),
        {"op": "teleport", "user_id": user_id, "key": "x"},
        {"op": "cancel", "user_id": user_id, "key": "c1", "bet_id": str(uuid7())},
        {"op": "deposit", "user_id": user_id, "key": "ledger:mine", "amount_minor": 50},
        bet_of(user_id, match_id, "b1", odds=260),
        bet_of(user_id, match_id, "b1"),
    ]
    status, answer, _ = await client.post("/v1/commands", {"commands": commands})
    results = answer["results"]
    assert status == 200
    assert [result["status"] for result in results] == [202, 422, 202, 422, 400, 400, 422, 400, 409, 202]
    assert [result.get("outcome") for result in results[:4]] == [
        "ACCEPTED",
        "INSUFFICIENT_FUNDS",
        "ACCEPTED",
        "UNKNOWN_MATCH",
    ]
    assert (results[0]["seq"], results[0]["balance_minor"]) == (2, 900)
    assert (results[2]["seq"], results[2]["balance_minor"]) == (3, 950)
    assert results[4]["field"] == "odds"
    assert results[6]["outcome"] == "UNKNOWN_BET"
    assert results[7]["field"] == "key"
    assert results[8]["field"] == "odds"
    assert results[9] == results[0] | {"replayed": True}


async def test_a_bulk_of_a_thousand_bets_is_accepted_whole_and_replays_whole(client) -> None:
    match_id, run = await client.match(), uuid.uuid4().hex
    users = [await client.funded(100_000) for _ in range(20)]
    commands = [bet_of(users[number % 20], match_id, f"{run}-{number}") for number in range(1000)]
    _, first, _ = await client.post("/v1/commands", {"commands": commands})
    assert {result["status"] for result in first["results"]} == {202}
    assert len({result["bet_id"] for result in first["results"]}) == 1000
    _, second, _ = await client.post("/v1/commands", {"commands": commands}, api=1)
    assert second["results"] == [result | {"replayed": True} for result in first["results"]]
    for user_id in users:
        _, view, _ = await client.get(f"/v1/wallets/{user_id}/balance?consistency=strong")
        assert (view["seq"], view["balance_minor"]) == (51, 100_000 - 50 * 100)


async def test_a_bulk_cancels_bets_and_one_beyond_its_limit_is_refused_whole(client) -> None:
    user_id, match_id = await client.funded(), await client.match()
    bets = [(await client.bet(user_id, match_id))[1]["bet_id"] for _ in range(5)]
    cancels = [{"op": "cancel", "user_id": user_id, "key": f"c{bet}", "bet_id": bet} for bet in bets]
    _, answer, _ = await client.post("/v1/commands", {"commands": cancels})
    assert [(result["status"], result["bet_id"]) for result in answer["results"]] == [(202, bet) for bet in bets]
    await client.until(
        f"/v1/wallets/{user_id}/balance?consistency=strong", lambda view: view["balance_minor"] == 10_000
    )
    one = {"op": "deposit", "user_id": user_id, "key": "d", "amount_minor": 1}
    assert (await client.post("/v1/commands", {"commands": []}))[0] == 400
    status, answer, _ = await client.post("/v1/commands", {"commands": [one] * 1001})
    assert (status, answer["field"]) == (400, "commands")


# -- rollback --------------------------------------------------------------------------------------------


async def test_a_rollback_of_an_unknown_bet_keeps_it_from_ever_being_placed(client) -> None:
    user_id, match_id, key = await client.funded(), await client.match(), uuid.uuid4().hex
    path = f"/v1/wallets/{user_id}/rollbacks"
    first = await client.post(path, {"key": key})
    assert first[:2] == (
        202,
        {
            "outcome": "ACCEPTED",
            "replayed": False,
            "user_id": user_id,
            "key": key,
            "bet_id": None,
            "cancelled_stake_minor": 0,
            "refund_minor": 0,
        },
    )
    for _ in range(2):
        status, answer, _ = await client.bet(user_id, match_id, key=key)
        assert (status, answer["outcome"]) == (422, "ROLLED_BACK")
    assert (await client.post(path, {"key": key}, api=1))[1] == first[1] | {"replayed": True}
    assert (await client.get(f"/v1/wallets/{user_id}/balance?consistency=strong"))[1]["balance_minor"] == 10_000


async def test_a_rollback_of_a_placed_bet_cancels_what_is_unmatched_once(client) -> None:
    user_id, other, match_id, key = await client.funded(), await client.funded(), await client.match(), "placed"
    _, placed, _ = await client.bet(user_id, match_id, key=key, stake_minor=100)
    await client.bet(other, match_id, "LAY", stake_minor=40)
    bet_path = f"/v1/wallets/{user_id}/bets/{placed['bet_id']}"
    await client.until(bet_path, lambda view: view["matched_stake_minor"] == 40)
    path = f"/v1/wallets/{user_id}/rollbacks"
    status, answer, _ = await client.post(path, {"key": key})
    assert (status, answer["bet_id"], answer["cancelled_stake_minor"], answer["refund_minor"]) == (
        202,
        placed["bet_id"],
        60,
        60,
    )
    assert (await client.post(path, {"key": key}))[1] == answer | {"replayed": True}
    await client.until(f"/v1/wallets/{user_id}/balance?consistency=strong", lambda view: view["balance_minor"] == 9_960)
    # The bet itself still answers as it did: it was accepted.
    assert (await client.bet(user_id, match_id, key=key, stake_minor=100))[1] == placed | {"replayed": True}


async def test_a_rollback_of_what_is_no_standing_bet_changes_nothing(client) -> None:
    user_id, match_id = await client.funded(50), await client.match()
    path = f"/v1/wallets/{user_id}/rollbacks"
    assert (await client.bet(user_id, match_id, key="refused"))[1]["outcome"] == "INSUFFICIENT_FUNDS"
    assert (await client.post(path, {"key": "refused"}))[0] == 202
    assert (await client.bet(user_id, match_id, key="refused"))[1]["outcome"] == "INSUFFICIENT_FUNDS"
    await client.post(f"/v1/wallets/{user_id}/deposits", {"amount_minor": 5}, key="paid-in")
    status, answer, _ = await client.post(path, {"key": "paid-in"})
    assert (status, answer["field"]) == (409, "op")
    assert (await client.post(path, {"key": "ledger:rollback:x"}))[1]["field"] == "key"


async def test_of_a_bet_and_its_rollback_that_arrive_together_exactly_one_wins(client, superuser_dsn) -> None:
    match_id = await client.match()
    users = [await client.funded(100_000) for _ in range(10)]
    pairs = [(users[number % 10], f"{uuid.uuid4().hex}") for number in range(300)]

    async def one(number: int, user_id: int, key: str):
        bet = client.bet(user_id, match_id, key=key, api=number % 2)
        back = client.post(f"/v1/wallets/{user_id}/rollbacks", {"key": key}, api=(number // 2) % 2)
        calls = [bet, back] if number % 3 else [back, bet]
        answers = await asyncio.gather(*calls)
        return answers if number % 3 else answers[::-1]

    answers = await asyncio.gather(*(one(number, *pair) for number, pair in enumerate(pairs)))
    outcomes = []
    for (bet_status, bet, _), (back_status, back, _) in answers:
        assert back_status == 202, back
        assert bet["outcome"] in ("ACCEPTED", "ROLLED_BACK"), bet
        assert (back["bet_id"] is None) == (bet["outcome"] == "ROLLED_BACK")
        assert bet_status == (422 if bet["outcome"] == "ROLLED_BACK" else 202)
        outcomes.append(bet["outcome"])
    assert set(outcomes) == {"ACCEPTED", "ROLLED_BACK"}, "the race was no race"
    routing = even_routing(len(superuser_dsn))
    for index, dsn in enumerate(superuser_dsn):
        connection = await asyncpg.connect(dsn)
        try:
            both = await connection.fetchval(
                "SELECT count(*) FROM wallet_ledger l JOIN refusals r USING (shard, user_id, idempotent_key)"
            )
            accepted = await connection.fetchval(
                "SELECT count(*) FROM wallet_ledger WHERE idempotent_key = ANY ($1)", [key for _, key in pairs]
            )
        finally:
            await connection.close()
        assert both == 0
        wanted = [o for o, (user_id, _) in zip(outcomes, pairs, strict=True) if routing[user_id % 100] == index]
        assert accepted == wanted.count("ACCEPTED")


# -- reads -----------------------------------------------------------------------------------------------


async def pages(client: Client, path: str, name: str) -> list[list[dict]]:
    found, cursor = [], ""
    while cursor is not None:
        status, page, _ = await client.get(path + (f"&cursor={cursor}" if cursor else ""))
        assert status == 200, page
        found.append(page[name])
        cursor = page["next_cursor"]
    return found


async def test_pages_of_transactions_and_bets_hold_still_while_new_ones_arrive(client) -> None:
    user_id, match_id = await client.funded(), await client.match()
    bets = [(await client.bet(user_id, match_id))[1]["bet_id"] for _ in range(7)]
    _, page, _ = await client.get(f"/v1/wallets/{user_id}/bets?limit=3")
    assert [bet["bet_id"] for bet in page["bets"]] == bets[:-4:-1]
    await client.bet(user_id, match_id)
    _, rest, _ = await client.get(f"/v1/wallets/{user_id}/bets?limit=50&cursor={page['next_cursor']}")
    assert [bet["bet_id"] for bet in rest["bets"]] == bets[3::-1]
    assert rest["next_cursor"] is None
    found = await pages(client, f"/v1/wallets/{user_id}/transactions?limit=4", "entries")
    assert [entry["seq"] for page in found for entry in page] == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert [len(page) for page in found] == [4, 4, 1]


async def test_the_list_of_bets_tells_how_far_each_one_got(client) -> None:
    user_id, other, match_id = await client.funded(), await client.funded(), await client.match()
    lone = (await client.bet(user_id, match_id, outcome="AWAY"))[1]["bet_id"]
    met = (await client.bet(user_id, match_id))[1]["bet_id"]
    await client.bet(other, match_id, "LAY")
    view = await client.until(
        f"/v1/wallets/{user_id}/bets", lambda view: "MATCHED" in [bet["state"] for bet in view["bets"]]
    )
    assert {bet["bet_id"]: bet["state"] for bet in view["bets"]} == {lone: "PENDING", met: "MATCHED"}


async def test_matches_are_listed_newest_first_over_all_servers(client) -> None:
    made = [await client.match() for _ in range(8)]
    await client.post(f"/v1/matches/{made[2]}/void")
    found = [match["match_id"] for match in (await client.get("/v1/matches?limit=8"))[1]["matches"]]
    assert found == made[::-1]
    listed = [match for page in await pages(client, "/v1/matches?limit=3&state=OPEN", "matches") for match in page]
    ids = [match["match_id"] for match in listed]
    assert len(ids) == len(set(ids))
    assert [match_id for match_id in ids if match_id in made] == [m for m in made[::-1] if m != made[2]]
    assert {match["state"] for match in listed} == {"OPEN"}


async def test_the_book_shows_the_best_levels_of_each_side(client) -> None:
    user_id, match_id = await client.funded(), await client.match()
    for side, odds, stake in [
        ("BACK", 300, 10),
        ("BACK", 290, 20),
        ("BACK", 290, 5),
        ("BACK", 310, 1),
        ("LAY", 200, 7),
        ("LAY", 210, 8),
    ]:
        assert (await client.bet(user_id, match_id, side, odds=odds, stake_minor=stake))[0] == 202
    path = f"/v1/matches/{match_id}/book?depth=2"
    book = await client.until(path, lambda view: len(view["outcomes"][0]["lay"]) == 2)
    home = book["outcomes"][0]
    assert home["outcome"] == "HOME"
    assert home["back"] == [{"odds": 290, "stake_minor": 25, "bets": 2}, {"odds": 300, "stake_minor": 10, "bets": 1}]
    assert home["lay"] == [{"odds": 210, "stake_minor": 8, "bets": 1}, {"odds": 200, "stake_minor": 7, "bets": 1}]
    assert book["outcomes"][1] == {"outcome": "DRAW", "back": [], "lay": []}
    assert (await client.get(f"/v1/matches/{uuid7()}/book"))[0] == 404


async def test_statistics_are_the_sums_of_the_entries_however_often_they_are_asked_for(client) -> None:
    user_id, match_id = await client.funded(1_000_000), await client.match()
    commands = [{"op": "withdraw", "user_id": user_id, "key": f"w{n}", "amount_minor": 3} for n in range(300)]
    commands += [bet_of(user_id, match_id, f"b{n}") for n in range(4)]
    await client.post("/v1/commands", {"commands": commands})
    path = f"/v1/wallets/{user_id}/stats"
    wanted = {
        "user_id": user_id,
        "seq": 305,
        "complete": True,
        "deposits": 1,
        "deposited_minor": 1_000_000,
        "withdrawals": 300,
        "withdrawn_minor": 900,
        "bets": 4,
        "staked_minor": 400,
        "payouts": 0,
        "won_minor": 0,
        "refunds": 0,
        "refunded_minor": 0,
        "commission_minor": 0,
        "open_bets": 4,
        "open_bets_of": 4,
    }
    for _ in range(3):
        assert (await client.get(path))[1] == wanted
    await client.post(f"/v1/wallets/{user_id}/deposits", {"amount_minor": 5})
    later = wanted | {"seq": 306, "deposits": 2, "deposited_minor": 1_000_005}
    assert (await client.get(path))[1] == later
    await client.post(f"/v1/matches/{match_id}/void")
    view = await client.until(path, lambda view: view["refunds"] == 4 and view["open_bets"] == 0)
    assert view["refunded_minor"] == 400
    assert (await client.get(f"/v1/wallets/{10**16}/stats"))[0] == 404


async def test_a_balance_as_of_a_time_is_what_it_was_then(client) -> None:
    user_id = uuid.uuid4().int % 10**15 + 1
    before_ms = int(time.time() * 1000) - 1
    moments = []
    for amount in (100, 20, 3):
        await client.post(f"/v1/wallets/{user_id}/deposits", {"amount_minor": amount})
        _, page, _ = await client.get(f"/v1/wallets/{user_id}/transactions?limit=1")
        moments.append(page["entries"][0]["created_at_ms"])
        await asyncio.sleep(0.01)
    path = f"/v1/wallets/{user_id}/balance?as_of="
    assert [(await client.get(path + str(at)))[1]["balance_minor"] for at in moments] == [100, 120, 123]
    assert (await client.get(path + str(moments[1] - 1)))[1]["balance_minor"] == 100
    before = (await client.get(path + str(before_ms)))[1]
    assert (before["balance_minor"], before["seq"]) == (0, 0)
    assert (await client.get(f"/v1/wallets/{user_id + 1}/balance?as_of={before_ms}"))[0] == 404
    assert (await client.get(path + str(int(time.time() * 1000) + 60_000)))[0] == 400
    assert (await client.get(path + "1&min_seq=1"))[0] == 400


@pytest.mark.parametrize("cursor", ["", "x", "%00", "WyJiZXRzIiwxXQ", "a" * 500, "WyJlbnRyaWVzIiwtMV0", "W1tbW1tb"])
@pytest.mark.parametrize("path", ["/v1/wallets/1/entries", "/v1/wallets/1/bets", "/v1/matches"])
async def test_a_cursor_of_something_else_is_refused(client, path, cursor) -> None:
    status, answer, _ = await client.get(f"{path}?cursor={cursor}")
    assert (status, answer["field"]) == (400, "cursor")


async def test_a_hot_key_repeated_at_once_on_both_processes_is_one_bet(client) -> None:
    user_id, match_id, key = await client.funded(), await client.match(), uuid.uuid4().hex
    calls = [client.bet(user_id, match_id, key=key, api=random.randrange(2)) for _ in range(60)]
    answers = await asyncio.gather(*calls)
    assert {status for status, _, _ in answers} == {202}
    assert len({answer["bet_id"] for _, answer, _ in answers}) == 1
    assert [answer["replayed"] for _, answer, _ in answers].count(False) == 1
