"""Cuts a stored run into slices that fit in memory, each of which the checks judge as if it were a run.

Every large file is read once. Its rows go to a folder of Arrow files by the wallet they belong to, and those of the
book by their match. A check says what it must see at once (`Scope`); what it finds in the slices is what it would
find in the whole run. The text of events is not kept: `event_screen` compares it by hashes while it goes by.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import polars as pl

from invariants import history, timeline
from invariants.anomalies import event_screen, keys, refusals, validity
from invariants.anomalies.event_screen import Screen
from invariants.fates import MATCH_OPS
from invariants.history import LoadReport
from invariants.run import FIRST_SNAPSHOT, SECOND_SNAPSHOT, SYSTEM_PREFIX, Run, load_config
from invariants.snapshot import Snapshot
from invariants.spool import BUCKET, Spool

SLICE_ROWS: Final = 300_000
SLICE_ENTRIES: Final = 100_000
"""History records and entries of one slice, about: then its tables take some hundred megabytes."""
BATCH_ROWS: Final = 300_000
"""Rows that are cut at a time."""
CUTTERS: Final = 2
"""Files cut at a time."""
SMALL: Final = ("matches", "transitions", "settlements", "routes")
"""Tables that every slice has whole: a check looks things up there."""
OF_MATCH: Final = ("ledger", "bets", "orders", "fills")
OF_WALLET: Final = ("ledger", "bets", "refusals", "cancels", "projection", "redis", "kafka")
_ABOUT_MATCHES: Final = (pl.col("contra") != "EXTERNAL") | pl.col("idempotent_key").str.starts_with(SYSTEM_PREFIX)
OF_WALLET_FIRST: Final = ("ledger", "refusals", "cancels")
"""Of the first snapshot the checks read these, and the small ones."""


class CannotSlice(Exception):
    """The recording is damaged in a way that only a look at the whole of it can judge."""


@dataclass
class Slices:
    """A run on disk, cut up."""

    whole: Run
    """The run without its attempts: configuration, timeline, recording's defects, snapshots to scan."""
    count: int
    wallets: dict[str, Spool]
    """History, and each table of OF_WALLET and (under `first/…`) OF_WALLET_FIRST."""
    matches: dict[str, Spool]
    match_commands: pl.DataFrame
    """History records of the commands on matches."""
    arrived: pl.DataFrame
    """bet_id of the orders that a cancel of any wallet still waits for."""
    screen: Screen
    servers: tuple[frozenset[str], frozenset[str]]
    small: dict[str, pl.DataFrame] = field(default_factory=dict)

    def wallet_slice(self, number: int) -> Run:
        """Return the slice of some wallets, once. Raises OSError, MissingEvidence."""
        tables = {name: self.wallets[name].take(number) for name in OF_WALLET}
        tables["kafka"] = tables["kafka"].with_columns(pl.lit(None, dtype=pl.String).alias("payload"))
        first = {}
        if self.whole.second is not None:
            first = {name: self.wallets[f"first/{name}"].take(number) for name in OF_WALLET_FIRST}
        run = self._run(self.wallets["history"].take(number), tables, first)
        run.scratch[event_screen.TOLD] = self.wallets["outbox"].take(number)
        run.scratch[keys.ARRIVED] = self.arrived
        run.scratch[refusals.COMMANDS] = history.attempts(self.match_commands)
        return run

    def match_slice(self, number: int) -> Run:
        """Return the slice of some matches, once. Raises OSError, MissingEvidence."""
        mine = _bucket_of_match(self.count) == number
        attempts = self.match_commands.filter(mine & pl.col("op").is_not_null())["attempt"].unique()
        records = self.match_commands.filter(pl.col("attempt").is_in(attempts.implode()))
        tables = {name: self.matches[name].take(number) for name in OF_MATCH}
        return self._run(records, tables, {}, mine)

    def _run(
        self,
        records: pl.DataFrame,
        tables: dict[str, pl.DataFrame],
        first: dict[str, pl.DataFrame],
        mine: pl.Expr | None = None,
    ) -> Run:
        whole = self.whole
        small = {name: whole.final.table(name) for name in SMALL}
        small_first = {name: whole.first.table(name) for name in SMALL if first}
        if mine is not None:
            small |= {name: small[name].filter(mine) for name in SMALL if name != "routes"}
        second, evidence = None, whole.config.evidence
        if whole.second is not None:
            second = Snapshot(SECOND_SNAPSHOT, None, tables | small, self.servers[1], evidence=evidence)
            begun = Snapshot(FIRST_SNAPSHOT, None, first | small_first, self.servers[0], evidence=evidence)
        else:
            begun = Snapshot(FIRST_SNAPSHOT, None, tables | small, self.servers[0], evidence=evidence)
        return Run(
            config=whole.config,
            recording=LoadReport(frame=records),
            timeline_rows=whole.timeline,
            series_rows=whole.series,
            first=begun,
            second=second,
        )


