"""Each anomaly code against an honest run with one bug planted in it: the right code, and the right witness."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from honest_world import (
    ANN,
    BOB,
    CYD,
    DEE,
    EVE,
    FAY,
    M_AGAIN,
    M_OPEN,
    M_SETTLED,
    M_VOID,
    ORIGIN_UNIX_S,
    World,
    small_world,
    uuid_of,
)
from later_bugs import LATER_BUGS, plant, refuse_bet, sample, shard_of_ann_moves

from invariants.anomalies import CHECKS
from invariants.anomalies.common import MAX_WITNESSES
from invariants.verdict import Judgement, Verdict, judge

Bug = Callable[[World], None]


def fired(judgement: Judgement) -> set[str]:
    return {code for code, count in judgement.anomalies.items() if count}


def test_honest_run_is_silent() -> None:
    judgement = judge(small_world().run())
    assert judgement.witnesses == []
    assert judgement.reasons == []
    assert judgement.unchecked == {}
    assert judgement.unresolved == 0
    assert judgement.verdict is Verdict.PASS
    assert set(judgement.anomalies) == set(CHECKS)


def test_honest_run_with_two_snapshots_is_silent() -> None:
    world = small_world()
    world.snapshot_again()
    judgement = judge(world.run())
    assert (judgement.witnesses, judgement.reasons) == ([], [])


def ledger_row(world: World, key: str) -> dict[str, Any]:
    return world.entry(key)


def drop_entry(world: World, key: str) -> None:
    world.tables["ledger"].remove(world.entry(key))


def rebuilt(change: Bug) -> Bug:
    """Apply a bug of the ledger and let everything downstream follow it consistently."""

    def planted(world: World) -> None:
        change(world)
        world.rechain()
        world.derive()

    return planted


def of_type(world: World, kind: str, match_id: str | None = None) -> dict[str, Any]:
    return next(
        r
        for r in world.tables["ledger"]
        if r["type"] == kind
        and r["idempotent_key"].startswith("ledger:")
        and (match_id is None or r["match_id"] == match_id)
    )


def payload(event: dict[str, Any], **fields: Any) -> None:
    event["payload"] = json.dumps(json.loads(event["payload"]) | fields)


# -- A01 to A05


def acknowledged_withdrawal_is_lost(w: World) -> None:
    drop_entry(w, "out-1")


def accepted_cancel_has_no_row(w: World) -> None:
    w.tables["cancels"].clear()


def acknowledged_void_never_happened(w: World) -> None:
    attempt = w.invoke("void_match", match_id=M_OPEN, key="void-open")
    w.complete(attempt, "ok", status=202, outcome="ACCEPTED")


def withdrawal_is_posted_twice(w: World) -> None:
    index = w.tables["ledger"].index(w.entry("out-1"))
    w.tables["ledger"].insert(index + 1, dict(w.entry("out-1")))


def stake_is_posted_twice_under_a_new_key(w: World) -> None:
    index = w.tables["ledger"].index(w.entry("o-back"))
    w.tables["ledger"].insert(index + 1, w.entry("o-back") | {"idempotent_key": "o-back-again"})


def commission_is_taken_twice(w: World) -> None:
    row = next(r for r in w.tables["ledger"] if r["contra"] == "HOUSE")
    w.tables["ledger"].append(row | {"idempotent_key": row["idempotent_key"] + "0"})


def deposit_nobody_sent(w: World) -> None:
    w.post(DEE, "CREDIT", 50, "EXTERNAL", "from-nowhere")


def deposit_lands_on_another_wallet(w: World) -> None:
    w.entry("lost-answer").update(user_id=CYD, shard=CYD % 100)


def deposit_has_another_amount(w: World) -> None:
    w.entry("lost-answer")["amount"] = 334


def refund_of_a_bet_nobody_cancelled(w: World) -> None:
    order = next(o for o in w.tables["orders"] if o["match_id"] == M_OPEN and o["user_id"] == CYD)
    w.pay(order, "REFUND", 10, 0)


def settlement_nobody_asked_for(w: World) -> None:
    w.forget(op="void_match")
    attempt = w.invoke("settle_match", match_id=M_VOID, selection="HOME", key="settle-void")
    w.complete(attempt, "fail", status=422, outcome="ILLEGAL_TRANSITION")


def result_nobody_asked_for(w: World) -> None:
    next(r for r in w.history if r["record"] == "invoke" and r["op"] == "settle_match")["selection"] = "AWAY"


def refused_withdrawal_is_applied(w: World) -> None:
    w.tables["refusals"][:] = [row for row in w.tables["refusals"] if row["idempotent_key"] != "too-much"]
    w.forget(key="too-much")
    attempt = w.invoke("withdraw", user=CYD, amount=20, key="too-much")
    w.complete(attempt, "fail", status=422, outcome="INSUFFICIENT_FUNDS", replayed=False)
    w.post(CYD, "DEBIT", -20, "EXTERNAL", "too-much")


def rollback_left_no_tombstone(w: World) -> None:
    w.tables["refusals"][:] = [row for row in w.tables["refusals"] if row["idempotent_key"] != "taken-back"]


def rollback_refused_by_the_door_left_a_tombstone(w: World) -> None:
    for answer in w.answers_to("taken-back"):
        if answer["record"] == "ok":
            answer |= {"record": "fail", "status": 503, "outcome": None}


def rolled_back_bet_is_placed_all_the_same(w: World) -> None:
    w.post(CYD, "CREDIT", 5, "EXTERNAL", "taken-back")
    attempt = w.invoke("deposit", user=CYD, amount=5, key="taken-back")
    w.complete(attempt, "info")


def command_not_admitted_is_applied(w: World) -> None:
    w.post(CYD, "CREDIT", 5, "EXTERNAL", "not-admitted")


def replay_answers_another_seq(w: World) -> None:
    next(a for a in w.answers_to("out-1") if a.get("replayed"))["seq"] += 1


def replay_claims_to_be_the_original(w: World) -> None:
    next(a for a in w.answers_to("out-1") if a.get("replayed"))["replayed"] = False


def acknowledged_and_refused(w: World) -> None:
    attempt = w.invoke("withdraw", user=DEE, amount=5_000, key="out-1")
    w.complete(attempt, "fail", status=422, outcome="INSUFFICIENT_FUNDS", replayed=True)


def refused_for_two_reasons(w: World) -> None:
    attempt = w.invoke("withdraw", user=CYD, amount=10**9, key="too-much")
    w.complete(attempt, "fail", status=422, outcome="LIMIT_EXCEEDED", replayed=True)


def same_body_called_another(w: World) -> None:
    attempt = w.invoke("deposit", user=BOB, amount=100_000, key=f"seed-{BOB}", tag="seed")
    w.history[-1]["payload_hash"] = next(r for r in w.history if r.get("key") == f"seed-{BOB}")["payload_hash"]
    w.complete(attempt, "fail", status=409, outcome="REPLAYED_DIFFERENTLY")


def other_body_was_applied(w: World) -> None:
    # The key was refused for its second body, yet it is the second body that the ledger holds.
    w.other_body(ANN, 999, f"seed-{ANN}")
    w.entry(f"seed-{ANN}")["amount"] = 999


# -- A06 to A33


def withdrawal_beyond_the_funds(w: World) -> None:
    attempt = w.invoke("withdraw", user=DEE, amount=200_000, key="overdraft")
    w.answer(attempt, "ok", w.post(DEE, "DEBIT", -200_000, "EXTERNAL", "overdraft"))


def commission_beyond_the_funds(w: World) -> None:
    row = next(r for r in w.tables["ledger"] if r["contra"] == "HOUSE")
    row["amount"] -= 10**6


def balance_in_the_middle_is_off(w: World) -> None:
    shown = w.entry("back-1")["balance_snapshot"]
    w.entry("back-1")["balance_snapshot"] += 1
    for answer in w.history:
        if answer.get("balance") == shown:
            answer["balance"] += 1
    w.derive()


def seq_skips_one(w: World) -> None:
    for row in w.tables["ledger"]:
        if row["user_id"] == DEE and row["seq"] >= 2:
            row["seq"] += 1
    for bet in w.tables["bets"]:
        if bet["user_id"] == DEE:
            bet["seq"] += 1
    for key in ("out-1", "back-2", "lay-3"):
        for answer in w.answers_to(key):
            if answer.get("seq"):
                answer["seq"] += 1
    w.derive()


def projection_is_off_by_a_cent(w: World) -> None:
    w.tables["projection"][0]["balance"] += 1


def projection_is_missing(w: World) -> None:
    w.tables["projection"].pop()


def projection_is_ahead(w: World) -> None:
    w.tables["projection"][0]["seq"] += 50


def cached_value_is_wrong(w: World) -> None:
    w.tables["redis"][0]["balance"] -= 1


def stake_is_booked_to_another_match(w: World) -> None:
    extra = uuid_of(1003)
    w.create_match(extra)
    w.entry("o-back")["match_id"] = extra


def bet_without_stake(w: World) -> None:
    row = w.tables["bets"][-1]
    w.tables["bets"].append(row | {"bet_id": w.new_id(), "seq": 77})
    w.tables["orders"].append(
        w.order(row["bet_id"]) | {"bet_id": w.tables["bets"][-1]["bet_id"], "event_id": "x", "arrival": 99}
    )


def fill_books_one_leg(w: World) -> None:
    order = next(o for o in w.tables["orders"] if o["match_id"] == M_OPEN and o["side"] == "LAY" and o["matched_stake"])
    order["matched_stake"] -= 1
    order["state"] = "PART_MATCHED"


def fill_with_an_unknown_order(w: World) -> None:
    fill = next(f for f in w.tables["fills"] if f["match_id"] == M_OPEN)
    fill["back_user"] = DEE
    w.derive()


def later_command_gets_the_earlier_seq(w: World) -> None:
    w.deposit(DEE, 10, "first")
    w.deposit(DEE, 10, "second")
    first, second = w.entry("first"), w.entry("second")
    first["idempotent_key"], second["idempotent_key"] = "second", "first"
    w.rechain()
    w.derive()


def read_goes_back(w: World) -> None:
    w.read(DEE, source="ledger", client=5)
    w.t += 1.0
    w.read(DEE, client=5)
    w.history[-1].update(seq=1, balance=100_000, as_of=None)


def read_ignores_own_write(w: World) -> None:
    w.read(DEE, min_seq=2)
    w.history[-1].update(seq=1, balance=100_000, as_of=None)


def read_finds_no_wallet_though_the_session_wrote(w: World) -> None:
    attempt = w.invoke("balance", user=DEE, min_seq=2)
    w.complete(attempt, "fail", status=404)


def strong_read_is_behind(w: World) -> None:
    w.read(DEE, source="ledger", client=9)
    w.history[-1].update(seq=1, balance=100_000)


def read_shows_a_balance_that_never_was(w: World) -> None:
    w.read(DEE)
    w.history[-1]["balance"] += 1


def entry_has_no_event(w: World) -> None:
    gone = w.tables["outbox"].pop(0)
    w.tables["kafka"][:] = []
    for event in w.tables["outbox"]:
        w.send(event)
    assert gone["event_type"] == "EntryPosted"


def event_never_reached_kafka(w: World) -> None:
    kept, w.tables["kafka"] = w.tables["outbox"][1:], []
    for event in kept:
        w.send(event)


def order_is_stored_twice(w: World) -> None:
    order = next(o for o in w.tables["orders"] if o["match_id"] == M_OPEN and o["user_id"] == CYD)
    w.tables["orders"].append(order | {"arrival": 9})


def fill_is_stored_twice(w: World) -> None:
    fill = next(f for f in w.tables["fills"] if f["match_id"] == M_OPEN)
    w.tables["fills"].append(fill | {"fill_no": 9})
    for bet_id in (fill["back_bet_id"], fill["lay_bet_id"]):
        order = w.order(bet_id)
        order["matched_stake"] += fill["stake"]
        order["matched_liability"] += fill["liability"]
        order["winnings"] += fill["winnings"]
        order["stake"] += fill["stake"]
    w.derive()


def cancel_is_refunded_twice(w: World) -> None:
    row = next(r for r in w.tables["ledger"] if r["settlement_version"] == 0)
    w.tables["ledger"].append(row | {"idempotent_key": row["idempotent_key"] + "0"})


def events_change_places(w: World) -> None:
    mine = [e for e in w.tables["outbox"] if e["user_id"] == ANN and e["event_type"] == "EntryPosted"]
    w.tables["kafka"].clear()
    first, second = mine[0], mine[1]
    for event in w.tables["outbox"]:
        w.send(second if event is first else first if event is second else event)


def key_in_two_partitions(w: World) -> None:
    record = next(k for k in reversed(w.tables["kafka"]) if k["topic"] == "wallet.posted" and k["key"] == str(ANN))
    record["partition"], record["offset"] = 17, 0
    for topic, partition in {(k["topic"], k["partition"]) for k in w.tables["kafka"]}:
        mine = [k for k in w.tables["kafka"] if (k["topic"], k["partition"]) == (topic, partition)]
        for offset, item in enumerate(mine):
            item["offset"] = offset


def record_without_outbox_row(w: World) -> None:
    w.send(w.tables["outbox"][0] | {"event_id": "stranger", "seq": 99})


def event_of_an_entry_that_was_rolled_back(w: World) -> None:
    event = w.tables["outbox"][0] | {"event_id": "ghost", "seq": 99, "id": 999}
    payload(event, seq=99)
    w.tables["outbox"].append(event)
    w.send(event)


def two_events_for_one_entry(w: World) -> None:
    event = w.tables["outbox"][0] | {"event_id": "second", "id": 999}
    w.tables["outbox"].append(event)


def payload_has_another_amount(w: World) -> None:
    for rows in (w.tables["outbox"], w.tables["kafka"]):
        payload(rows[0], amount=1)


def record_is_not_its_event(w: World) -> None:
    payload(w.tables["kafka"][0], balance=1)


def record_under_another_key(w: World) -> None:
    w.tables["kafka"][0]["key"] = "12345"


def payload_has_words_for_an_amount(w: World) -> None:
    payload(w.tables["kafka"][0], balance="much")


def payload_is_no_json(w: World) -> None:
    w.tables["kafka"][0]["payload"] = "{"


def projection_stays_behind(w: World) -> None:
    row = w.tables["projection"][0]
    user, seq = row["user_id"], row["seq"]
    earlier = next(r for r in w.tables["ledger"] if r["user_id"] == user and r["seq"] == seq - 1)
    row.update(seq=seq - 1, balance=earlier["balance_snapshot"])


def bet_never_becomes_an_order(w: World) -> None:
    w.tables["orders"].remove(next(o for o in w.tables["orders"] if o["match_id"] == M_OPEN and o["user_id"] == CYD))


def payout_is_posted_twice(w: World) -> None:
    row = of_type(w, "PAYOUT")
    w.tables["ledger"].append(row | {"idempotent_key": row["idempotent_key"] + ":again"})


def payout_is_a_cent_too_much(w: World) -> None:
    of_type(w, "PAYOUT")["amount"] += 1


def winner_is_not_paid(w: World) -> None:
    w.tables["ledger"].remove(of_type(w, "PAYOUT"))


def loser_is_paid(w: World) -> None:
    order = w.order(w.entry("back-3")["bet_id"])
    w.settle_order(order | {"outcome": "HOME"}, "HOME")


def commission_rounds_down(w: World) -> None:
    row = next(r for r in w.tables["ledger"] if r["contra"] == "HOUSE")
    row["amount"] += 1


def reserve_rounds_down(w: World) -> None:
    row = w.entry("o-lay-2")
    row["amount"] += 1
    for table in ("bets", "orders"):
        next(r for r in w.tables[table] if r["bet_id"] == row["bet_id"])["reserve"] -= 1


def fill_rounds_the_liability_up_each_time(w: World) -> None:
    fill = next(f for f in w.tables["fills"] if f["match_id"] == M_OPEN)
    fill["liability"] += 1
    for bet_id in (fill["back_bet_id"], fill["lay_bet_id"]):
        w.order(bet_id)["matched_liability"] += 1
    w.derive()


def match_skips_a_state(w: World) -> None:
    steps = w.tables["transitions"]
    closed = next(r for r in steps if r["match_id"] == M_SETTLED and r["to_state"] == "CLOSED")
    steps.remove(closed)
    for row in steps:
        if row["match_id"] == M_SETTLED and row["to_state"] == "SETTLING":
            row |= {"from_state": "OPEN", "transition_no": 2}
        elif row["match_id"] == M_SETTLED and row["to_state"] == "SETTLED":
            row["transition_no"] = 3
    w.forget(op="close_match")


def fill_after_close(w: World) -> None:
    next(f for f in w.tables["fills"] if f["match_id"] == M_SETTLED)["filled_at"] += 1000


def bet_accepted_after_close(w: World) -> None:
    w.order(w.entry("back-1")["bet_id"])["arrived_at"] += 1000


def order_is_matched_without_fills(w: World) -> None:
    next(o for o in w.tables["orders"] if o["state"] == "PENDING")["state"] = "MATCHED"


def escrow_of_a_void_match_leaks(w: World) -> None:
    # Who bet on the void match twice over got only one stake back: bets, orders and refund are all one short.
    row = of_type(w, "REFUND", M_VOID)
    row["amount"] -= 1


def again(w: World, kind: str) -> dict[str, Any]:
    """The first entry of this kind that a correction of M_AGAIN posted."""
    return next(
        r
        for r in w.tables["ledger"]
        if r["match_id"] == M_AGAIN
        and r["idempotent_key"].startswith(f"ledger:{kind}:")
        and r["settlement_version"] > 1
    )


def correction_forgets(kind: str) -> Bug:
    def planted(w: World) -> None:
        w.tables["ledger"].remove(again(w, kind))

    return planted


def old_result_is_not_taken_back(w: World) -> None:
    gone = ("TAKE_BACK", "COMMISSION_BACK", "ADVANCE")
    w.tables["ledger"] = [
        r for r in w.tables["ledger"] if r["idempotent_key"].split(":")[1:2] not in [[g] for g in gone]
    ]


def advance_is_a_cent_too_much(w: World) -> None:
    again(w, "ADVANCE")["amount"] += 1


def house_advances_to_a_wallet_that_can_pay(w: World) -> None:
    # Everything is a cent dearer for the house and cheaper for a wallet that was not short.
    back = next(
        r
        for r in w.tables["ledger"]
        if r["match_id"] == M_AGAIN and r["user_id"] == FAY and r["idempotent_key"].startswith("ledger:TAKE_BACK:")
    )
    gift = back | {"type": "CREDIT", "contra": "HOUSE", "amount": 1}
    gift["idempotent_key"] = back["idempotent_key"].replace("TAKE_BACK", "ADVANCE")
    w.tables["ledger"].insert(w.tables["ledger"].index(back), gift)


def what_was_advanced_is_not_got_back(w: World) -> None:
    w.tables["ledger"].remove(
        next(
            r
            for r in w.tables["ledger"]
            if r["match_id"] == M_AGAIN
            and r["user_id"] == EVE
            and r["idempotent_key"].startswith("ledger:COMMISSION:")
            and r["settlement_version"] == 3
        )
    )


def correction_takes_a_wallet_below_zero(w: World) -> None:
    w.tables["ledger"].remove(again(w, "ADVANCE"))


def correction_takes_back_twice(w: World) -> None:
    row = again(w, "TAKE_BACK")
    w.tables["ledger"].append(row | {"idempotent_key": row["idempotent_key"] + "x"})


def correction_nobody_asked_for(w: World) -> None:
    w.resettle(M_AGAIN, "HOME", asked=False)


def resettle_delivered_again_corrects_again(w: World) -> None:
    w.resettle(M_AGAIN, "HOME")
    w.resettle(M_AGAIN, "AWAY", asked=False)  # the key that corrected it to AWAY as version 2


def correction_under_a_refused_resettle(w: World) -> None:
    w.resettle(M_AGAIN, "HOME", asked=False)
    attempt = w.invoke("resettle_match", match_id=M_AGAIN, selection="HOME", key="too-late")
    w.complete(attempt, "fail", status=422, outcome="ILLEGAL_TRANSITION")


def acknowledged_correction_never_happened(w: World) -> None:
    attempt = w.invoke("resettle_match", match_id=M_SETTLED, selection="AWAY", key="ignored")
    w.complete(attempt, "ok", status=202, outcome="ACCEPTED", replayed=False)


def correction_to_the_result_that_stands(w: World) -> None:
    w.resettle(M_AGAIN, "DRAW")


def correction_skips_a_version(w: World) -> None:
    for table in ("settlements", "transitions", "ledger", "matches"):
        for row in w.tables[table]:
            if row["match_id"] == M_AGAIN and row["settlement_version"] == 4:
                row["settlement_version"] = 5
                if table == "ledger":
                    row["idempotent_key"] = row["idempotent_key"][:-1] + "5"


def wallet_is_on_another_server(w: World) -> None:
    for table in ("ledger", "bets", "projection"):
        for row in w.tables[table]:
            if row["user_id"] == ANN:
                row["server"] = "pg1"
    w.derive()


def match_is_on_another_server(w: World) -> None:
    for table in ("matches", "orders", "fills"):
        for row in w.tables[table]:
            if row["match_id"] == M_OPEN:
                row["server"] = "pg1" if row["server"] == "pg0" else "pg0"


def entry_is_rewritten_between_snapshots(w: World) -> None:
    w.snapshot_again()
    assert w.second is not None
    w.second["ledger"][0]["created_at"] += 1


def entry_is_written_again_as_it_was(w: World) -> None:
    w.snapshot_again()
    assert w.second is not None
    w.second["ledger"][0]["xact"] = 10**6


def retried_cancel_is_done_again(w: World) -> None:
    w.snapshot_again()
    original = next(r for r in w.history if r["record"] == "invoke" and r.get("key") == "cancel-1")
    fields = {k: original[k] for k in ("user", "match_id", "bet_id", "key", "payload_hash")}
    for answer in w.answers_to("cancel-1"):
        answer |= {"record": "info", "status": 504, "outcome": None, "replayed": None}
    attempt = w.invoke("cancel", **fields, tag="final_retry")
    w.complete(attempt, "ok", status=202, outcome="ACCEPTED", replayed=False, bet_id=original["bet_id"])


def money_was_short_at_the_first_cut(w: World) -> None:
    w.snapshot_again()
    row = w.tables["ledger"][-1]
    row["balance_snapshot"] -= 1


def record_is_older_than_its_event(w: World) -> None:
    w.tables["kafka"][0]["timestamp"] -= 0.2


def route_of(w: World, server: str, shard: int) -> dict[str, object]:
    return next(r for r in w.tables["routes"] if (r["server"], r["shard"]) == (server, shard))


def shard_has_two_owners(w: World) -> None:
    route_of(w, "pg1", 50)["here"] = True
    route_of(w, "pg0", 50)["here"] = True


def shard_has_no_owner(w: World) -> None:
    route_of(w, "pg1", 50)["here"] = False


def wallet_stays_behind_when_its_shard_moves(w: World) -> None:
    shard = ANN % 100
    route_of(w, "pg0", shard).update(here=False, server_name="pg1", epoch=1)
    route_of(w, "pg1", shard).update(here=True, server_name="pg1", epoch=1)


BUGS: list[tuple[str, Bug, str | None, set[str]]] = [
    # code, bug, key of the witness (None: it has none), other codes that may fire with it
    ("A01", rebuilt(acknowledged_withdrawal_is_lost), "out-1", set()),
    ("A01", accepted_cancel_has_no_row, "cancel-1", set()),
    ("A01", acknowledged_void_never_happened, f"void_match:{M_OPEN}", set()),
    ("A01", rollback_left_no_tombstone, "taken-back", set()),
    ("A02", rebuilt(withdrawal_is_posted_twice), "out-1", {"A05"}),
    ("A02", rebuilt(stake_is_posted_twice_under_a_new_key), "o-back-again", {"A03", "A12", "A13", "A14"}),
    ("A02", rebuilt(commission_is_taken_twice), None, {"A03"}),
    ("A03", rebuilt(deposit_nobody_sent), "from-nowhere", set()),
    ("A03", rebuilt(deposit_lands_on_another_wallet), "lost-answer", set()),
    ("A03", rebuilt(deposit_has_another_amount), "lost-answer", set()),
    ("A03", rebuilt(refund_of_a_bet_nobody_cancelled), None, {"A12"}),
    ("A03", settlement_nobody_asked_for, None, set()),
    ("A03", result_nobody_asked_for, None, set()),
    ("A04", rebuilt(refused_withdrawal_is_applied), "too-much", set()),
    ("A04", rebuilt(command_not_admitted_is_applied), "not-admitted", set()),
    ("A04", rollback_refused_by_the_door_left_a_tombstone, "taken-back", {"V01"}),
    ("A04", rebuilt(rolled_back_bet_is_placed_all_the_same), "taken-back", set()),
    ("A05", replay_answers_another_seq, "out-1", set()),
    ("A05", replay_claims_to_be_the_original, "out-1", set()),
    ("A05", acknowledged_and_refused, "out-1", set()),
    ("A05", refused_for_two_reasons, "too-much", set()),
    ("A05", same_body_called_another, f"seed-{BOB}", set()),
    ("A05", rebuilt(other_body_was_applied), f"seed-{ANN}", {"A06", "A07"}),
    ("A06", rebuilt(withdrawal_beyond_the_funds), "overdraft", {"A07"}),
    ("A07", rebuilt(commission_beyond_the_funds), None, {"A06", "A28"}),
    ("A09", balance_in_the_middle_is_off, "back-1", set()),
    ("A10", seq_skips_one, "out-1", set()),
    ("A11", projection_is_off_by_a_cent, None, set()),
    ("A11", projection_is_missing, None, set()),
    ("A11", projection_is_ahead, None, set()),
    ("A11", cached_value_is_wrong, None, set()),
    ("A12", rebuilt(stake_is_booked_to_another_match), None, set()),
    ("A13", bet_without_stake, None, {"A12", "A26"}),
    ("A13", fill_books_one_leg, None, set()),
    ("A13", fill_with_an_unknown_order, None, set()),
    ("A14", later_command_gets_the_earlier_seq, "second", set()),
    ("A15", read_goes_back, None, {"A17"}),
    ("A16", read_ignores_own_write, None, set()),
    ("A16", read_finds_no_wallet_though_the_session_wrote, None, set()),
    ("A18", strong_read_is_behind, None, set()),
    ("A19", read_shows_a_balance_that_never_was, None, set()),
    ("A21", entry_has_no_event, f"seed-{ANN}", set()),
    ("A21", event_never_reached_kafka, None, set()),
    ("A22", order_is_stored_twice, None, set()),
    ("A22", fill_is_stored_twice, None, {"A03", "A13", "A25", "A28", "A29"}),
    ("A22", rebuilt(cancel_is_refunded_twice), None, {"A03", "A27", "A30"}),
    ("A23", events_change_places, None, set()),
    ("A23", key_in_two_partitions, None, set()),
    ("A24", record_without_outbox_row, None, {"A26", "A23"}),
    ("A24", event_of_an_entry_that_was_rolled_back, None, {"A26", "A23"}),
    ("A24", two_events_for_one_entry, None, {"A21"}),
    ("A25", payload_has_another_amount, None, set()),
    ("A25", record_is_not_its_event, None, set()),
    ("A25", record_under_another_key, None, set()),
    ("A25", payload_has_words_for_an_amount, None, set()),
    ("A25", payload_is_no_json, None, set()),
    ("A26", projection_stays_behind, None, set()),
    ("A26", bet_never_becomes_an_order, None, set()),
    ("A27", rebuilt(payout_is_posted_twice), None, {"A03", "A30"}),
    ("A28", rebuilt(payout_is_a_cent_too_much), None, {"A30"}),
    ("A28", rebuilt(winner_is_not_paid), None, {"A30"}),
    ("A28", rebuilt(loser_is_paid), None, {"A30"}),
    ("A28", rebuilt(commission_rounds_down), None, set()),
    ("A28", rebuilt(reserve_rounds_down), None, set()),
    ("A28", fill_rounds_the_liability_up_each_time, None, set()),
    ("A29", match_skips_a_state, None, set()),
    ("A29", fill_after_close, None, set()),
    ("A29", bet_accepted_after_close, None, set()),
    ("A29", order_is_matched_without_fills, None, set()),
    ("A30", rebuilt(escrow_of_a_void_match_leaks), None, {"A28"}),
    ("A01", rebuilt(acknowledged_correction_never_happened), None, set()),
    ("A02", rebuilt(resettle_delivered_again_corrects_again), None, set()),
    ("A02", rebuilt(correction_takes_back_twice), None, {"A03", "A30", "A07"}),
    ("A03", rebuilt(correction_nobody_asked_for), None, set()),
    ("A07", rebuilt(correction_takes_a_wallet_below_zero), None, {"A28"}),
    ("A28", rebuilt(old_result_is_not_taken_back), None, {"A12", "A30"}),
    ("A28", rebuilt(correction_forgets("COMMISSION_BACK")), None, {"A07"}),
    ("A28", rebuilt(advance_is_a_cent_too_much), None, set()),
    ("A28", rebuilt(house_advances_to_a_wallet_that_can_pay), None, set()),
    ("A28", rebuilt(what_was_advanced_is_not_got_back), None, set()),
    ("A29", rebuilt(correction_to_the_result_that_stands), None, set()),
    ("A29", rebuilt(correction_skips_a_version), None, set()),
    ("A04", rebuilt(correction_under_a_refused_resettle), None, set()),
    ("A31", wallet_is_on_another_server, None, set()),
    ("A31", match_is_on_another_server, None, set()),
    ("A31", shard_has_two_owners, None, set()),
    ("A31", shard_has_no_owner, None, set()),
    ("A31", wallet_stays_behind_when_its_shard_moves, None, set()),
    ("A33", entry_is_rewritten_between_snapshots, f"seed-{ANN}", set()),
    ("A33", entry_is_written_again_as_it_was, f"seed-{ANN}", set()),
    ("A05", retried_cancel_is_done_again, "cancel-1", set()),
    ("A12", money_was_short_at_the_first_cut, None, {"A33"}),
    ("A24", record_is_older_than_its_event, None, set()),
    *LATER_BUGS,
]


def name_of(bug: Bug) -> str:
    inner = bug.__closure__[0].cell_contents if bug.__name__ == "planted" and bug.__closure__ else bug
    return str(inner.__name__)


@pytest.mark.parametrize(
    ("code", "bug", "key", "may"), BUGS, ids=[f"{code}-{name_of(bug)}" for code, bug, _, _ in BUGS]
)
def test_planted_bug_is_named_by_its_code(code: str, bug: Bug, key: str | None, may: set[str]) -> None:
    world = small_world()
    bug(world)
    judgement = judge(world.run())
    assert judgement.unchecked == {}
    # All judges decide every planted bug, and alike.
    assert [reason for reason in judgement.reasons if reason.startswith("the judge")] == []
    assert code in fired(judgement)
    assert fired(judgement) <= {code} | may
    assert judgement.verdict is Verdict.INVARIANT_VIOLATED
    mine = [w for w in judgement.witnesses if w.code == code]
    assert 1 <= len(mine) <= MAX_WITNESSES
    assert all(w.text for w in mine)
    if key is not None:
        assert key in {w.key for w in mine}


def test_every_anomaly_code_has_a_planted_bug() -> None:
    assert {code for code in CHECKS if code.startswith("A")} == {code for code, *_ in BUGS}


def test_check_docstring_begins_with_its_code_and_name() -> None:
    for code, check in CHECKS.items():
        assert (check.find.__doc__ or "").startswith(f"{code} {check.name}: ")


# -- what must not raise an alarm


def test_raw_duplicate_in_kafka_is_counted_and_not_an_anomaly() -> None:
    world = small_world()
    for event in world.tables["outbox"][:5]:
        world.send(event)
    judgement = judge(world.run())
    assert fired(judgement) == set()
    assert judgement.raw_duplicates == 5
    assert judgement.sometimes["projection dropped a duplicate"] == 5


def test_cold_cache_is_no_anomaly() -> None:
    world = small_world()
    world.tables["redis"].clear()
    assert fired(judge(world.run())) == set()


def test_stale_read_that_says_so_is_no_anomaly() -> None:
    world = small_world()
    read_goes_back(world)
    world.history[-1]["stale"] = True
    judgement = judge(world.run())
    assert fired(judgement) == set()
    assert judgement.sometimes["a stale read was flagged"] == 1


def test_poisoned_event_in_the_dead_letters_is_not_skipped() -> None:
    world = small_world()
    bet_never_becomes_an_order(world)
    event = next(e for e in reversed(world.tables["outbox"]) if e["event_type"] == "BetCreated")
    world.send(event)
    world.tables["kafka"][-1] |= {"topic": "events.dlq", "partition": 0, "offset": 0}
    assert "A26" not in fired(judge(world.run()))


def test_witnesses_are_bounded_and_all_violations_counted() -> None:
    world = small_world()
    for number in range(50):
        world.post(DEE, "CREDIT", 1, "EXTERNAL", f"phantom-{number}")
    world.derive()
    judgement = judge(world.run())
    assert judgement.anomalies["A03"] == 50
    assert sum(w.code == "A03" for w in judgement.witnesses) == MAX_WITNESSES


# -- refusals, reads, heals and drifts that are right


def test_refusal_that_was_right_at_one_moment_of_its_window_is_no_anomaly() -> None:
    world = small_world()
    # A withdrawal of all is under way when another one is refused; a deposit makes up for it at once.
    held = world.balance(DEE)[1]
    emptied = world.invoke("withdraw", user=DEE, amount=held, key="all")
    row = world.post(DEE, "DEBIT", -held, "EXTERNAL", "all")
    world.refuse("withdraw", DEE, 10, "poor")
    world.deposit(DEE, held, "again")
    world.answer(emptied, "ok", row)
    world.derive()
    assert fired(judge(world.run())) == set()


def test_refusal_before_the_deposit_that_would_have_covered_it_is_no_anomaly() -> None:
    world = small_world()
    world.withdraw(DEE, world.balance(DEE)[1], "all")
    world.refuse("withdraw", DEE, 10, "poor")
    world.deposit(DEE, 1_000, "again")
    world.derive()
    assert fired(judge(world.run())) == set()


def test_refusals_with_true_reasons_are_no_anomalies() -> None:
    world = small_world()
    refuse_bet(world, "MATCH_CLOSED", "late", match_id=M_SETTLED)
    refuse_bet(world, "UNKNOWN_MATCH", "lost", match_id=uuid_of(4711))
    refuse_bet(world, "UNKNOWN_OUTCOME", "strange", selection="SNOW")
    refuse_bet(world, "LIMIT_EXCEEDED", "large", amount=10**9 + 1)
    refuse_bet(world, "INSUFFICIENT_FUNDS", "poor", side="LAY", odds=100_000, amount=1_000)
    for op, match_id in (("close_match", M_VOID), ("void_match", M_SETTLED), ("settle_match", M_OPEN)):
        attempt = world.invoke(op, match_id=match_id, selection="HOME", key=f"no-{op}")
        world.complete(attempt, "fail", status=422, outcome="ILLEGAL_TRANSITION")
    assert fired(judge(world.run())) == set()


def test_refused_close_while_the_match_is_voided_is_no_anomaly() -> None:
    world = small_world()
    closing = world.invoke("close_match", match_id=M_OPEN, key="too-slow")
    world.settle(M_OPEN, None)
    world.complete(closing, "fail", status=422, outcome="ILLEGAL_TRANSITION")
    world.derive()
    assert fired(judge(world.run())) == set()


def test_young_entry_may_be_missing_from_an_unflagged_read() -> None:
    world = small_world()
    world.deposit(DEE, 10, "just-now")
    world.derive()
    entry = next(r for r in world.tables["ledger"] if r["user_id"] == DEE and r["seq"] == world.balance(DEE)[0] - 1)
    world.t += 0.4
    world.read(DEE, client=6)
    as_of = world.history[-1]["as_of"] - 0.45
    world.history[-1].update(seq=entry["seq"], balance=entry["balance_snapshot"], as_of=as_of)
    assert fired(judge(world.run())) == set()


def test_moved_shard_is_no_anomaly() -> None:
    world = small_world()
    shard_of_ann_moves(world)
    judgement = judge(world.run())
    assert fired(judgement) == set()
    assert judgement.sometimes["a shard was moved to another server"] == 1


def test_events_that_a_server_wrote_before_it_gave_a_shard_up_stay_there_as_history() -> None:
    world = small_world()
    at = shard_of_ann_moves(world)
    for event in world.tables["outbox"]:
        if event["user_id"] == ANN:
            event.update(server="pg0", created_at=at - 0.1)
    assert fired(judge(world.run())) == set()


def test_recovery_in_time_is_no_anomaly_and_later_faults_begin_its_time_anew() -> None:
    world = small_world()
    sample(world, "outbox_unpublished", "pg0", {0.1: 0.0, 0.7: 4_000.0, 20.0: 900.0, 25.0: 5_000.0, 50.0: 0.0})
    assert fired(judge(world.run())) == set()
    world.series.clear()
    sample(world, "outbox_unpublished", "pg0", {0.1: 0.0, 0.7: 4_000.0, 40.0: 4_000.0, 50.0: 0.0})
    assert fired(judge(world.run())) == {"A34"}
    for kind, t in (("fault_requested", 20.0), ("fault_start", 20.1), ("fault_end", 22.0)):
        world.timeline.append({"t": t, "kind": kind, "node": "redis", "fault": "pause", "fault_id": 2})
    assert fired(judge(world.run())) == set()


def test_run_that_ends_before_its_time_to_recover_says_nothing() -> None:
    world = small_world()
    sample(world, "outbox_unpublished", "pg0", {0.1: 0.0, 0.7: 4_000.0, 20.0: 4_000.0})
    assert fired(judge(world.run())) == set()


def test_backlog_that_was_as_large_before_the_first_fault_is_no_anomaly() -> None:
    world = small_world()
    sample(world, "outbox_unpublished", "pg0", {0.1: 4_000.0, 0.7: 9_000.0, 20.0: 7_000.0, 40.0: 7_000.0})
    assert fired(judge(world.run())) == set()


def test_reported_drift_is_no_anomaly_and_its_wallet_is_nobody_elses_business() -> None:
    world = small_world()
    plant(world, reported=True)
    next(r for r in world.tables["projection"] if r["user_id"] == 21)["balance"] += 1
    assert fired(judge(world.run())) == set()


@pytest.mark.parametrize("gone", ["drift_measured", "drift_repaired"])
def test_drift_whose_effect_or_end_was_not_seen_proves_nothing(gone: str) -> None:
    world = small_world()
    plant(world, reported=True)
    world.timeline = [row for row in world.timeline if row["kind"] != gone]
    judgement = judge(world.run())
    assert fired(judgement) == {"V03"}
    assert judgement.verdict is Verdict.INVALID


def test_drift_repaired_before_its_time_proves_nothing() -> None:
    world = small_world()
    plant(world, reported=False)
    next(row for row in world.timeline if row["kind"] == "drift_repaired")["t"] = 20.0
    # A pass that could not see everything need not have seen it, nor one that began before.
    world.tables["reconciliations"][-1]["state"] = "INCOMPLETE"
    assert fired(judge(world.run())) == {"V03"}
    world.tables["reconciliations"][-1].update(state="CLEAN", started_at=ORIGIN_UNIX_S + 1.05)
    assert fired(judge(world.run())) == {"V03"}
