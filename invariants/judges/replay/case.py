"""The evidence of a small run as plain Python objects: attempts, stories of keys, wallets walked row by row, books.

Everything is read from the raw records and tables; nothing is taken from the folds of `invariants.anomalies` or
`invariants.fates`, so that an error in those has no twin here.
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final
from uuid import UUID

from invariants.history import ANSWERED
from invariants.run import CLOCK_SLACK_S, DRIFT_KINDS, WALL_CLOCK_DRIFT, Run
from invariants.snapshot import MissingEvidence, Snapshot
from reference.commands import BALANCE_TOPIC, DLQ_TOPIC, TOPIC_OF
from reference.routing import SHARDS, shard_of_match

Row = dict[str, Any]
"""One row of a table of `invariants.snapshot.TABLES`, by column."""

FAMILY_OF: Final = {
    "deposit": "ledger",
    "withdraw": "ledger",
    "bet": "ledger",
    "cancel": "cancel",
    "rollback": "rollback",
    "create_match": "match",
    "close_match": "match",
    "settle_match": "match",
    "void_match": "match",
    "resettle_match": "match",
}
"""Operation → the family of its key; an operation that is not here is a read and has no key."""

SYSTEM: Final = "ledger:"
ROLLBACK: Final = "ledger:rollback:"
REFUSED: Final = 422
OTHER_BODY: Final = 409
NEVER: Final = float("inf")

KeyName = tuple[str, int | None, str | None]
"""(family, user, key): what a fate belongs to."""


@dataclass(frozen=True)
class Finding:
    """One violation: its code, a sentence, and the named values that say where it is (see `invariants.subjects`)."""

    code: str
    text: str
    place: Row


@dataclass(frozen=True)
class Attempt:
    """One request of a client and what became of it; `cls` is ok, fail or info, times are seconds of the run."""

    number: int
    said: Row
    """The invoke record."""
    answer: Row
    """The completion record; empty if there was none."""

    def __getattr__(self, name: str) -> Any:
        """Return a column: of the answer those that an answer says, all others of the request."""
        if name in ANSWERED:
            return self.answer.get(name)
        if name in self.said:
            return self.said[name]
        raise AttributeError(name)

    @property
    def cls(self) -> str:
        """What the client learnt; nobody knows what became of a request without completion."""
        return str(self.answer.get("record", "info"))

    @property
    def t_invoke(self) -> float:
        """When it was sent."""
        return float(self.said["t"])

    @property
    def t_return(self) -> float:
        """When it was answered; NEVER if it was not."""
        return float(self.answer["t"]) if self.answer else NEVER

    @property
    def family(self) -> str:
        """The family of its key, or `read`."""
        return FAMILY_OF.get(self.said["op"], "read")

    @property
    def name(self) -> KeyName:
        """The key it is an attempt of. A match command is its match and operation, a resettle also its result."""
        if self.family != "match":
            return (self.family, self.said["user"], self.said["key"])
        key = f"{self.said['op']}:{self.said['match_id']}"
        if self.said["op"] == "resettle_match":
            key += f":{self.said['selection'] or 'VOID'}"
        return ("match", None, key)

    @property
    def body(self) -> Hashable:
        """What was asked; two attempts of a key with equal bodies are retries of each other."""
        if self.said["payload_hash"] is not None:
            return (self.said["op"], self.said["payload_hash"])
        fields = ("match_id", "bet_id", "selection", "side", "odds", "amount")
        return (self.said["op"], *(self.said[name] for name in fields))

    @property
    def refused(self) -> bool:
        """Whether the answer is a refusal that the service stores: final for the key."""
        stored = self.answer.get("status") == REFUSED and self.answer.get("outcome") != "UNKNOWN_BET"
        return self.cls == "fail" and stored and self.family != "match"


@dataclass
class Story:
    """All attempts of one key, and with them its fate."""

    family: str
    user: int | None
    key: str | None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def name(self) -> KeyName:
        """The key."""
        return (self.family, self.user, self.key)

    @property
    def oks(self) -> list[Attempt]:
        """The acknowledged attempts."""
        return [a for a in self.attempts if a.cls == "ok"]

    @property
    def refusals(self) -> list[Attempt]:
        """The attempts answered by a stored refusal."""
        return [a for a in self.attempts if a.refused]

    @property
    def fate(self) -> str:
        """MUST (exactly one effect), MAY (none or one) or MUST_NOT (none)."""
        if self.oks:
            return "MUST"
        if self.refusals:
            return "MUST_NOT"
        return "MAY" if any(a.cls == "info" for a in self.attempts) else "MUST_NOT"

    @property
    def begin_s(self) -> float:
        """When the key was first sent."""
        return min(a.t_invoke for a in self.attempts)

    @property
    def ack_s(self) -> float:
        """When it was first acknowledged; NEVER if it was not."""
        return min((a.t_return for a in self.oks), default=NEVER)

    @property
    def op(self) -> str:
        """The operation of the attempt that decides the fate."""

        def weight(attempt: Attempt) -> tuple[int, float, int]:
            if attempt.cls == "ok":
                rank = 0
            elif attempt.refused:
                rank = 1
            elif attempt.cls == "info":
                rank = 2
            else:
                rank = 4 if attempt.status == OTHER_BODY else 3
            return (rank, attempt.t_invoke, attempt.number)

        return str(min(self.attempts, key=weight).op)


@dataclass(frozen=True)
class Entry:
    """A ledger row in its wallet: what it says, and what a replay of the rows before it gives."""

    row: Row
    user: int
    seq: int
    key: str
    amount: int
    type: str
    contra: str
    bet_id: str | None
    match_id: str | None
    version: int | None
    snapshot: int
    before_seq: int
    before_snapshot: int
    held: int
    """The sum of the amounts before this row."""

    @property
    def replayed(self) -> int:
        """The sum of the amounts up to and with this row."""
        return self.held + self.amount

    @property
    def system(self) -> bool:
        """Whether the service posted it by itself."""
        return self.key.startswith(SYSTEM)


def walk(rows: Iterable[Row]) -> dict[int, list[Entry]]:
    """Return each wallet's entries in the order of their seq."""
    by_user: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_user[row["user_id"]].append(row)
    wallets: dict[int, list[Entry]] = {}
    for user in sorted(by_user):
        seq = snapshot = held = 0
        wallets[user] = []
        for row in sorted(by_user[user], key=lambda r: (r["seq"], r["idempotent_key"])):
            entry = Entry(
                row=row,
                user=user,
                seq=row["seq"],
                key=row["idempotent_key"],
                amount=row["amount"],
                type=row["type"],
                contra=row["contra"],
                bet_id=row["bet_id"],
                match_id=row["match_id"],
                version=row["settlement_version"],
                snapshot=row["balance_snapshot"],
                before_seq=seq,
                before_snapshot=snapshot,
                held=held,
            )
            wallets[user].append(entry)
            seq, snapshot, held = entry.seq, entry.snapshot, entry.replayed
    return wallets


