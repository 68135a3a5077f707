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
        "xact": _INT,
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
        "created_at": _TIME,
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
        "created_at": _TIME,
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
        "timestamp": _TIME,
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
        "outcomes": _STR,
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
    "routes": {"server": _STR, "shard": _INT, "server_name": _STR, "epoch": _INT, "here": _BOOL, "changed_at": _TIME},
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
    "reconciliations": {
        "server": _STR,
        "run_id": _STR,
        "kind": _STR,
        "requested_by": _STR,
        "state": _STR,
        "started_at": _TIME,
        "finished_at": _TIME,
        "code": _STR,
        "user_id": _INT,
        "seq": _INT,
        "expected": _STR,
        "found": _STR,
    },
}
"""The columns the checker reads of every table; a snapshot may hold more.

`ledger.xact` is the id of the database transaction that wrote the row on this server. `reconciliations` has a
row for each finding of each pass of the service's own reconciler, and one without a code for a pass without any."""

EVIDENCE: Final = 2
"""The evidence that runs record now; a run says which it was recorded with (config.json), 1 if it does not."""

ADDED_COLUMNS: Final[dict[str, frozenset[str]]] = {
    "ledger": frozenset({"xact"}),
    "refusals": frozenset({"created_at"}),
    "outbox": frozenset({"created_at"}),
    "kafka": frozenset({"timestamp"}),
    "matches": frozenset({"outcomes"}),
    "routes": frozenset({"changed_at"}),
}
"""Columns that snapshots of evidence 1 need not have; they read as null there."""

ADDED_TABLES: Final = frozenset({"reconciliations"})
"""Tables that snapshots of evidence 1 need not have."""

SERVERS_READ: Final = "servers.json"
"""Optional file of a snapshot: a JSON list of the servers that were read. It lets the checker tell a server
without rows from a server nobody asked."""


class MissingEvidence(Exception):
    """A check needs a table or column that the snapshot does not hold; the message names it."""


class NotRecorded(MissingEvidence):
    """A check needs what was not recorded yet when the run was made: it is too old for this code, and not damaged."""


class Snapshot:
    """The tables of one snapshot; `table` gives each in the form of `TABLES`."""

    def __init__(
        self,
        name: str,
        folder: Path | None,
        frames: Mapping[str, pl.DataFrame] | None = None,
        servers: frozenset[str] | None = None,
        *,
        evidence: int = 1,
    ) -> None:
        """Read from `folder` on demand, or from `frames` where those are given.

        `servers` are those that were read, for frames that are only a part of a snapshot. `evidence` says what must be
        there: of 1 only what was recorded from the first.
        """
        self.name = name
        self._servers = servers
        self._evidence = evidence
        self._folder = folder
        self._raw: dict[str, pl.DataFrame] = dict(frames or {})
        self._tables: dict[str, pl.DataFrame] = {}

    def table(self, name: str) -> pl.DataFrame:
        """Return one table. Raises MissingEvidence when it is absent, unreadable or lacks a column.

        NotRecorded, when the run is older than the table; columns that it is older than are null.
        """
        if name not in self._tables:
            self._tables[name] = self._shaped(name, self._read(name))
        return self._tables[name]

    def scan(self, name: str) -> pl.LazyFrame:
        """Return one table in the form of `table`, read only when and as far as it is needed.

        Raises as `table` does when the table is absent, its file has no readable end or it lacks a column.
        """
        source = self.raw(name)
        if not isinstance(source, Path) or name in self._tables:
            return self.table(name).lazy()
        schema = TABLES[name]
        try:
            frame = pl.scan_parquet(source)
            columns = frame.collect_schema()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise MissingEvidence(f"{self.name} table {name} cannot be read: {error}") from error
        if not columns:
            return pl.DataFrame(schema=schema).lazy()
        if self._evidence < EVIDENCE:
            later = ADDED_COLUMNS.get(name, frozenset()) - set(columns)
            frame = frame.with_columns(pl.lit(None, dtype=schema[column]).alias(column) for column in sorted(later))
            columns = frame.collect_schema()
        if any(columns.get(column) != kind for column, kind in schema.items()):
            # Whether another type fits is decided by its values.
            return self.table(name).lazy()
        return frame.select(*schema)

    def column(self, table: str, name: str) -> pl.Series:
        """Return one column of a table. Raises MissingEvidence."""
        try:
            return self.scan(table).select(name).collect().to_series()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise MissingEvidence(f"{self.name} table {table} cannot be read: {error}") from error

    def raw(self, name: str) -> Path | pl.DataFrame | None:
        """Return where one table is, unread and unchecked: its file, its frame, or None without either."""
        if name in self._raw:
            return self._raw[name]
        path = self._folder / f"{name}.parquet" if self._folder is not None else None
        return path if path is not None and path.exists() else None

    def missing(self, *, rows: bool = True) -> list[str]:
        """Return one sentence for every table that cannot be read as `TABLES` says.

        Without `rows` only the end of each file is read, which says its columns.
        """
        found: list[str] = []
        for name in TABLES:
            try:
                if rows:
                    self.table(name)
                else:
                    self.scan(name)
            except NotRecorded:
                continue
            except MissingEvidence as error:
                found.append(str(error))
        return found

    def lacking(self) -> frozenset[str]:
        """Return what the run is older than, as `table` or `table.column`; damaged tables are not looked at."""
        found: set[str] = set()
        for name in {*ADDED_COLUMNS, *ADDED_TABLES}:
            try:
                there = self._columns(name)
            except NotRecorded:
                found.add(name)
            except MissingEvidence:
                continue
            else:
                found |= {f"{name}.{column}" for column in ADDED_COLUMNS.get(name, ()) if there and column not in there}
        return frozenset(found)

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
            if "server" in columns and name not in ADDED_TABLES:
                seen.update(self.column(name, "server").drop_nulls().unique().to_list())
        return frozenset(seen)

    def _columns(self, name: str) -> list[str]:
        source = self.raw(name)
        if not isinstance(source, Path):
            return self._read(name).columns
        try:
            return pl.scan_parquet(source).collect_schema().names()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise MissingEvidence(f"{self.name} table {name} cannot be read: {error}") from error

    def _read(self, name: str) -> pl.DataFrame:
        source = self.raw(name)
        if source is None:
            if name in ADDED_TABLES and self._evidence < EVIDENCE:
                raise NotRecorded(f"{self.name} has no table {name}: the run is older than it")
            raise MissingEvidence(f"{self.name} has no table {name}")
        if isinstance(source, pl.DataFrame):
            return source
        try:
            return pl.read_parquet(source)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise MissingEvidence(f"{self.name} table {name} cannot be read: {error}") from error

    def _shaped(self, name: str, frame: pl.DataFrame) -> pl.DataFrame:
        schema = TABLES[name]
        if frame.is_empty() and not frame.columns:
            return pl.DataFrame(schema=schema)
        absent = [column for column in schema if column not in frame.columns]
        if self._evidence < EVIDENCE:
            later = [column for column in absent if column in ADDED_COLUMNS.get(name, ())]
            frame = frame.with_columns(pl.lit(None, dtype=schema[column]).alias(column) for column in later)
            absent = [column for column in absent if column not in later]
        if absent:
            raise MissingEvidence(f"{self.name} table {name} lacks the columns {', '.join(absent)}")
        try:
            return frame.select(pl.col(column).cast(kind) for column, kind in schema.items())
        except pl.exceptions.PolarsError as error:
            raise MissingEvidence(f"{self.name} table {name} has a column of another type: {error}") from error