def rows_recorded(folder: Path) -> int:
    """Return how many history records the manifest of a run folder lists; 0 for one that cannot be read."""
    manifest = folder / history.FOLDER / history.MANIFEST
    if not manifest.exists():
        return 0
    rows = 0
    for line in manifest.read_bytes().splitlines():
        try:
            entry = msgspec.json.decode(line, type=dict[str, object])
        except msgspec.DecodeError:
            continue
        number = entry.get("rows")
        rows += number if isinstance(number, int) and "file" in entry else 0
    return rows


def cut(folder: Path, place: Path, count: int | None = None) -> Slices:
    """Cut the run in `folder` into `count` slices (as many as its size asks for) kept under `place`.

    Raises CannotSlice for a recording that must be seen whole, MissingEvidence for a snapshot that cannot be read,
    OSError where the slices cannot be written.
    """
    second = folder / SECOND_SNAPSHOT
    config = load_config(folder)
    whole = Run(
        config=config,
        recording=LoadReport(frame=pl.DataFrame(schema=history.SCHEMA)),
        timeline_rows=timeline.load_timeline(folder),
        series_rows=timeline.load_series(folder),
        first=Snapshot(FIRST_SNAPSHOT, folder / FIRST_SNAPSHOT, evidence=config.evidence),
        second=Snapshot(SECOND_SNAPSHOT, second, evidence=config.evidence) if second.exists() else None,
        folder=folder,
    )
    final = whole.final
    if count is None:
        entries = int(final.scan("ledger").select(pl.len()).collect().item())
        count = max(1, round(rows_recorded(folder) / SLICE_ROWS), round(entries / SLICE_ENTRIES))
    wallets = {name: Spool(place / "wallets" / name) for name in ("history", *OF_WALLET, "outbox")}
    wallets |= {f"first/{name}": Spool(place / "wallets-first" / name) for name in OF_WALLET_FIRST}
    matches = {name: Spool(place / "matches" / name) for name in OF_MATCH}
    by_wallet, by_match = _bucket_of_wallet(count), _bucket_of_match(count)
    screen = Screen()

    def cut_table(name: str) -> None:
        for batch in _batches(final.scan(name)):
            if name in OF_WALLET:
                wallets[name].add(batch.with_columns(by_wallet.alias(BUCKET)))
            if name in OF_MATCH:
                rows = batch.filter(_ABOUT_MATCHES) if name == "ledger" else batch
                matches[name].add(rows.with_columns(by_match.alias(BUCKET)))

    def cut_first(name: str) -> None:
        for batch in _batches(whole.first.scan(name)):
            wallets[f"first/{name}"].add(batch.with_columns(by_wallet.alias(BUCKET)))

    def cut_outbox() -> None:
        for batch in _batches(final.scan("outbox")):
            wallets["outbox"].add(screen.take_outbox(batch).with_columns(by_wallet.alias(BUCKET)))

    def cut_kafka() -> None:
        owner = pl.coalesce("user_id", (pl.col("key").fill_null("").hash() % count).cast(pl.Int64)) % count
        for batch in _batches(final.scan("kafka")):
            screen.take_kafka(batch)
            wallets["kafka"].add(batch.drop("payload").with_columns(owner.alias(BUCKET)))

    tables = sorted({*OF_WALLET, *OF_MATCH} - {"kafka"})
    with ThreadPoolExecutor(CUTTERS, thread_name_prefix="cut") as cutters:
        # The longest first, so that the end is not one of them alone.
        told = cutters.submit(_cut_history, folder, wallets["history"], count)
        tasks = [cutters.submit(cut_kafka), cutters.submit(cut_outbox)]
        tasks += [cutters.submit(cut_table, name) for name in tables]
        if whole.second is not None:
            tasks += [cutters.submit(cut_first, name) for name in OF_WALLET_FIRST]
        whole.recording, commands, whole.scratch[validity.NUMBERS] = told.result()
        for task in tasks:
            task.result()
    servers = (whole.first.servers_read(), final.servers_read())
    waiting = final.scan("cancels").filter("waiting").select("bet_id").unique()
    arrived = final.scan("orders").select("bet_id").join(waiting, on="bet_id", how="semi").unique().collect()
    return Slices(whole, count, wallets, matches, commands, arrived, screen, servers)


