"""A21, A23, A24, A25: each entry's event followed from the outbox to its topic, as both are read piece by piece.

What must be there at the same moment (an entry and its event are one transaction) is judged when both were read in one
snapshot; what may still come (a record behind its event) waits here, in bounded numbers, until the feeder has asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from invariants.anomalies.common import Witness
from invariants.anomalies.events import WALLET_EVENTS
from invariants.live.rows import Entry, Event, Record, Seen
from reference.commands import TOPIC_OF, EventType

WAITING_MAX: Final = 300_000
"""Events without their record, entries without their event, or records without their event, kept at most."""

_BET_TERMS: Final = ("match_id", "outcome", "side", "odds", "stake", "reserve")
_ENTRY_FIELDS: Final = ("type", "amount", "contra", "match_id", "bet_id", "settlement_version", "balance")
_TOPICS: Final = {str(event): topic for event, topic in TOPIC_OF.items()}
_WALLET_TOPICS: Final = frozenset(_TOPICS[event] for event in WALLET_EVENTS)


@dataclass(slots=True)
class _Waiting:
    event: Event
    since_s: float


@dataclass
class Flow:
    """What was read of outboxes and topics and has not met its counterpart yet."""

    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    """Entries whose event was not read yet."""
    unfounded: dict[tuple[int, int], Event] = field(default_factory=dict)
    """Wallet events whose entry was not read yet."""
    unsent: dict[str, _Waiting] = field(default_factory=dict)
    """Events whose record was not read yet, by event id, oldest first."""
    strangers: dict[str, list[Record]] = field(default_factory=dict)
    """Records whose event was not read yet, by event id; several of one event in the order they came."""
    events: int = 0
    records: int = 0
    repeated: int = 0
    """Records of an event that had one already: at-least-once delivery, only counted."""
    dropped: int = 0
    """What was too much to keep."""
    _sent: Seen[str, tuple[str, str, int]] = field(default_factory=Seen)
    """Events whose record was read: type, key, and the hash of the payload."""
    _paired: Seen[tuple[int, int], str] = field(default_factory=Seen)
    """(user, seq) whose entry and event met, with the event's id."""
    _digests: Seen[tuple[str, int], int] = field(default_factory=Seen)
    """(server, outbox id) → digest of what was read."""
    _disorders: dict[str, list[Witness]] = field(default_factory=dict)
    """What is wrong with the order of a stranger, should its event be new."""
    _homes: dict[tuple[str, str], int] = field(default_factory=dict)
    """(topic, key) → partition of its first record."""
    _last: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """(topic, partition, user) → seq of its newest first record. Both grow with wallets and matches only."""

    def feed_entries(self, entries: Iterable[Entry]) -> list[Witness]:
        """Take entries and compare those whose event was read already."""
        found: list[Witness] = []
        for entry in entries:
            place = (entry.user, entry.seq)
            event = self.unfounded.pop(place, None)
            if event is not None:
                found += self._pair(entry, event)
            elif place not in self._paired:
                self.entries[place] = entry
        self._bound(self.entries)
        return found

    def feed_events(self, events: Iterable[Event], now_s: float) -> list[Witness]:
        """Take outbox rows and compare them with their entry and, where it came first, with their record."""
        found: list[Witness] = []
        for event in events:
            if self._digests.get((event.server, event.id)) is not None:
                continue
            self._digests[(event.server, event.id)] = event.digest
            self.events += 1
            records = self.strangers.pop(event.event_id, None)
            if records is not None:
                found += self._disorders.pop(event.event_id, [])
                for record in records:
                    found += self._sent_as(event, record)
            elif event.event_id not in self._sent:
                self.unsent[event.event_id] = _Waiting(event, now_s)
            if event.event_type in WALLET_EVENTS:
                found += self._wallet_event(event)
        self._bound(self.unsent)
        self._bound(self.unfounded)
        return found

    def _wallet_event(self, event: Event) -> list[Witness]:
        payload = parsed(event.payload)
        user, seq = payload.get("user_id"), payload.get("seq")
        if not isinstance(user, int) or not isinstance(seq, int):
            return [self._phantom(event, user, seq)]
        if (user, seq) in self._paired or (user, seq) in self.unfounded:
            text = f"seq {seq} of user {user} has more than one event in the outbox: {event.event_id} is another"
            return [Witness("A24", text, None, user, seq)]
        entry = self.entries.pop((user, seq), None)
        if entry is None:
            self.unfounded[(user, seq)] = event
            return []
        return self._pair(entry, event, payload)

    def _pair(self, entry: Entry, event: Event, payload: dict[str, Any] | None = None) -> list[Witness]:
        self._paired[(entry.user, entry.seq)] = event.event_id
        return self.compare(entry, event, payload)

    @staticmethod
    def compare(entry: Entry, event: Event, payload: dict[str, Any] | None = None) -> list[Witness]:
        """A25: the payload says what the entry and its bet say."""
        payload = parsed(event.payload) if payload is None else payload
        row: dict[str, Any]
        if event.event_type == EventType.BET_CREATED:
            row = {"amount": entry.amount, "balance": entry.balance, "bet_id": entry.bet_id}
            if entry.bet is not None:
                row |= {name: getattr(entry.bet, name) for name in _BET_TERMS}
        else:
            row = {name: getattr(entry, "version" if name == "settlement_version" else name) for name in _ENTRY_FIELDS}
        differs = [name for name, value in row.items() if payload.get(name) != value]
        if not differs:
            return []
        what = ", ".join(f"{name} is {payload.get(name)} and the row says {row[name]}" for name in differs)
        text = f"event {event.event_id} ({event.event_type}) differs from its row: {what}"
        return [Witness("A25", text, entry.key, entry.user, entry.seq)]

    def feed_records(self, records: Iterable[Record]) -> list[Witness]:
        """Take records of topics, in the order of their offsets, and compare those whose event was read already."""
        found: list[Witness] = []
        for record in records:
            self.records += 1
            sent, twins = self._sent.get(record.event_id), self.strangers.get(record.event_id)
            if sent is not None or twins is not None:
                self.repeated += 1
                if sent is not None:
                    found += self._again(record, *sent)
                elif twins is not None:
                    twins.append(record)
                continue
            disorder = self._disorder(record)
            waiting = self.unsent.pop(record.event_id, None)
            if waiting is not None:
                found += self._sent_as(waiting.event, record) + disorder
            else:
                self.strangers[record.event_id] = [record]
                if disorder:
                    self._disorders[record.event_id] = disorder
        self._bound(self.strangers)
        return found

    def _sent_as(self, event: Event, record: Record) -> list[Witness]:
        """A25: the first record of an event is the event, on its topic and under its key."""
        self._sent[event.event_id] = (event.event_type, event.key, hash(event.payload))
        if (
            record.payload == event.payload
            and record.key == event.key
            and record.topic == _TOPICS.get(event.event_type)
        ):
            return []
        found: list[Witness] = []
        payload = parsed(event.payload)
        user, seq = payload.get("user_id"), payload.get("seq")
        where = f"{record.topic}[{record.partition}] offset {record.offset}"
        if record.topic != _TOPICS.get(event.event_type) or record.key != event.key:
            text = f"event {event.event_id} ({event.event_type}, key {event.key}) is at {where}, key {record.key}"
            found.append(Witness("A25", f"{text}: another topic or key", None, user, seq))
        if record.payload != event.payload and parsed(record.payload) != payload:
            text = f"{where} says {record.payload}; the outbox says {event.payload}"
            found.append(Witness("A25", text, None, user, seq))
        return found

    def _again(self, record: Record, event_type: str, key: str, payload: int) -> list[Witness]:
        """A25: an event that is sent again is what it was."""
        where = f"{record.topic}[{record.partition}] offset {record.offset}"
        if record.topic != _TOPICS.get(event_type) or record.key != key:
            text = f"event {record.event_id} ({event_type}, key {key}) is at {where}, key {record.key}"
            return [Witness("A25", f"{text}: another topic or key")]
        if hash(record.payload) != payload:
            return [Witness("A25", f"{where} says {record.payload}, which is not what the event said before")]
        return []

    def _disorder(self, record: Record) -> list[Witness]:
        """A23: within a partition a wallet's seqs increase, and a key has one partition."""
        found: list[Witness] = []
        home = self._homes.setdefault((record.topic, record.key), record.partition)
        if home != record.partition:
            text = f"{record.topic} has key {record.key} in partitions {sorted((home, record.partition))}"
            found.append(Witness("A23", text))
        if record.topic not in _WALLET_TOPICS:
            return found
        try:
            place = _decode_place(record.payload)
        except msgspec.DecodeError:
            return found
        lane = (record.topic, record.partition, place.user_id)
        earlier = self._last.get(lane)
        if earlier is not None and earlier >= place.seq:
            text = (
                f"{record.topic}[{record.partition}] has seq {place.seq} of user {place.user_id} at offset"
                f" {record.offset}, after its seq {earlier}"
            )
            found.append(Witness("A23", text, None, place.user_id, place.seq))
        self._last[lane] = place.seq
        return found

    # -- what is judged once the feeder has asked

    def paired_with(self, events: Iterable[Event]) -> list[Witness]:
        """Compare entries with events that were looked for, whether or not those had been read before."""
        found: list[Witness] = []
        for event in events:
            payload = parsed(event.payload)
            entry = self.entries.pop((payload.get("user_id"), payload.get("seq")), None)  # type: ignore[arg-type]
            if entry is not None:
                found += self._pair(entry, event, payload)
        return found

    def overdue(self, before_s: float, limit: int) -> list[Event]:
        """Return events that wait for their record since before a time, oldest first."""
        due: list[Event] = []
        for waiting in self.unsent.values():
            if waiting.since_s >= before_s or len(due) >= limit:
                break
            due.append(waiting.event)
        return due

    def wait_on(self, event_id: str, now_s: float) -> None:
        """Let an event wait anew: it is not published yet."""
        waiting = self.unsent.pop(event_id, None)
        if waiting is not None:
            self.unsent[event_id] = _Waiting(waiting.event, now_s)

    def lost(self, event: Event) -> Witness:
        """A21: the event is marked as published and its topic was read beyond that: there is no record."""
        self.unsent.pop(event.event_id, None)
        text = (
            f"event {event.event_id} ({event.event_type}, {event.server} outbox id {event.id}, marked published) is"
            " not in Kafka"
        )
        payload = parsed(event.payload)
        return Witness("A21", text, None, payload.get("user_id"), payload.get("seq"))

    def forget(self, event_id: str) -> None:
        """Wait no longer for the record of an event: it may have come before the topics were read."""
        self.unsent.pop(event_id, None)

    def silent(self, entry: Entry) -> Witness:
        """A21: no outbox has an event of the entry."""
        self.entries.pop((entry.user, entry.seq), None)
        text = f"entry seq {entry.seq} of user {entry.user} (key {entry.key}) has no event in the outbox"
        return Witness("A21", text, entry.key, entry.user, entry.seq)

    def phantom(self, place: tuple[int, int]) -> Witness:
        """A24: no ledger has the entry of the event."""
        return self._phantom(self.unfounded.pop(place), *place)

    def _phantom(self, event: Event, user: object, seq: object) -> Witness:
        text = (
            f"event {event.event_id} ({event.event_type}) tells of seq {seq} of user {user}, which the ledger does"
            " not have"
        )
        return Witness(
            "A24", text, None, user if isinstance(user, int) else None, seq if isinstance(seq, int) else None
        )

    def explained(self, event: Event) -> list[Witness]:
        """A25: a record whose event was looked for and found is what the event says, old or sent again as it may be."""
        records = self.strangers.pop(event.event_id, [])
        self.unsent.pop(event.event_id, None)
        # Where it stands says nothing: it may have been sent for the first time before this began to read.
        self._disorders.pop(event.event_id, None)
        return [witness for record in records for witness in self._sent_as(event, record)]

    def unknown(self, event_id: str) -> Witness:
        """A24: no outbox has the event of the record."""
        record = self.strangers.pop(event_id)[0]
        self._disorders.pop(event_id, None)
        text = (
            f"{record.topic}[{record.partition}] offset {record.offset} holds event {record.event_id}, which no outbox"
            " holds"
        )
        return Witness("A24", text, None, int(record.key) if record.key.isdigit() else None)

    def rewritten(self, server: str, number: int, digest: int) -> bool | None:
        """Return whether an outbox row is another than was read under its id; None if that is not remembered."""
        known = self._digests.get((server, number))
        return None if known is None else known != digest

    def changed(self, event: Event) -> Witness:
        """A25: an outbox row is not what it was when it was read. It is remembered as it is now."""
        self._digests[(event.server, event.id)] = event.digest
        payload = parsed(event.payload)
        text = (
            f"event {event.event_id} ({event.event_type}, {event.server} outbox id {event.id}) is not what it was when"
            f" it was written; it says {event.payload} now"
        )
        user, seq = payload.get("user_id"), payload.get("seq")
        return Witness(
            "A25", text, None, user if isinstance(user, int) else None, seq if isinstance(seq, int) else None
        )

    def _bound(self, waiting: dict[Any, Any]) -> None:
        while len(waiting) > WAITING_MAX:
            waiting.pop(next(iter(waiting)))
            self.dropped += 1


class _Place(msgspec.Struct):
    user_id: int
    seq: int


_decode = msgspec.json.Decoder().decode
_decode_place = msgspec.json.Decoder(_Place).decode


def parsed(text: str) -> dict[str, Any]:
    """Return the fields of a payload; one that is no JSON object has none."""
    try:
        value = _decode(text)
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}
