"""The reconciler's process: passes by its schedule, and what the results stored on the servers say as metrics.

The results are in tables, so that a pass which an operator ran shows in the same metrics, and a restart forgets
nothing.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime

from croniter import croniter

from reference import metrics
from reference.config import ConfigError, ServiceConfig
from reference.errors import LedgerError
from reference.reconciliation import ROLE, Kind, Pass
from reference.service import always_ready, run_worker
from reference.sql import load_sql
from reference.store import Store

log = logging.getLogger("ledgerproof.reconciler")

TICK_S = 0.5
SHOW_EVERY_S = 1.0
"""How often the metrics are read from the tables."""


class Schedule:
    """When the next passes are due: FULL by the clock on the wall, INCREMENTAL by a steady one."""

    def __init__(self, config: ServiceConfig, now: datetime, steady_s: float) -> None:
        """Begin at `now` (UTC). Raises ConfigError if the line of the full pass is not one."""
        if config.reconcile_full_at and not croniter.is_valid(config.reconcile_full_at):
            raise ConfigError(f"reconcile_full_at is not a cron line: {config.reconcile_full_at!r}")
        self._line = config.reconcile_full_at
        self._every_s = config.reconcile_every_s
        self._full_at = self._after(now)
        self._incremental_at = steady_s + self._every_s

    def _after(self, now: datetime) -> datetime | None:
        return croniter(self._line, now).get_next(datetime) if self._line else None

    def missed(self, now: datetime, last_full: datetime | None) -> bool:
        """Return whether a full pass was due since the last one, as after a stop over night. False before the first."""
        if not self._line or last_full is None:
            return False
        previous: datetime = croniter(self._line, now).get_prev(datetime)
        return last_full < previous

    def make_up(self, now: datetime) -> None:
        """Let a full pass be due at once."""
        self._full_at = now

    def due(self, now: datetime, steady_s: float) -> Kind | None:
        """Return the pass that is due, and plan the next one of its kind. Missed ones are not made up one by one."""
        if self._full_at is not None and now >= self._full_at:
            self._full_at = self._after(now)
            self._incremental_at = steady_s + self._every_s
            return Kind.FULL
        if self._every_s and steady_s >= self._incremental_at:
            self._incremental_at = steady_s + self._every_s
            return Kind.INCREMENTAL
        return None


class Reconciler:
    """Runs passes when they are due, one at a time, and shows the state of every server."""

    def __init__(self, config: ServiceConfig, store: Store, schedule: Schedule) -> None:
        self._config = config
        self._store = store
        self._schedule = schedule
        self._asked_for_missed = False
        self._shown_at = 0.0

    async def run_once(self, stopping: asyncio.Event) -> None:
        """Run a pass if one is due, else wait a moment; refresh the metrics. `stopping` ends a pass at once."""
        if time.monotonic() - self._shown_at >= SHOW_EVERY_S:
            await self._show()
            self._shown_at = time.monotonic()
        kind = self._schedule.due(datetime.now(UTC), time.monotonic())
        waiter = asyncio.ensure_future(stopping.wait())
        try:
            if kind is None:
                await asyncio.wait([waiter], timeout=TICK_S)
                return
            work = asyncio.ensure_future(Pass(self._config, kind, "schedule").run(wait=False))
            try:
                await asyncio.wait([work, waiter], return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not work.done():
                    work.cancel()
                await asyncio.wait([work])
            if not work.cancelled():
                report = work.result()
                if report is None:
                    log.info("%s pass left out: another one is at work", kind.value)
                else:
                    log.info("%s pass: %d findings in %.1f s", kind.value, report.findings, report.seconds)
        finally:
            waiter.cancel()

    async def _show(self) -> None:
        """Set the gauges of every server that answers; the others keep their last values."""
        last_full: datetime | None = None
        query = load_sql("reconciler")["summary"]
        for index, server in enumerate(self._config.servers):
            try:
                async with self._store.connection(index) as connection:
                    (row,) = await connection.fetch(query)
            except LedgerError as error:
                log.debug("no summary of %s: %s", server.name, error)
                continue
            metrics.RECONCILIATION_MISMATCH.labels(server.name).set(row["mismatches"])
            metrics.DUPLICATE_ENTRIES.labels(server.name).set(row["duplicates"])
            metrics.PAYOUTS_PAUSED.labels(server.name).set(row["paused"])
            metrics.DB_CONNECTIONS.labels(server.name).set(row["connections"])
            for state in ("held", "awaited"):
                metrics.DB_LOCKS.labels(server.name, state).set(row[f"locks_{state}"])
            for kind, column in ((Kind.FULL, "full_at"), (Kind.INCREMENTAL, "incremental_at")):
                metrics.RECONCILIATION_LAST.labels(server.name, kind.value).set(row[column])
            if row["full_at"]:
                at = datetime.fromtimestamp(row["full_at"], UTC)
                last_full = at if last_full is None else min(at, last_full)
        if not self._asked_for_missed:
            self._asked_for_missed = True
            now = datetime.now(UTC)
            if self._schedule.missed(now, last_full):
                log.info("the full pass that was due while nobody ran is made up for now")
                self._schedule.make_up(now)


async def run(config: ServiceConfig, name: str, port: int, stopping: asyncio.Event) -> None:
    """Reconcile until `stopping`. Raises ConfigError for a schedule that is none."""
    store = Store(config, ROLE)
    reconciler = Reconciler(config, store, Schedule(config, datetime.now(UTC), time.monotonic()))
    log.info(
        "%s: full passes at %r UTC, incremental every %g s", name, config.reconcile_full_at, config.reconcile_every_s
    )
    try:
        await run_worker(port, lambda: reconciler.run_once(stopping), always_ready, stopping)
    finally:
        await store.close()