class Case:
    """All the evidence of one run; each part is made when a rule first asks. Parts raise MissingEvidence."""

    def __init__(self, run: Run) -> None:
        """Read from `run`: its raw records and tables."""
        self.run = run
        self.stale_after_s = run.config.stale_after_s
        self.commission_bps = run.config.commission_bps
        self._tables: dict[str, list[Row]] = {}

    def table(self, name: str) -> list[Row]:
        """Return the rows of a table of the judged snapshot. Raises MissingEvidence."""
        if name not in self._tables:
            self._tables[name] = rows_of(self.run.second or self.run.first, name)
        return self._tables[name]

    # -- what the clients were told

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Every attempt, in the order of the recording; of two records of one kind the earlier counts."""
        said: dict[int, Row] = {}
        answers: dict[int, Row] = {}
        for record in self.run.recording.frame.to_dicts():
            (said if record["record"] == "invoke" else answers).setdefault(record["attempt"], record)
        return [Attempt(number, row, answers.get(number, {})) for number, row in said.items()]

    @cached_property
    def stories(self) -> dict[KeyName, Story]:
        """The story of every key."""
        stories: dict[KeyName, Story] = {}
        for attempt in self.attempts:
            if attempt.family != "read":
                stories.setdefault(attempt.name, Story(*attempt.name)).attempts.append(attempt)
        return stories

    @cached_property
    def reads(self) -> list[Attempt]:
        """The balance reads that were answered with a value."""
        return [a for a in self.attempts if a.op == "balance" and a.cls == "ok" and a.seq is not None]

    # -- what the service holds

    @cached_property
    def wallets(self) -> dict[int, list[Entry]]:
        """User → entries by seq."""
        return walk(self.table("ledger"))

    @cached_property
    def entries(self) -> list[Entry]:
        """Every entry, wallet by wallet."""
        return [entry for wallet in self.wallets.values() for entry in wallet]

    @property
    def client_entries(self) -> Iterator[Entry]:
        """Entries that a client's command must explain."""
        return (entry for entry in self.entries if not entry.system)

    @property
    def system_entries(self) -> Iterator[Entry]:
        """Entries that the service posted by itself."""
        return (entry for entry in self.entries if entry.system)

    @cached_property
    def places(self) -> dict[tuple[int, int], Entry]:
        """(user, seq) → the first entry there."""
        places: dict[tuple[int, int], Entry] = {}
        for entry in self.entries:
            places.setdefault((entry.user, entry.seq), entry)
        return places

    @cached_property
    def acknowledged(self) -> dict[int, list[tuple[float, Entry]]]:
        """User → (time of the acknowledgement, entry) of each acknowledged entry."""
        told: dict[int, list[tuple[float, Entry]]] = defaultdict(list)
        for entry in self.client_entries:
            story = self.stories.get(("ledger", entry.user, entry.key))
            if story is not None and story.ack_s != NEVER:
                told[entry.user].append((story.ack_s, entry))
        return told

    @cached_property
    def bets(self) -> dict[str, Row]:
        """Bet id → its first row."""
        return first_by(self.table("bets"), "bet_id")

    @cached_property
    def orders(self) -> dict[str, Row]:
        """Bet id → its first order."""
        return first_by(self.table("orders"), "bet_id")

    @cached_property
    def fills_of(self) -> dict[str, list[Row]]:
        """Bet id → its fills, in the order of their numbers."""
        fills: dict[str, list[Row]] = defaultdict(list)
        for fill in sorted(self.table("fills"), key=lambda f: (f["match_id"], f["fill_no"])):
            fills[fill["back_bet_id"]].append(fill)
            fills[fill["lay_bet_id"]].append(fill)
        return fills

    @cached_property
    def rulings(self) -> dict[str, list[Row]]:
        """Match id → its settlements by version."""
        rulings: dict[str, list[Row]] = defaultdict(list)
        for row in sorted(self.table("settlements"), key=lambda s: (s["match_id"], s["settlement_version"])):
            rulings[row["match_id"]].append(row)
        return rulings

    @cached_property
    def events(self) -> list[Row]:
        """Kafka records of the outbox's events, by topic, partition and offset."""
        topics = set(TOPIC_OF.values())
        records = [r for r in self.table("kafka") if r["topic"] in topics]
        return sorted(records, key=lambda r: (r["topic"], r["partition"], r["offset"]))

    @property
    def balance_updates(self) -> list[Row]:
        """Kafka records of the projector's stream of balances."""
        return [r for r in self.table("kafka") if r["topic"] == BALANCE_TOPIC]

    @cached_property
    def outbox(self) -> list[tuple[Row, Row]]:
        """Each event of the outbox with the fields of its payload."""
        return [(event, fields_of(event["payload"])) for event in self.table("outbox")]

    @cached_property
    def buried(self) -> set[str]:
        """Ids of the events in the dead letter topic."""
        return {r["event_id"] for r in self.table("kafka") if r["topic"] == DLQ_TOPIC and r["event_id"] is not None}

    # -- what was done to the service, and by which clock

    @cached_property
    def timeline(self) -> list[Row]:
        """The rows of the timeline."""
        return self.run.timeline.to_dicts()

    @cached_property
    def series(self) -> list[Row]:
        """The measured samples."""
        return self.run.series.to_dicts()

    @cached_property
    def clock_slack_s(self) -> float:
        """How far the service's clock and the run's may be apart, seconds."""
        drifts = [abs(row["value"]) for row in self.series if row["name"] == WALL_CLOCK_DRIFT]
        return CLOCK_SLACK_S + max(drifts, default=0.0)

    @cached_property
    def drifts(self) -> list[Row]:
        """The planted drifts: node, user, code, within_s, requested_by, planted, measured, repaired."""
        drifts: dict[tuple[str, int | None], Row] = {}
        for row in self.timeline:
            if row["kind"] not in DRIFT_KINDS:
                continue
            said = fields_of(row["detail"])
            drift = drifts.setdefault((row["node"], said.get("user")), dict.fromkeys(DRIFT_KINDS.values()))
            name = DRIFT_KINDS[row["kind"]]
            drift[name] = row["t"] if drift[name] is None else min(row["t"], drift[name])
            if row["kind"] == "drift_planted" and "node" not in drift:
                drift |= {"node": row["node"]}
                drift |= {column: said.get(column) for column in ("user", "code", "within_s", "requested_by")}
        return [drift for drift in drifts.values() if drift.get("user") is not None]

    # -- routing

    @cached_property
    def server_of_shard(self) -> dict[int, str]:
        """Where each shard of wallets belongs: by the newest route, a holder's own before others, else as installed."""
        right = dict(self._installed)
        newest: dict[int, tuple[int, bool]] = {}
        for row in self.table("routes"):
            rank = (row["epoch"], row["here"])
            if row["shard"] not in newest or rank >= newest[row["shard"]]:
                newest[row["shard"]] = rank
                right[row["shard"]] = row["server_name"]
        return right

    def home_of_match(self, match_id: str) -> str:
        """Return the server that must hold a match."""
        return self._installed[shard_of_match(UUID(match_id))]

    @cached_property
    def _installed(self) -> dict[int, str]:
        config = self.run.config
        if len(config.routing) != SHARDS or not config.servers:
            raise MissingEvidence(f"the run's configuration has no routing table of {SHARDS} shards")
        return {shard: config.servers[holder] for shard, holder in enumerate(config.routing)}


def fields_of(payload: str | None) -> Row:
    """Return the fields of a JSON object; none for text that is no such object."""
    try:
        value = json.loads(payload or "")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def rows_of(snapshot: Snapshot, name: str) -> list[Row]:
    """Return the rows of a table of a snapshot. Raises MissingEvidence."""
    return snapshot.table(name).to_dicts()


def first_by(rows: Iterable[Row], name: str) -> dict[Any, Row]:
    """Return the first row of each value of the column."""
    found: dict[Any, Row] = {}
    for row in rows:
        found.setdefault(row[name], row)
    return found


def several(items: Iterable[Any], name: Any) -> dict[Any, list[Any]]:
    """Return the groups, by the function `name`, that have more than one member."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[name(item)].append(item)
    return {group: members for group, members in groups.items() if len(members) > 1}