def _batches(frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """Return a table batch by batch, an empty one as one empty batch."""
    some = False
    for batch in frame.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True):
        some = True
        yield batch
    if not some:
        yield frame.head(0).collect()


def _bucket_of_wallet(count: int) -> pl.Expr:
    return pl.col("user_id").fill_null(0) % count


def _bucket_of_match(count: int) -> pl.Expr:
    return (pl.col("match_id").fill_null("").hash() % count).cast(pl.Int64)


def _cut_history(folder: Path, spool: Spool, count: int) -> tuple[LoadReport, pl.DataFrame, pl.DataFrame]:
    """Cut the history by wallet; return what is wrong with it, the records of commands on matches, and the numbers.

    These are those of the invoke records: attempt, in order.
    """
    owners = np.full(1024, -1, dtype=np.int32)
    commands: list[pl.DataFrame] = []
    waiting: list[pl.DataFrame] = []

    def write() -> None:
        nonlocal owners
        records = pl.concat(waiting) if waiting else pl.DataFrame(schema=history.SCHEMA)
        waiting.clear()
        attempt = records["attempt"].to_numpy()
        if len(attempt) and (attempt.min() < 0 or attempt.max() > _MOST_ATTEMPTS):
            raise CannotSlice("an attempt's number is out of range")
        top = int(attempt.max(initial=0))
        if top >= len(owners):
            owners = np.concatenate([owners, np.full(max(top + 1 - len(owners), len(owners)), -1, dtype=np.int32)])
        asked = (records["record"] == "invoke").to_numpy()
        mine = records.select(pl.col("user").fill_null(0) % count).to_series().to_numpy()
        owners[attempt[asked]] = mine[asked]
        owner = owners[attempt]
        if len(owner) and owner.min() < 0:
            raise CannotSlice("a completion stands before its invoke record, or without one")
        placed = records.with_columns(pl.Series(BUCKET, owner, dtype=pl.Int64))
        spool.add(placed)
        matched = records.filter(pl.col("op").is_in(MATCH_OPS))["attempt"]
        known.update(matched.to_list())
        if known:
            commands.append(records.filter(pl.col("attempt").is_in(list(known))))

    known: set[int] = set()
    rows = 0

    def take(part: pl.DataFrame) -> None:
        nonlocal rows
        waiting.append(part)
        rows += part.height
        if rows >= BATCH_ROWS:
            write()
            rows = 0

    report = history.load_parts(folder, take)
    write()
    numbers = pl.DataFrame({"attempt": np.flatnonzero(owners >= 0)}, schema={"attempt": pl.Int64})
    return report, pl.concat(commands) if commands else pl.DataFrame(schema=history.SCHEMA), numbers


_MOST_ATTEMPTS: Final = 2_000_000_000
"""Numbers above this are no counter's."""


def sliced(folder: Path, count: int | None = None) -> "tuple[tempfile.TemporaryDirectory[str], Slices]":
    """Cut a run in a folder of its own, which the caller removes. Raises as `cut` does."""
    place = tempfile.TemporaryDirectory(prefix="ledgerproof-slices-")
    try:
        return place, cut(folder, Path(place.name), count)
    except BaseException:
        place.cleanup()
        raise
