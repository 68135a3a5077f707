"""A snapshot of every store of the service, taken at rest: one Parquet file per table, read lazily.

Every table that comes from Postgres has a column `server`: the node it was read from. UUIDs are text,
times are Unix seconds (float), money is minor units, JSON is text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import polars as pl

_INT: Final = pl.Int64()
_STR: Final = pl.String()
_TIME: Final = pl.Float64()
_BOOL: Final = pl.Boolean()

TABLES: Final[dict[str, dict[str, pl.DataType]]] = {
    "ledger": {
        "server": _STR,
        "shard": _INT,
        "user_id": _INT,
        "seq": _INT,
        "type": _STR,
        "amount": _INT,
        "contra": _STR,
        "match_id": _STR,
        "bet_id": _STR,
        "settlement_version": _INT,
        "balance_snapshot": _INT,
        "idempotent_key": _STR,
        "created_at": _TIME,
    },
    "bets": {
        "server": _STR,
        "shard": _INT,
        "user_id": _INT,
        "bet_id": _STR,
        "seq": _INT,
        "match_id": _STR,
        "outcome": _STR,
        "side": _STR,
        "odds": _INT,
        "stake": _INT,
        "reserve": _INT,
        "placed_at": _TIME,
    },
    "refusals": {
        "server": _STR,
        "shard": _INT,
        "user_id": _INT,
        "idempotent_key": _STR,
        "outcome": _STR,
    },
    "outbox": {
        "server": _STR,
        "id": _INT,
        "event_id": _STR,
        "event_type": _STR,
        "partition_key": _STR,
        "payload": _STR,
        "user_id": _INT,
        "seq": _INT,
        "amount": _INT,
        "balance": _INT,
        "published_to_kafka": _BOOL,
    },
    "kafka": {
        "topic": _STR,
        "partition": _INT,
        "offset": _INT,
        "key": _STR,
        "event_id": _STR,
        "event_type": _STR,
        "user_id": _INT,
        "seq": _INT,
        "amount": _INT,
        "balance": _INT,
        "payload": _STR,
    },
    "projection": {"server": _STR, "shard": _INT, "user_id": _INT, "balance": _INT, "seq": _INT},
    "redis": {"user_id": _INT, "balance": _INT, "seq": _INT},
    "matches": {
        "server": _STR,
        "match_id": _STR,
        "state": _STR,
        "settlement_version": _INT,
        "result": _STR,
        "closes_at": _TIME,
    },
    "transitions": {
        "server": _STR,
        "match_id": _STR,
        "transition_no": _INT,
        "from_state": _STR,
        "to_state": _STR,
        "settlement_version": _INT,
        "result": _STR,
        "at": _TIME,
    },
    "orders": {
        "server": _STR,
        "bet_id": _STR,
        "match_id": _STR,
        "user_id": _INT,
        "outcome": _STR,
        "side": _STR,
        "odds": _INT,
        "stake": _INT,
        "reserve": _INT,
        "arrival": _INT,
        "state": _STR,
        "matched_stake": _INT,
        "matched_liability": _INT,
        "winnings": _INT,
        "cancelled_stake": _INT,
        "cancel_refund": _INT,
        "cancel_reason": _STR,
        "event_id": _STR,
        "arrived_at": _TIME,
    },
    "fills": {
        "server": _STR,
        "match_id": _STR,
        "fill_no": _INT,
        "outcome": _STR,
        "back_bet_id": _STR,
        "back_user": _INT,
        "lay_bet_id": _STR,
        "lay_user": _INT,
        "odds": _INT,
        "stake": _INT,
        "liability": _INT,
        "winnings": _INT,
        "filled_at": _TIME,
    },
    "routes": {"server": _STR, "shard": _INT, "server_name": _STR, "epoch": _INT, "here": _BOOL},
    "cancels": {
        "server": _STR,
        "user_id": _INT,
        "idempotent_key": _STR,
        "bet_id": _STR,
        "match_id": _STR,
        "outcome": _STR,
        "cancelled_stake": _INT,
        "refund": _INT,
        "waiting": _BOOL,
    },
    "settlements": {
        "server": _STR,
        "match_id": _STR,
        "settlement_version": _INT,
        "kind": _STR,
        "result": _STR,
        "state": _STR,
    },
}
"""The columns the checker reads of every table; a snapshot may hold more."""

SERVERS_READ: Final = "servers.json"
"""Optional file of a snapshot: a JSON list of the servers that were read. It lets the checker tell a server
without rows from a server nobody asked."""


class MissingEvidence(Exception):
    """A check needs a table or column that the snapshot does not hold; the message names it."""


class Snapshot:
    """The tables of one snapshot; `table` gives each in the form of `TABLES`."""

    def __init__(
        self,
        name: str,
        folder: Path | None,
        frames: Mapping[str, pl.DataFrame] | None = None,
        servers: frozenset[str] | None = None,
    ) -> None:
        """Read from `folder` on demand, or from `frames` where those are given.

        `servers` are those that were read, for frames that are only a part of a snapshot.
        """
        self.name = name
        self._servers = servers
        self._folder = folder
        self._raw: dict[str, pl.DataFrame] = dict(frames or {})
        self._tables: dict[str, pl.DataFrame] = {}

    def table(self, name: str) -> pl.DataFrame:
        """Return one table. Raises MissingEvidence when it is absent, unreadable or lacks a column."""
        if name not in self._tables:
            self._tables[name] = self._shaped(name, self._read(name))
        return self._tables[name]

    def scan(self, name: str) -> pl.LazyFrame:
        """Return one table in the form of `table`, read only when and as far as it is needed.

        Raises MissingEvidence when the table is absent, its file has no readable end or it lacks a column.
        """
        if self._folder is None or name in self._raw or name in self._tables:
            return self.table(name).lazy()
        path = self._folder / f"{name}.parquet"
        if not path.exists():
            raise MissingEvidence(f"{self.name} has no table {name}")
        try:
            frame = pl.scan_parquet(path)
            columns = frame.collect_schema()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise MissingEvidence(f"{self.name} table {name} cannot be read: {error}") from error
        if not columns:
            return pl.DataFrame(schema=TABLES[name]).lazy()
        if any(columns.get(column) != kind for column, kind in TABLES[name].items()):
            # Whether another type fits is decided by its values.
            return self.table(name).lazy()
        return frame.select(*TABLES[name])

    def column(self, table: str, name: str) -> pl.Series:
        """Return one column of a table. Raises MissingEvidence."""
        try:
            return self.scan(table).select(name).collect().to_series()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise MissingEvidence(f"{self.name} table {table} cannot be read: {error}") from error

    def missing(self) -> list[str]:
        """Return one sentence for every table that is not there in the form of `TABLES`.

        Of a table on disk this reads the end of the file, which says its columns, and not its rows.
        """
        found: list[str] = []
        for name in TABLES:
            try:
                self.scan(name)
            except MissingEvidence as error:
                found.append(str(error))
        return found

    @property
    def lists_servers(self) -> bool:
        """Whether the snapshot itself says which servers were read."""
        if self._servers is not None:
            return True
        return self._folder is not None and (self._folder / SERVERS_READ).exists()

    def servers_read(self) -> frozenset[str]:
        """Return the servers that were read, by the snapshot's own list or else by the rows it holds."""
        if self._servers is not None:
            return self._servers
        if self._folder is not None and self.lists_servers:
            listed = (self._folder / SERVERS_READ).read_bytes()
            return frozenset(msgspec.json.decode(listed, type=list[str]))
        seen: set[str] = set()
        for name, columns in TABLES.items():
            if "server" in columns:
                seen.update(self.column(name, "server").drop_nulls().unique().to_list())
        return frozenset(seen)

    def _read(self, name: str) -> pl.DataFrame:
        if name in self._raw:
            return self._raw[name]
        path = self._folder / f"{name}.parquet" if self._folder is not None else None
        if path is None or not path.exists():
            raise MissingEvidence(f"{self.name} has no table {name}")
        try:
            return pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise MissingEvidence(f"{self.name} table {name} cannot be read: {error}") from error

    def _shaped(self, name: str, frame: pl.DataFrame) -> pl.DataFrame:
        schema = TABLES[name]
        if frame.is_empty() and not frame.columns:
            return pl.DataFrame(schema=schema)
        absent = [column for column in schema if column not in frame.columns]
        if absent:
            raise MissingEvidence(f"{self.name} table {name} lacks the columns {', '.join(absent)}")
        try:
            return frame.select(pl.col(column).cast(kind) for column, kind in schema.items())
        except pl.exceptions.PolarsError as error:
            raise MissingEvidence(f"{self.name} table {name} has a column of another type: {error}") from error
