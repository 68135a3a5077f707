"""Bugs planted in the honest world for the codes that need windows, transactions, owners, heals and drifts."""

import json
from collections.abc import Callable
from typing import Any

from honest_world import ANN, BOB, CYD, DEE, FAY, M_OPEN, ORIGIN_UNIX_S, World

Bug = Callable[[World], None]
LOST = "0190aaaa-0000-7000-8000-000000000001"


def refuse_bet(w: World, outcome: str, key: str, *, match_id: str = M_OPEN, user: int = ANN, **fields: Any) -> None:
    bet = {"match_id": match_id, "selection": "HOME", "side": "BACK", "odds": 200, "amount": 10} | fields
    attempt = w.invoke("bet", user=user, key=key, **bet)
    w.refuse("bet", user, 0, key, outcome)
    gone = w.history.pop(), w.history.pop()
    assert {row["attempt"] for row in gone} == {w.attempts}
    w.attempts -= 1
    w.complete(attempt, "fail", status=422, outcome=outcome, replayed=False)


def refuse_step(w: World, op: str, match_id: str, outcome: str) -> None:
    w.complete(w.invoke(op, match_id=match_id, key=f"{op}-refused"), "fail", status=422, outcome=outcome)


def cancel_waits_for_a_bet_that_has_come(w: World) -> None:
    next(row for row in w.tables["cancels"] if row["idempotent_key"] == "cancel-1")["waiting"] = True


def a_fill_passes_over_who_came_first(w: World) -> None:
    """Let somebody else have rested at the odds of the first fill before the order that it took, and rest still."""
    fill = w.tables["fills"][0]
    taken = next(order for order in w.tables["orders"] if order["bet_id"] == fill["lay_bet_id"])
    nothing = {"matched_stake": 0, "matched_liability": 0, "winnings": 0, "stake": 10, "reserve": 16}
    who = {"bet_id": LOST, "user_id": FAY, "arrival": 0, "event_id": "created-first"}
    w.tables["orders"].append(taken | nothing | who)


# -- A08


def withdrawal_refused_though_the_funds_were_there(w: World) -> None:
    w.refuse("withdraw", CYD, 10, "rich")


def withdrawal_refused_before_the_funds_were_spent(w: World) -> None:
    w.refuse("withdraw", CYD, 10, "rich")
    w.withdraw(CYD, w.balance(CYD)[1], "all")
    w.derive()


def bet_refused_though_its_reserve_was_there(w: World) -> None:
    refuse_bet(w, "INSUFFICIENT_FUNDS", "rich", side="LAY", odds=300, amount=500)


def deposit_refused_for_lack_of_funds(w: World) -> None:
    w.refuse("deposit", CYD, 10, "odd")


def bet_refused_as_late_on_an_open_match(w: World) -> None:
    refuse_bet(w, "MATCH_CLOSED", "early")


def bet_refused_as_late_before_the_close(w: World) -> None:
    refuse_bet(w, "MATCH_CLOSED", "early")
    w.close(M_OPEN)


def bet_refused_on_a_match_that_is_there(w: World) -> None:
    refuse_bet(w, "UNKNOWN_MATCH", "known")


def bet_refused_on_an_outcome_that_is_there(w: World) -> None:
    refuse_bet(w, "UNKNOWN_OUTCOME", "known")


def small_bet_refused_as_beyond_the_limit(w: World) -> None:
    refuse_bet(w, "LIMIT_EXCEEDED", "small")


def bet_refused_as_rolled_back_by_nobody(w: World) -> None:
    refuse_bet(w, "ROLLED_BACK", "mine")


def cancel_found_nothing_before_another_did(w: World) -> None:
    bet_id = w.entry("o-lay-2")["bet_id"]
    attempt = w.invoke("cancel", user=CYD, match_id=M_OPEN, bet_id=bet_id, key="too-blind")
    w.tables["cancels"].append(
        {
            "server": w.order(bet_id)["server"],
            "user_id": CYD,
            "idempotent_key": "too-blind",
            "bet_id": bet_id,
            "match_id": M_OPEN,
            "outcome": "NOTHING_TO_CANCEL",
            "cancelled_stake": 0,
            "refund": 0,
            "waiting": False,
        }
    )
    w.complete(attempt, "fail", status=422, outcome="NOTHING_TO_CANCEL")
    w.cancel(CYD, bet_id, "sees-it")
    w.derive()


