"""The rows that the incremental folds are fed, and a memory of what was fed that does not grow without bound."""

from typing import Final, Generic, NamedTuple, TypeVar

K = TypeVar("K")
V = TypeVar("V")

REMEMBERED_MAX: Final = 200_000
"""Items that one `Seen` keeps at most; at least the newest half of them."""


class Bet(NamedTuple):
    """The bet row of a stake."""

    seq: int
    reserve: int
    match_id: str
    outcome: str
    side: str
    odds: int
    stake: int


class Entry(NamedTuple):
    """One entry of the ledger as one server holds it. Amounts in minor units, UUIDs as text."""

    server: str
    shard: int
    user: int
    seq: int
    type: str
    amount: int
    contra: str
    match_id: str | None
    bet_id: str | None
    version: int | None
    balance: int
    key: str
    digest: int
    """64 bits over every column of the stored row: the same as long as the row is."""
    bet: Bet | None


class Event(NamedTuple):
    """One row of an outbox."""

    server: str
    id: int
    event_id: str
    event_type: str
    key: str
    payload: str
    digest: int


class Record(NamedTuple):
    """One Kafka record of an outbox's event."""

    topic: str
    partition: int
    offset: int
    event_id: str
    key: str
    payload: str


class Told(NamedTuple):
    """A balance that a store other than the ledger tells: the projection, Redis or the stream of updates."""

    user: int
    seq: int
    balance: int


class Seen(Generic[K, V]):
    """A dictionary that forgets its oldest half when it is full; what it says is true, what it does not know may be."""

    def __init__(self, items_max: int = REMEMBERED_MAX) -> None:
        self._half = max(1, items_max // 2)
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def __setitem__(self, key: K, value: V) -> None:
        """Remember a value."""
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._young[key] = value

    def get(self, key: K) -> V | None:
        """Return what is remembered under the key, or None."""
        found = self._young.get(key)
        return self._old.get(key) if found is None else found

    def __contains__(self, key: K) -> bool:
        """Return whether the key is remembered."""
        return key in self._young or key in self._old

    def __len__(self) -> int:
        """Return how many items are kept; one that was set again counts twice."""
        return len(self._young) + len(self._old)
