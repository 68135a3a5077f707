"""The incremental folds say of rows that come in pieces what the folds of the checker say of all of them at once."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from invariants.anomalies import CHECKS
from invariants.anomalies.common import Witness
from invariants.history import SCHEMA
from invariants.live import readmodel
from invariants.live.flow import Flow
from invariants.live.ledger import Ledger, Sums
from invariants.live.rows import Bet, Entry, Event, Record, Seen, Told
from invariants.run import Run, RunConfig, run_of_frames
from invariants.snapshot import TABLES
from invariants.timeline import SERIES_SCHEMA, TIMELINE_SCHEMA

SERVERS = ["pg0", "pg1"]
ROUTING = [shard * 2 // 100 for shard in range(100)]
HOLDERS = [SERVERS[holder] for holder in ROUTING]
MATCHES = ["m1", "m2"]
Row = dict[str, Any]
SOURCES = ("projection", "redis")
NUMBERS = ("user_id", "seq", "amount", "balance")


@dataclass
class History:
    """Rows of a small service, some of them wrong."""

    chance: random.Random
    ledger: list[Row] = field(default_factory=list)
    bets: list[Row] = field(default_factory=list)
    outbox: list[Row] = field(default_factory=list)
    kafka: list[Row] = field(default_factory=list)
    told: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in SOURCES})

    def run(self) -> Run:
        """The same rows as the checker gets them."""
        tables: dict[str, list[Row]] = {name: [] for name in TABLES}
        tables |= {"ledger": self.ledger, "bets": self.bets, "outbox": self.outbox, "kafka": self.kafka}
        tables["projection"] = [
            {"server": HOLDERS[row["user_id"] % 100], "shard": row["user_id"] % 100} | row
            for row in self.told["projection"]
        ]
        tables["redis"] = self.told["redis"]
        tables["routes"] = [
            {"server": name, "shard": shard, "server_name": holder, "epoch": 0, "here": name == holder}
            for name in SERVERS
            for shard, holder in enumerate(HOLDERS)
        ]
        return run_of_frames(
            config=RunConfig(servers=SERVERS, routing=ROUTING),
            history_rows=pl.DataFrame(schema=SCHEMA),
            timeline_rows=pl.DataFrame(schema=TIMELINE_SCHEMA),
            series_rows=pl.DataFrame(schema=SERIES_SCHEMA),
            first={name: pl.DataFrame(rows, schema=TABLES[name]) for name, rows in tables.items()},
        )

    def entries(self) -> list[Entry]:
        bets = {(row["user_id"], row["bet_id"]): row for row in self.bets}
        found = []
        for row in self.ledger:
            bet = None
            if row["type"] == "DEBIT" and row["contra"] == "ESCROW" and row["settlement_version"] is None:
                bet = bets.get((row["user_id"], row["bet_id"]))
            names = ("server", "shard", "user_id", "seq", "type", "amount", "contra", "match_id", "bet_id")
            values = [row[name] for name in (*names, "settlement_version", "balance_snapshot", "idempotent_key")]
            terms = None if bet is None else Bet(**{name: bet[name] for name in Bet._fields})
            found.append(Entry._make((*values, hash(json.dumps(row, sort_keys=True)), terms)))
        return found

    def events(self) -> list[Event]:
        return [
            Event(row["server"], row["id"], row["event_id"], row["event_type"], row["partition_key"], row["payload"], 1)
            for row in self.outbox
        ]

    def records(self) -> list[Record]:
        names = ("topic", "partition", "offset", "event_id", "key", "payload")
        return [Record._make(row[name] for name in names) for row in self.kafka]


def drawn(seed: int, length: int) -> History:
    """An honest history of a few wallets."""
    chance = random.Random(seed)
    world = History(chance)
    heads: dict[int, tuple[int, int]] = {}
    placed: list[Row] = []
    offsets: dict[tuple[str, int], int] = {}
    for number in range(length):
        user = chance.choice((1, 7, 55, 107, 2**62))
        seq, balance = heads.get(user, (0, 0))
        row: Row = {
            "server": HOLDERS[user % 100],
            "shard": user % 100,
            "user_id": user,
            "seq": seq + 1,
            "type": "CREDIT",
            "amount": chance.randrange(1, 500),
            "contra": "EXTERNAL",
            "match_id": None,
            "bet_id": None,
            "settlement_version": None,
            "idempotent_key": f"key {number}",
            "created_at": float(number),
        }
        event_type = "EntryPosted"
        kind = chance.choice(("deposit", "deposit", "bet", "bet", "pay", "withdraw"))
        mine = [bet for bet in placed if bet["user_id"] == user]
        if kind == "withdraw" and balance > 5:
            row |= {"type": "DEBIT", "amount": -chance.randrange(1, 5)}
        elif kind == "bet" and balance > 10:
            bet = {
                "server": row["server"],
                "shard": row["shard"],
                "user_id": user,
                "bet_id": f"bet{number}",
                "seq": seq + 1,
                "match_id": chance.choice(MATCHES),
                "outcome": "HOME",
                "side": "BACK",
                "odds": 200,
                "stake": 10,
                "reserve": 10,
                "placed_at": float(number),
            }
            placed.append(bet)
            world.bets.append(bet)
            row |= {"type": "DEBIT", "amount": -10, "contra": "ESCROW"}
            row |= {name: bet[name] for name in ("match_id", "bet_id")}
            event_type = "BetCreated"
        elif kind == "pay" and mine:
            bet = mine.pop()
            placed.remove(bet)
            what = chance.choice(("PAYOUT", "REFUND"))
            version = chance.choice((0, 1))
            row |= {
                "type": what,
                "amount": 10,
                "contra": "ESCROW",
                "match_id": bet["match_id"],
                "bet_id": bet["bet_id"],
                "settlement_version": version,
                "idempotent_key": f"ledger:{what}:{bet['bet_id']}:{version}",
            }
        row["balance_snapshot"] = balance + row["amount"]
        heads[user] = (seq + 1, row["balance_snapshot"])
        world.ledger.append(row)
        _announce(world, row, event_type, offsets)
        for name in SOURCES:
            if chance.random() < 0.3:
                world.told[name].append({"user_id": user, "seq": seq + 1, "balance": row["balance_snapshot"]})
    return world


def _announce(world: History, row: Row, event_type: str, offsets: dict[tuple[str, int], int]) -> None:
    payload = {
        "user_id": row["user_id"],
        "seq": row["seq"],
        "amount": row["amount"],
        "balance": row["balance_snapshot"],
    }
    payload |= {"bet_id": row["bet_id"], "match_id": row["match_id"]}
    if event_type == "BetCreated":
        payload |= {name: world.bets[-1][name] for name in ("outcome", "side", "odds", "stake", "reserve")}
    else:
        payload |= {name: row[name] for name in ("type", "contra", "settlement_version")}
    number = len(world.outbox) + 1
    key = str(row["user_id"])
    event = {
        "server": row["server"],
        "id": number,
        "event_id": f"event{number}",
        "event_type": event_type,
        "partition_key": key,
        "payload": json.dumps(payload),
        **{name: payload[name] for name in NUMBERS},
        "published_to_kafka": True,
    }
    world.outbox.append(event)
    topic, partition = {"BetCreated": "bet.created"}.get(event_type, "wallet.posted"), row["user_id"] % 3
    for _ in range(2 if world.chance.random() < 0.1 else 1):  # Now and then a relay sends again what it had sent.
        offset = offsets[(topic, partition)] = offsets.get((topic, partition), -1) + 1
        world.kafka.append(
            {"topic": topic, "partition": partition, "offset": offset, "key": key}
            | {
                name: event[name]
                for name in ("event_id", "event_type", "payload", "user_id", "seq", "amount", "balance")
            }
        )


def _repeat_key(world: History) -> None:
    users = [row for row in world.ledger if not row["idempotent_key"].startswith("ledger:")]
    if len(users) > 1:
        first, second = world.chance.sample(users, 2)
        second |= {"idempotent_key": first["idempotent_key"]}


def _pay_again(world: History) -> None:
    paid = [row for row in world.ledger if row["settlement_version"] is not None]
    if paid:
        row = world.chance.choice(paid)
        newest = max((other for other in world.ledger if other["user_id"] == row["user_id"]), key=lambda r: r["seq"])
        world.ledger.append(
            row
            | {"seq": newest["seq"] + 1, "balance_snapshot": newest["balance_snapshot"] + row["amount"]}
            | {"idempotent_key": row["idempotent_key"] + "x"}
        )


def _charge_again(world: History) -> None:
    stakes = [row for row in world.ledger if row["type"] == "DEBIT" and row["contra"] == "ESCROW"]
    if len(stakes) > 1:
        first, second = world.chance.sample(stakes, 2)
        second["bet_id"] = first["bet_id"]


def _shift(table: str, column: str) -> Callable[[History], None]:
    def change(world: History) -> None:
        rows = getattr(world, table)
        if rows:
            row = world.chance.choice(rows)
            row[column] += world.chance.choice((-1, 1, 400, -900))

    return change


def _drop(table: str) -> Callable[[History], None]:
    def change(world: History) -> None:
        rows = getattr(world, table)
        if rows:
            rows.remove(world.chance.choice(rows))

    return change


def _payload(table: str) -> Callable[[History], None]:
    def change(world: History) -> None:
        rows = getattr(world, table)
        if rows:
            row = world.chance.choice(rows)
            payload = json.loads(row["payload"])
            name = world.chance.choice([name for name in payload if name not in ("user_id", "seq")])
            number = name == "settlement_version" or isinstance(payload[name], int)
            payload[name] = (payload[name] or 0) + 1 if number else "other"
            row["payload"] = json.dumps(payload)

    return change


def _elsewhere(world: History) -> None:
    row = world.chance.choice(world.ledger)
    row["server"] = "pg1" if row["server"] == "pg0" else "pg0"


def _second_seq(world: History) -> None:
    row = dict(world.chance.choice(world.ledger))
    world.ledger.append(row | {"idempotent_key": f"again {len(world.ledger)}"})


def _second_event(world: History) -> None:
    event = dict(world.chance.choice(world.outbox))
    world.outbox.append(event | {"id": len(world.outbox) + 1, "event_id": f"second{len(world.outbox)}"})


def _wrong_place(world: History) -> None:
    if world.kafka:
        record = world.chance.choice(world.kafka)
        record |= world.chance.choice(({"topic": "bet.matched"}, {"key": "3"}))


def _swap(world: History) -> None:
    """Two records of one partition change places."""
    lanes: dict[tuple[str, int], list[Row]] = {}
    for record in world.kafka:
        lanes.setdefault((record["topic"], record["partition"]), []).append(record)
    lane = world.chance.choice(list(lanes.values()) or [[]])
    if len(lane) > 1:
        first, second = world.chance.sample(lane, 2)
        first["offset"], second["offset"] = second["offset"], first["offset"]


def _misplace(world: History) -> None:
    """A record is alone in a partition of its own."""
    if world.kafka:
        record = world.chance.choice(world.kafka)
        twins = [other for other in world.kafka if other["event_id"] == record["event_id"]]
        if len(twins) == 1:
            record |= {"partition": 9, "offset": record["offset"] + 1000}


def _tell_wrong(world: History) -> None:
    rows = world.told[world.chance.choice(SOURCES)]
    if rows:
        world.chance.choice(rows)[world.chance.choice(("seq", "balance"))] += world.chance.choice((1, 3))


LEDGER_BUGS = (
    _shift("ledger", "amount"),
    _shift("ledger", "balance_snapshot"),
    _shift("bets", "reserve"),
    _drop("ledger"),
    _drop("bets"),
    _repeat_key,
    _pay_again,
    _charge_again,
    _elsewhere,
    _second_seq,
)
FLOW_BUGS = (
    _drop("ledger"),
    _drop("outbox"),
    _drop("kafka"),
    _payload("outbox"),
    _payload("kafka"),
    _shift("ledger", "amount"),
    _second_event,
    _wrong_place,
    _swap,
    _misplace,
)


def broken(seed: int, length: int, bugs: Sequence[int], kinds: Sequence[Callable[[History], None]]) -> History:
    world = drawn(seed, length)
    for bug in bugs:
        if world.ledger and world.outbox:
            kinds[bug % len(kinds)](world)
    return world


def pieces(rows: list[Any], cuts: Sequence[int]) -> list[list[Any]]:
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    return [rows[begin:end] for begin, end in pairwise(edges)]


def offline(run: Run, code: str) -> list[Witness]:
    found = CHECKS[code].find(run)
    assert found.count == len(found.witnesses), "too many to compare: draw fewer rows"
    return found.witnesses


def places(witnesses: Sequence[Witness]) -> set[tuple[int | None, int | None, str | None]]:
    return {(witness.user, witness.seq, witness.key) for witness in witnesses}


def named(witnesses: Sequence[Witness], pattern: str) -> set[str]:
    """What the witnesses are about, by the words of their sentence."""
    found = set()
    for witness in witnesses:
        match = re.search(pattern, witness.text)
        assert match is not None, witness.text
        found.add(next(group for group in match.groups() if group is not None))
    return found


CUTS = st.lists(st.integers(0, 40), max_size=6)
BUGS = st.lists(st.integers(0, 9), max_size=3)


def snapshots(world: History, cuts: Sequence[int]) -> list[list[Entry]]:
    """The entries as a row of snapshots shows them: of each wallet in order, rows of one seq together."""
    entries = sorted(world.entries(), key=lambda entry: (entry.seq, entry.user))
    groups: list[list[Entry]] = []
    for entry in entries:
        if groups and (groups[-1][0].user, groups[-1][0].seq) == (entry.user, entry.seq):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return [[entry for group in piece for entry in group] for piece in pieces(groups, cuts)]


@given(seed=st.integers(0, 10**6), length=st.integers(1, 18), bugs=BUGS, cuts=CUTS)
@settings(deadline=None, max_examples=150)
def test_a_ledger_in_pieces_breaks_the_rules_it_breaks_as_a_whole(
    seed: int, length: int, bugs: list[int], cuts: list[int]
) -> None:
    world = broken(seed, length, bugs, LEDGER_BUGS)
    run = world.run()
    ledger = Ledger()
    found: list[Witness] = []
    for piece in snapshots(world, cuts):
        found += ledger.feed(piece, HOLDERS)
    of = {code: [witness for witness in found if witness.code == code] for code in CHECKS}
    for code in ("A06", "A07", "A09", "A10"):
        assert places(of[code]) == places(offline(run, code)), code
    bet = r"bet (\S+?)[ ,]|key (key \d+)"
    for code in ("A02", "A27", "A22"):
        assert named(of[code], bet) == named(offline(run, code), bet), code
    stakes = r"bet (\S+?)(?:,| of| with|$)"
    torn = named(offline(run, "A13"), stakes)
    live = named(of["A13"], stakes)
    # A bet without any stake is not looked for live: only what the entries themselves show.
    staked = {entry.bet_id for entry in world.entries() if entry.contra == "ESCROW" and entry.version is None}
    assert live == torn & staked
    assert {witness.user for witness in of["A31"]} == {w.user for w in offline(run, "A31")}
    # The checker names the cut before the same sentence.
    money = [w.text[w.text.index("wallets hold") :] for w in offline(run, "A12") if "wallets hold" in w.text]
    assert ([ledger.money().text] if ledger.off else []) == money
    assert ledger.again == []
    assert ledger.entries == len(world.ledger)


@given(seed=st.integers(0, 10**6), length=st.integers(1, 18), bugs=BUGS, cuts=CUTS, order=st.randoms())
@settings(deadline=None, max_examples=150)
def test_events_in_pieces_and_in_any_order_break_the_rules_they_break_as_a_whole(
    seed: int, length: int, bugs: list[int], cuts: list[int], order: random.Random
) -> None:
    world = broken(seed, length, bugs, FLOW_BUGS)
    run = world.run()
    flow, found = Flow(), []
    records = sorted(world.records(), key=lambda record: (record.topic, record.partition, record.offset))
    work: list[tuple[str, list[Any]]] = [("entries", piece) for piece in pieces(world.entries(), cuts)]
    work += [("events", piece) for piece in pieces(world.events(), cuts)]
    order.shuffle(work)
    for piece in pieces(records, cuts):
        work.insert(order.randrange(len(work) + 1), ("records", []))
        del piece
    waiting = iter(pieces(records, cuts))
    for what, rows in work:
        if what == "entries":
            found += flow.feed_entries(rows)
        elif what == "events":
            found += flow.feed_events(rows, 1.0)
        else:
            found += flow.feed_records(next(waiting))
    # All of it was read; what has no counterpart now has none.
    for entry in list(flow.entries.values()):
        found.append(flow.silent(entry))
    for place in list(flow.unfounded):
        found.append(flow.phantom(place))
    for event_id in list(flow.strangers):
        found.append(flow.unknown(event_id))
    for event in flow.overdue(2.0, 1000):
        found.append(flow.lost(event))
    of = {code: [witness for witness in found if witness.code == code] for code in CHECKS}
    events = r"event (\S+) \(|(\S+\[\d+\] offset \d+) says|entry (seq \d+ of user \d+)"
    assert named(of["A21"], events) == named(offline(run, "A21"), events)
    # Of two events of one entry the live view compares one and names the other as one too many.
    entry_of = {row["event_id"]: (row["user_id"], row["seq"]) for row in world.outbox}

    def differing(witnesses: list[Witness]) -> set[Any]:
        return {entry_of.get(name, name) for name in named(witnesses, events)}

    assert differing(of["A25"]) == differing(offline(run, "A25"))
    for what in ("tells of", "events? in the outbox"):
        live, whole = ([w for w in of_all if re.search(what, w.text)] for of_all in (of["A24"], offline(run, "A24")))
        assert {(w.user, w.seq) for w in live} == {(w.user, w.seq) for w in whole}, what
    live, whole = ([w for w in of_all if "no outbox" in w.text] for of_all in (of["A24"], offline(run, "A24")))
    assert named(live, r"event (event\d+)") == named(whole, r"event (event\d+)")
    order_of = r"(seq \d+ of user \d+ at offset \d+)|(\S+ has key \S+) in"
    if "bet.matched" not in {record.topic for record in records}:
        # Live, a record on a wrong topic is A25 and no more: its order there means nothing.
        assert named(of["A23"], order_of) == named(offline(run, "A23"), order_of)
    assert flow.unsent == flow.strangers == flow.entries == flow.unfounded == {}


@given(seed=st.integers(0, 10**6), length=st.integers(1, 18), bugs=st.lists(st.integers(0, 3), max_size=3), cuts=CUTS)
@settings(deadline=None, max_examples=100)
def test_balances_that_were_told_contradict_the_ledger_in_pieces_as_they_do_at_once(
    seed: int, length: int, bugs: list[int], cuts: list[int]
) -> None:
    world = broken(seed, length, bugs, [_tell_wrong])
    ledger = Ledger(recent=Seen(4))
    found: list[Witness] = []
    balances = {(row["user_id"], row["seq"]): row["balance_snapshot"] for row in world.ledger}
    told = {name: pieces(rows, cuts) for name, rows in world.told.items()}
    for number, piece in enumerate(snapshots(world, cuts)):
        ledger.feed(piece)
        for name in SOURCES:
            rows = [Told(row["user_id"], row["seq"], row["balance"]) for row in told[name][number]]
            wrong, unsure = readmodel.compare(ledger, name, rows)
            found += wrong + readmodel.settle(name, unsure, balances)
    texts = {w.text for w in offline(world.run(), "A11") if "no projection row" not in w.text}
    assert {witness.text for witness in found} == texts


def test_a_row_that_comes_again_is_known_and_a_row_that_was_rewritten_is_not() -> None:
    world = drawn(3, 12)
    ledger = Ledger()
    entries = world.entries()
    ledger.feed(entries)
    assert (ledger.feed(entries), ledger.again) == ([], [])
    ledger.feed([entries[0]._replace(digest=entries[0].digest + 1)])
    assert [entry.seq for entry in ledger.again] == [entries[0].seq]


def test_a_wallet_that_is_not_what_was_read_is_named_and_one_that_is_is_not() -> None:
    ledger = Ledger()
    right = Sums(user=7, rows=3, seq=3, balance=90, total=90, digest=2**70 + 5, broken=0)
    assert ledger.adopt(right)
    assert ledger.rewritten(right) is None
    assert ledger.rewritten(right._replace(digest=2**70 + 6)) is not None
    gone = ledger.rewritten(right._replace(rows=2))
    assert gone is not None
    assert (gone.code, gone.user, "3 entries were read and 2 are there now" in gone.text) == ("A33", 7, True)


def test_what_was_wrong_before_the_audit_is_not_taken_over_in_silence() -> None:
    right = Sums(user=7, rows=3, seq=3, balance=90, total=90, digest=1, broken=0)
    for wrong in ({"broken": 1}, {"rows": 2}, {"total": 91}):
        assert not Ledger().adopt(right._replace(**wrong))


def test_memory_is_bounded_and_keeps_the_newest() -> None:
    seen: Seen[int, int] = Seen(10)
    for number in range(1000):
        seen[number] = number
        assert len(seen) <= 10
    assert [number for number in range(1000) if number in seen][-5:] == [995, 996, 997, 998, 999]
    assert 0 not in seen