def void_refused_on_an_open_match(w: World) -> None:
    refuse_step(w, "void_match", M_OPEN, "ILLEGAL_TRANSITION")


def settle_refused_on_a_closed_match(w: World) -> None:
    w.close(M_OPEN)
    refuse_step(w, "settle_match", M_OPEN, "ILLEGAL_TRANSITION")


# -- A15 to A20


def own_read_goes_back_behind_a_payout(w: World) -> None:
    w.settle(M_OPEN, None)
    w.derive()
    seq, _ = w.balance(BOB)
    w.read(BOB, client=5)
    w.t += 1.0
    earlier = next(r for r in w.tables["ledger"] if r["user_id"] == BOB and r["seq"] == seq - 1)
    w.read(BOB, client=5)
    w.history[-1].update(seq=seq - 1, balance=earlier["balance_snapshot"])


def old_value_is_not_flagged(w: World) -> None:
    w.t += 1.0
    w.read(DEE, client=6)
    w.history[-1].update(seq=1, balance=100_000, as_of=None)


def answer_says_itself_that_it_is_old(w: World) -> None:
    w.read(DEE, client=6)
    w.history[-1]["as_of"] -= 1.0


def balance_misses_what_it_says_it_has(w: World) -> None:
    w.deposit(DEE, 10, "just-now")
    w.derive()
    w.read(DEE, client=6)
    w.t += 0.2
    w.history[-1]["as_of"] += 0.2
    w.history[-1]["t"] += 0.2
    entry = next(r for r in w.tables["ledger"] if r["user_id"] == DEE and r["seq"] == w.balance(DEE)[0] - 1)
    w.history[-1].update(seq=entry["seq"], balance=entry["balance_snapshot"])


def read_of_the_ledger_is_answered_by_the_cache(w: World) -> None:
    w.read(DEE, source="ledger")
    w.history[-1]["source"] = "redis"


def page_leaves_an_entry_out(w: World) -> None:
    w.page(ANN, 1, limit=5)
    w.history[-1]["page_rows"] -= 1


