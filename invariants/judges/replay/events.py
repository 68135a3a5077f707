"""A11, A21–A26: each event followed from its entry through outbox and Kafka to what the consumers made of it."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Final

from invariants.judges.replay.case import Case, Finding, Row, fields_of, several
from invariants.judges.replay.plain import distinct
from reference.commands import BALANCE_TOPIC, TOPIC_OF

WALLET_EVENTS: Final = ("BetCreated", "EntryPosted")
"""Events of which every entry has exactly one."""


def a11_projection(case: Case) -> Iterator[Finding]:
    """A11: projection, cache or balance stream say another balance than the ledger at their own seq, or nothing."""
    told = [("projection", row) for row in case.table("projection")]
    told += [("redis", row) for row in case.table("redis")]
    told += [(BALANCE_TOPIC, row) for row in case.balance_updates]
    planted = {drift["user"] for drift in case.drifts}
    for source, row in told:
        if row["user_id"] in planted:
            continue  # The run itself made this one wrong; that is A35's.
        user, seq, balance = row["user_id"], row["seq"], row["balance"]
        entry = case.places.get((user, seq))
        right = entry.snapshot if entry is not None else 0 if seq == 0 else None
        if balance != right:
            text = f"{source} says user {user} has {balance} at seq {seq}; the ledger says {right}"
            yield Finding("A11", text, {"user": user, "seq": seq})
    projected = {row["user_id"] for row in case.table("projection")}
    for user, wallet in case.wallets.items():
        if user not in projected:
            text = f"user {user} has {len(wallet)} entries and no projection"
            yield Finding("A11", text, {"user": user, "seq": wallet[-1].seq})


def a21_event_lost(case: Case) -> Iterator[Finding]:
    """A21: an entry without an event in the outbox, or an outbox event that is not in Kafka."""
    told = {(e["user_id"], e["seq"]) for e in case.table("outbox") if e["event_type"] in WALLET_EVENTS}
    for entry in case.entries:
        if (entry.user, entry.seq) not in told:
            text = f"seq {entry.seq} of user {entry.user} (key {entry.key}) has no event in the outbox"
            yield Finding("A21", text, {"user": entry.user, "seq": entry.seq, "key": entry.key})
    sent = {record["event_id"] for record in case.table("kafka")}
    for event in case.table("outbox"):
        if event["event_id"] not in sent:
            text = f"event {event['event_id']} ({event['event_type']}) of {event['server']} is not in Kafka"
            place = {"event_id": event["event_id"], "user": event["user_id"], "seq": event["seq"]}
            yield Finding("A21", text, place)


def a22_effect_repeated(case: Case) -> Iterator[Finding]:
    """A22: two orders of one event or bet, two fills of one pair or number, two refunds of one cancel."""
    for event_id, orders in several(case.table("orders"), lambda o: o["event_id"]).items():
        yield Finding("A22", f"{len(orders)} orders come from event {event_id}", {"event_id": event_id})
    for bet_id, orders in several(case.table("orders"), lambda o: o["bet_id"]).items():
        # Orders of one bet that one event made have been named by the event.
        if len({order["event_id"] for order in orders}) > 1:
            yield Finding("A22", f"{len(orders)} orders are of bet {bet_id}", {"bet_id": bet_id})
    for pair, fills in several(case.table("fills"), lambda f: (f["back_bet_id"], f["lay_bet_id"])).items():
        place = {"back_bet_id": pair[0], "lay_bet_id": pair[1]}
        yield Finding("A22", f"bets {pair[0]} and {pair[1]} were filled {len(fills)} times", place)
    for (match_id, number), fills in several(case.table("fills"), lambda f: (f["match_id"], f["fill_no"])).items():
        place = {"match_id": match_id, "fill_no": number}
        yield Finding("A22", f"match {match_id} has {len(fills)} fills with the number {number}", place)
    refunds = [e for e in case.system_entries if e.type == "REFUND" and e.version == 0]
    for bet_id, entries in several(refunds, lambda e: e.bet_id).items():
        yield Finding("A22", f"the cancel of bet {bet_id} was refunded {len(entries)} times", {"bet_id": bet_id})


def _first_records(case: Case) -> list[Row]:
    """Return the first record of each event: a relay that died before it marked a batch sends it again."""
    return distinct(case.events, ("event_id",))


def a23_event_order(case: Case) -> Iterator[Finding]:
    """A23: within a partition the seqs of a wallet go back or repeat; or one key is in two partitions."""
    last: dict[tuple[str, int, int], int] = {}
    partitions: dict[tuple[str, str | None], set[int]] = defaultdict(set)
    for record in _first_records(case):
        partitions[record["topic"], record["key"]].add(record["partition"])
        if record["event_type"] not in WALLET_EVENTS or record["seq"] is None:
            continue
        lane = (record["topic"], record["partition"], record["user_id"])
        if lane in last and last[lane] >= record["seq"]:
            yield Finding(
                "A23",
                f"{record['topic']}[{record['partition']}] offset {record['offset']} has seq {record['seq']} of user"
                f" {record['user_id']} after its seq {last[lane]}",
                {name: record[name] for name in ("topic", "partition", "offset", "seq")} | {"user": record["user_id"]},
            )
        last[lane] = record["seq"]
    for (topic, key), where in partitions.items():
        if len(where) > 1:
            text = f"{topic} has key {key} in the partitions {sorted(where)}"
            yield Finding("A23", text, {"topic": topic, "record_key": key})


def a24_phantom_event(case: Case) -> Iterator[Finding]:
    """A24: a record that no outbox holds, an event of something that is not stored, or earlier than its commit."""
    yield from _too_early(case)
    known = {event["event_id"] for event in case.table("outbox")}
    for record in case.events:
        if record["event_id"] not in known:
            text = f"{record['topic']}[{record['partition']}] offset {record['offset']}: no outbox holds this event"
            place = {"event_id": record["event_id"], "user": record["user_id"], "seq": record["seq"]}
            yield Finding("A24", text, place)
    wallet = [event for event in case.table("outbox") if event["event_type"] in WALLET_EVENTS]
    for event in wallet:
        if (event["user_id"], event["seq"]) not in case.places:
            text = (
                f"event {event['event_id']} tells of seq {event['seq']} of user {event['user_id']}, which is not there"
            )
            place = {"event_id": event["event_id"], "user": event["user_id"], "seq": event["seq"]}
            yield Finding("A24", text, place)
    for (user, seq), events in several(wallet, lambda e: (e["user_id"], e["seq"])).items():
        if seq is not None:
            text = f"seq {seq} of user {user} has {len(events)} events in the outbox"
            yield Finding("A24", text, {"user": user, "seq": seq})
    fills = {(f["match_id"], f["fill_no"]) for f in case.table("fills")}
    cancelled = {o["bet_id"] for o in case.table("orders") if o["cancelled_stake"] > 0}
    settled = {(s["match_id"], s["settlement_version"]) for s in case.table("settlements")}
    stored: dict[str, Callable[[Row], bool]] = {
        "BetMatched": lambda p: (p.get("match_id"), p.get("fill_no")) in fills,
        "BetCancelled": lambda p: p.get("bet_id") in cancelled,
        "MatchSettled": lambda p: (p.get("match_id"), p.get("settlement_version")) in settled,
    }
    for event, payload in case.outbox:
        is_stored = stored.get(event["event_type"])
        if is_stored is not None and not is_stored(payload):
            text = f"event {event['event_id']} ({event['event_type']}) tells of something that is not stored"
            yield Finding("A24", text, {"event_id": event["event_id"]})


def _too_early(case: Case) -> Iterator[Finding]:
    """Find the records that Kafka holds from a moment before their outbox row was written."""
    written: dict[str, list[float]] = defaultdict(list)
    for event in case.table("outbox"):
        if event["created_at"] is not None:
            written[event["event_id"]].append(event["created_at"])
    for record in case.events:
        for created_at in written[record["event_id"]]:
            if record["timestamp"] is not None and record["timestamp"] < created_at - case.clock_slack_s:
                early_s = created_at - record["timestamp"]
                text = f"event {record['event_id']} is in Kafka since {early_s:.3f} s before its outbox row was written"
                yield Finding("A24", text, {"event_id": record["event_id"]})


def a25_event_differs(case: Case) -> Iterator[Finding]:
    """A25: the payload of an event is not its row; a record is not its event, or under another topic or key."""
    fills = {(f["match_id"], f["fill_no"]): f for f in reversed(case.table("fills"))}
    bets = {(b["user_id"], b["bet_id"]): b for b in reversed(case.table("bets"))}
    settled = {(s["match_id"], s["settlement_version"]): s for s in reversed(case.table("settlements"))}
    for event, payload in case.outbox:
        place = (payload.get("user_id"), payload.get("seq"))
        entry = case.places[place].row if place in case.places else None
        match event["event_type"]:
            case "EntryPosted":
                wrong = _differences(payload, entry, _ENTRY)
            case "BetCreated":
                bet = bets.get((payload.get("user_id"), payload.get("bet_id")))
                wrong = _differences(payload, entry, _STAKE) + _differences(payload, bet, _BET)
            case "BetMatched":
                wrong = _differences(payload, fills.get((payload.get("match_id"), payload.get("fill_no"))), _FILL)
            case "BetCancelled":
                wrong = _differences(payload, case.orders.get(payload.get("bet_id", "")), _CANCEL)
            case "MatchSettled":
                ruling = settled.get((payload.get("match_id"), payload.get("settlement_version")))
                wrong = _differences(payload, ruling, _RULING)
            case _:
                wrong = []
        if wrong:
            text = f"event {event['event_id']} ({event['event_type']}) differs from its row: {', '.join(wrong)}"
            yield Finding("A25", text, {"event_id": event["event_id"], "user": place[0], "seq": place[1]})
    yield from _differing_records(case)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_ENTRY: Final = _same("type", "amount", "contra", "match_id", "bet_id", "settlement_version") | {
    "balance": "balance_snapshot"
}
_STAKE: Final = _same("amount", "bet_id") | {"balance": "balance_snapshot"}
_BET: Final = _same("match_id", "outcome", "side", "odds", "stake", "reserve")
_FILL: Final = _same(
    "outcome", "back_bet_id", "back_user", "lay_bet_id", "lay_user", "odds", "stake", "liability", "winnings"
)
_CANCEL: Final = _same("match_id", "user_id", "cancelled_stake") | {
    "refund": "cancel_refund",
    "reason": "cancel_reason",
}
_RULING: Final = _same("kind", "result")
"""Field of a payload → column of the row it tells of."""


def _differences(payload: Row, row: Row | None, columns: dict[str, str]) -> list[str]:
    """Return the differing fields; an event of something that is not stored is A24."""
    if row is None:
        return []
    return [
        f"{name} is {payload.get(name)} and the row says {row[column]}"
        for name, column in columns.items()
        if payload.get(name) != row[column]
    ]


def _said(payload: str | None) -> Row:
    """Return the fields that say something: null is as good as absent to whoever reads a payload."""
    return {name: value for name, value in fields_of(payload).items() if value is not None}


def _differing_records(case: Case) -> Iterator[Finding]:
    kept: dict[Any, list[Row]] = defaultdict(list)
    for event in case.table("outbox"):
        kept[event["event_id"]].append(event)
    for record in case.events:
        for event in kept[record["event_id"]]:
            right = (TOPIC_OF.get(event["event_type"]), event["partition_key"])
            wrong = []
            if (record["topic"], record["key"]) != right:
                wrong.append(f"it belongs on {right[0]} under {right[1]}")
            # Equal text needs no parsing.
            same = record["payload"] == event["payload"]
            if not same and _said(record["payload"]) != _said(event["payload"]):
                wrong.append(f"it says {record['payload']} and the outbox {event['payload']}")
            if wrong:
                where = f"{record['topic']}[{record['partition']}] offset {record['offset']}"
                place = {"event_id": event["event_id"], "user": record["user_id"], "seq": record["seq"]}
                yield Finding("A25", f"{where}, event {event['event_id']}: {'; '.join(wrong)}", place)


def a26_skipped(case: Case) -> Iterator[Finding]:
    """A26: an event is in Kafka and not among the dead letters, and its consumer never applied it."""
    alive = [r for r in case.events if r["event_id"] not in case.buried and r["event_type"] in WALLET_EVENTS]
    newest: dict[int, int] = {}
    for record in alive:
        if record["seq"] is not None:
            newest[record["user_id"]] = max(record["seq"], newest.get(record["user_id"], record["seq"]))
    for row in case.table("projection"):
        if row["seq"] < newest.get(row["user_id"], row["seq"]):
            user, seq = row["user_id"], row["seq"]
            text = f"the projection of user {user} stands at seq {seq}; Kafka has its seq {newest[user]}"
            yield Finding("A26", text, {"user": user, "seq": seq})
    sent = {record["event_id"] for record in alive}
    for event in case.table("outbox"):
        payload = fields_of(event["payload"])
        if (
            event["event_type"] == "BetCreated"
            and event["event_id"] in sent
            and payload.get("bet_id") not in case.orders
        ):
            text = f"event {event['event_id']} of bet {payload.get('bet_id')} is in Kafka and never became an order"
            yield Finding("A26", text, {"event_id": event["event_id"], "user": payload.get("user_id")})