def one_transaction(w: World, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["xact"] = rows[0]["xact"]
        row["created_at"] = rows[0]["created_at"]
        row["server"] = rows[0]["server"]


def one_wallet_of_a_transaction_is_seen_without_the_other(w: World) -> None:
    # Both live on pg0, so one transaction can pay both.
    before = len(w.tables["ledger"])
    w.settle(M_OPEN, None)
    w.derive()
    mine = {r["user_id"]: r for r in w.tables["ledger"][before:] if r["user_id"] in (ANN, CYD)}
    one_transaction(w, list(mine.values()))
    w.read(ANN, client=5)
    earlier = next(r for r in w.tables["ledger"] if r["user_id"] == CYD and r["seq"] == mine[CYD]["seq"] - 1)
    w.read(CYD, source="ledger", client=6)
    w.history[-1].update(seq=earlier["seq"], balance=earlier["balance_snapshot"])


def two_clients_see_a_payout_come_and_go(w: World) -> None:
    w.settle(M_OPEN, None)
    w.derive()
    seq, _ = w.balance(BOB)
    w.read(BOB, client=5)
    earlier = next(r for r in w.tables["ledger"] if r["user_id"] == BOB and r["seq"] == seq - 1)
    w.read(BOB, source="ledger", client=6)
    w.history[-1].update(seq=seq - 1, balance=earlier["balance_snapshot"])


def payout_is_seen_without_its_commission(w: World) -> None:
    w.close(M_OPEN)
    before = len(w.tables["ledger"])
    w.settle(M_OPEN, "HOME")
    w.derive()
    mine = [r for r in w.tables["ledger"][before:] if r["user_id"] == ANN]
    assert len(mine) == 3
    one_transaction(w, mine)
    w.read(ANN, source="ledger", client=5)
    w.history[-1].update(seq=mine[1]["seq"], balance=mine[1]["balance_snapshot"])


# -- A32


def shard_of_ann_moves(w: World) -> float:
    """Move the shard of Ann from pg0 to pg1; return the Unix time at which pg0 gave it up."""
    shard, at = ANN % 100, ORIGIN_UNIX_S + w.tick()
    for row in w.tables["routes"]:
        if row["shard"] == shard:
            row.update(server_name="pg1", here=row["server"] == "pg1", epoch=1, changed_at=at)
    for table in ("ledger", "bets", "refusals", "projection"):
        for row in w.tables[table]:
            if row["user_id"] == ANN:
                row["server"] = "pg1"
    w.tick()
    w.derive()
    return at


def event_is_written_by_the_old_server(w: World) -> None:
    at = shard_of_ann_moves(w)
    event = next(e for e in reversed(w.tables["outbox"]) if e["user_id"] == ANN)
    event.update(server="pg0", created_at=at + 0.005)
    next(k for k in w.tables["kafka"] if k["event_id"] == event["event_id"])["timestamp"] = at + 0.006


def entry_is_written_by_the_old_server(w: World) -> None:
    at = shard_of_ann_moves(w)
    w.entry("o-back").update(server="pg0", created_at=at + 0.005)


def refusal_is_stored_by_the_old_server(w: World) -> None:
    w.refuse("withdraw", ANN, 10**9, "much")
    at = shard_of_ann_moves(w)
    w.tables["refusals"][-1].update(server="pg0", created_at=at + 0.005)


def primary(w: World, kind: str, t: float, member: str, term: int) -> None:
    w.timeline.append({"t": t, "kind": kind, "node": "pg0", "detail": json.dumps({"member": member, "term": term})})


def deposed_primary_commits(w: World) -> None:
    primary(w, "primary", 0.1, "pg0a", 1)
    primary(w, "primary", 0.9, "pg0b", 2)
    primary(w, "primary_write", 1.0, "pg0a", 1)


def two_primaries_of_one_term(w: World) -> None:
    primary(w, "primary", 0.1, "pg0a", 1)
    primary(w, "primary", 0.9, "pg0b", 1)


# -- A34, A35


def fault_comes_later(w: World) -> None:
    for row in w.timeline:
        if row.get("fault_id"):
            row["t"] += 20.0
    assert w.t < 20.0


def reads_fail_after_the_heal(w: World) -> None:
    fault_comes_later(w)
    w.t = 20.95
    for _ in range(70):
        w.complete(w.invoke("balance", user=ANN), "fail", status=503)
        w.t += 0.5


def sample(w: World, name: str, node: str, values: dict[float, float]) -> None:
    w.series += [{"t": t, "name": name, "node": node, "value": value} for t, value in values.items()]


def backlog_stays_after_the_heal(w: World) -> None:
    sample(w, "outbox_unpublished", "pg0", {0.1: 0.0, 0.7: 4_000.0, 5.0: 9_000.0, 20.0: 20_000.0, 40.0: 0.0})


def consumer_never_reports_again(w: World) -> None:
    sample(w, "kafka_consumer_lag", "matcher", {0.1: 0.0, 0.4: 3.0})
    sample(w, "kafka_consumer_lag", "settler", {0.1: 0.0, 5.0: 3.0, 40.0: 0.0})


def plant(w: World, *, reported: bool, code: str = "PROJECTION_DIFFERS", after_s: float = 5.0) -> None:
    """Plant a drift in a wallet of its own at one second, repair it after 40, and perhaps let it be reported."""
    user, node = 21, "pg0"
    w.deposit(user, 50, "drift", tag="drift")
    w.derive()
    plan = {"user": user, "code": "PROJECTION_DIFFERS", "within_s": 30.0, "requested_by": "schedule"}
    w.timeline += [
        {"t": t, "kind": kind, "node": node, "detail": json.dumps(plan)}
        for t, kind in ((1.0, "drift_planted"), (1.1, "drift_measured"), (41.0, "drift_repaired"))
    ]
    passed = {
        "server": node,
        "run_id": "r1",
        "kind": "INCREMENTAL",
        "requested_by": "schedule",
        "state": "CLEAN",
        "started_at": ORIGIN_UNIX_S + after_s,
        "finished_at": ORIGIN_UNIX_S + 1.0 + after_s,
    }
    finding = {"code": code, "user_id": user, "seq": 1, "expected": "balance 50", "found": "seq 1, balance 51"}
    w.tables["reconciliations"].append(passed | (finding if reported else {}))


def drift_is_never_reported(w: World) -> None:
    plant(w, reported=False)


def drift_is_reported_too_late(w: World) -> None:
    plant(w, reported=True, after_s=35.0)


def drift_is_reported_as_something_else(w: World) -> None:
    plant(w, reported=True, code="PROJECTION_AHEAD")


def drift_is_reported_only_when_asked(w: World) -> None:
    plant(w, reported=True)
    w.tables["reconciliations"][-1]["requested_by"] = "prove"


def pass_saw_everything_but_the_drift(w: World) -> None:
    plant(w, reported=False)
    next(row for row in w.timeline if row["kind"] == "drift_repaired")["t"] = 9.0


LATER_BUGS: list[tuple[str, Bug, str | None, set[str]]] = [
    ("A28", a_fill_passes_over_who_came_first, None, set()),
    ("A01", cancel_waits_for_a_bet_that_has_come, "cancel-1", set()),
    ("A08", withdrawal_refused_though_the_funds_were_there, "rich", set()),
    ("A08", withdrawal_refused_before_the_funds_were_spent, "rich", set()),
    ("A08", bet_refused_though_its_reserve_was_there, "rich", set()),
    ("A08", deposit_refused_for_lack_of_funds, "odd", set()),
    ("A08", bet_refused_as_late_on_an_open_match, "early", set()),
    ("A08", bet_refused_as_late_before_the_close, "early", set()),
    ("A08", bet_refused_on_a_match_that_is_there, "known", set()),
    ("A08", bet_refused_on_an_outcome_that_is_there, "known", set()),
    ("A08", small_bet_refused_as_beyond_the_limit, "small", set()),
    ("A08", bet_refused_as_rolled_back_by_nobody, "mine", set()),
    ("A08", cancel_found_nothing_before_another_did, "too-blind", set()),
    ("A08", void_refused_on_an_open_match, f"void_match:{M_OPEN}", set()),
    ("A08", settle_refused_on_a_closed_match, f"settle_match:{M_OPEN}", set()),
    ("A15", own_read_goes_back_behind_a_payout, None, set()),
    ("A17", old_value_is_not_flagged, None, set()),
    ("A17", answer_says_itself_that_it_is_old, None, set()),
    ("A18", balance_misses_what_it_says_it_has, None, set()),
    ("A18", read_of_the_ledger_is_answered_by_the_cache, None, set()),
    ("A19", page_leaves_an_entry_out, None, set()),
    ("A20", one_wallet_of_a_transaction_is_seen_without_the_other, None, set()),
    ("A20", two_clients_see_a_payout_come_and_go, None, set()),
    ("A20", payout_is_seen_without_its_commission, None, set()),
    ("A32", event_is_written_by_the_old_server, None, set()),
    ("A32", entry_is_written_by_the_old_server, "o-back", {"A31"}),
    ("A32", refusal_is_stored_by_the_old_server, "much", {"A31"}),
    ("A32", deposed_primary_commits, None, set()),
    ("A32", two_primaries_of_one_term, None, set()),
    ("A34", reads_fail_after_the_heal, None, set()),
    ("A34", backlog_stays_after_the_heal, None, set()),
    ("A34", consumer_never_reports_again, None, set()),
    ("A35", drift_is_never_reported, None, set()),
    ("A35", drift_is_reported_too_late, None, set()),
    ("A35", drift_is_reported_as_something_else, None, set()),
    ("A35", drift_is_reported_only_when_asked, None, set()),
    ("A35", pass_saw_everything_but_the_drift, None, set()),
]
"""code, bug, key of the witness (None: it has none), other codes that may fire with it"""
