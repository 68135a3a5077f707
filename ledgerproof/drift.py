"""Makes one balance of the read model wrong by a cent, and waits for the service's own reconciliation to say so.

The wallet is nobody else's: it gets one deposit before the load, is read by no client, and its shard is not moved.
The ledger is never touched, so nothing but the reconciler can notice. Its finding pauses the payouts of that server,
as any finding does; once the balance is right again they are resumed. Everything is on the timeline, and whether the
report came in time is the checker's to say (A35), not this module's.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec
import numpy as np

from invariants.run import CLOCK_SLACK_S
from invariants.timeline import Timeline
from ledgerproof import workload
from ledgerproof.collect import NotCollected, auditor
from ledgerproof.workload import Command
from reference import operations
from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.routing import SHARDS, shard_of
from reference.sql import named_blocks
from reference.store import DRIVER_ERRORS, connect, meaning_of

WALLETS_FROM: Final = 9_000
"""The wallet is one of the hundred from here on: of every shard one, and none that the workload uses."""
DEPOSIT_MINOR: Final = 1_000
DRIFT_MINOR: Final = 1
CODE: Final = "PROJECTION_DIFFERS"
"""How the reconciler names what is planted."""
FOLLOWS: Final = frozenset({CODE, "REDIS_DIFFERS"})
"""What a pass may find of the wallet because of it: a projector that gets the deposit's event again puts what it reads
into the cache."""
REQUESTED_BY: Final = "schedule"
"""Only passes of the reconciler's own schedule count."""
PASSES: Final = 3
"""Passes that the reconciler is given: one may be under way, one may find a server that is down."""
GRACE_S: Final = 120.0
"""And what these take on a busy machine. A pass that should have seen the drift and did not ends the wait at once."""
PROJECTED_TIMEOUT_S: Final = 120.0
"""A projector that was only just started may have to wait for its place in the group."""
FRESH_S: Final = 8.0
"""The pass over what is new looks at wallets with new entries: the deposit is younger than this when the drift is
planted, or another one is made."""
DEPOSITS_MAX: Final = 10
POLL_S: Final = 0.5
REPAIR_TRIES: Final = 60
"""Tries, POLL_S apart, to repair and to resume: the server may just have been killed by the nemesis."""
REPAIR_AFTER_S: Final = 4 * CLOCK_SLACK_S
TIMEOUT_MS: Final = 5_000
RESUMED_FOR: Final = "the drift that the run planted is repaired"

log = logging.getLogger("ledgerproof.drift")


class NotPlanted(Exception):
    """The drift could not be planted; the message says why."""


@dataclass(frozen=True)
class PlannedDrift:
    """In whose balance, on which server (an index), and how soon it must be reported (seconds)."""

    user: int
    server: int
    within_s: float


def plan_drift(seed: int, config: ServiceConfig, *, moved_shard: int | None, broken: frozenset[str]) -> PlannedDrift:
    """Draw the wallet from the seed: not of the shard that is moved, on a server no fault breaks if there is one."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0xD1])))
    wallets = [WALLETS_FROM + number for number in range(SHARDS) if shard_of(WALLETS_FROM + number) != moved_shard]
    calm = [user for user in wallets if config.servers[config.routing[shard_of(user)]].name not in broken]
    user = int(rng.choice(calm or wallets))
    return PlannedDrift(user, config.routing[shard_of(user)], PASSES * config.reconcile_every_s + GRACE_S)


class Drift:
    """One planted drift: `plant` before the load, `run` beside it, `over` when it is repaired."""

    def __init__(
        self,
        config: ServiceConfig,
        login: tuple[str, str],
        timeline: Timeline,
        clock: Callable[[], float],
        planned: PlannedDrift,
    ) -> None:
        """`login` is name and password of the servers' superuser, `clock` counts the run's seconds."""
        self._config = config
        self._login = login
        self._timeline = timeline
        self._clock = clock
        self.planned = planned
        self._sql = load_drift_sql()
        self._planted_s: float | None = None
        self._measured_at: datetime | None = None
        self._repaired = False
        self.reported_s: float | None = None
        """When the report was seen, seconds."""
        self.problem: str | None = None
        """What kept the drift from being repaired, if anything did."""

    @property
    def node(self) -> str:
        """The name of the drift's server."""
        return self._config.servers[self.planned.server].name

    async def plant(self, seed: int, post: Callable[[Command], Awaitable[object]]) -> None:
        """Open the wallet by `post`, wait until that is projected, and make the balance wrong. Raises NotPlanted."""
        user = self.planned.user
        for number in range(1, DEPOSITS_MAX + 1):
            began = time.monotonic()
            await post(workload.deposit(user, DEPOSIT_MINOR, f"w{seed}-drift-{number}", "drift"))
            await self._until_projected(number)
            if time.monotonic() - began < FRESH_S:
                break
        else:
            raise NotPlanted(f"none of {DEPOSITS_MAX} deposits of wallet {user} was projected within {FRESH_S:g} s")
        self._planted_s = self._record("drift_planted")
        try:
            done = await self._as_owner("plant", user, DRIFT_MINOR)
        except LedgerError as error:
            raise NotPlanted(f"the balance of wallet {user} could not be made wrong: {error}") from error
        found = await self._projected()
        if not done or found is None or found["balance"] != found["right_balance"] + DRIFT_MINOR:
            raise NotPlanted(f"the balance of wallet {user} was to be wrong by {DRIFT_MINOR} and is not")
        self._record("drift_measured")
        self._measured_at = datetime.now(UTC)

    async def _until_projected(self, seq: int) -> None:
        deadline = time.monotonic() + PROJECTED_TIMEOUT_S
        while (row := await self._projected()) is None or row["seq"] < seq:
            if time.monotonic() > deadline:
                raise NotPlanted(
                    f"the balance of wallet {self.planned.user} was not projected within {PROJECTED_TIMEOUT_S:g} s"
                )
            await asyncio.sleep(POLL_S / 5)

    async def run(self) -> None:
        """Wait for the report, then repair the balance and resume the payouts that it has paused.

        Also repaired when the time of the report is over, or when a pass did not notice what it should have.
        """
        assert self._planted_s is not None, "plant comes first"
        over = False
        while not over and self._clock() < self._planted_s + self.planned.within_s:
            await asyncio.sleep(POLL_S)
            over = await self._passed()
        # A pass that missed it must be seen to have ended before the repair, on clocks that may differ by the slack.
        await asyncio.sleep(REPAIR_AFTER_S)
        await self._repair()

    async def _repair(self) -> None:
        for _ in range(REPAIR_TRIES):
            try:
                await self._repair_once()
                await self._resume()
            except (NotPlanted, LedgerError) as error:
                self.problem = str(error)
                await asyncio.sleep(POLL_S)
            else:
                self.problem = None
                return

    async def _repair_once(self) -> None:
        await self._as_owner("repair", self.planned.user)
        found = await self._projected()
        if found is None or found["balance"] != found["right_balance"]:
            raise NotPlanted(f"the balance of wallet {self.planned.user} is still wrong")
        if not self._repaired:
            self._record("drift_repaired")
            self._repaired = True

    async def _resume(self) -> None:
        gate = await operations.gate_of(self._config, self.planned.server)
        if gate.error is not None:
            raise LedgerError(gate.error)
        if gate.paused and f"wallet {self.planned.user}," in (gate.reason or ""):
            await operations.resume(self._config, self.planned.server, "prove", RESUMED_FOR)

    async def _passed(self) -> bool:
        """Return whether the reconciler has reported the drift, or has passed over it."""
        assert self._measured_at is not None, "plant comes first"
        since = self._measured_at + timedelta(seconds=CLOCK_SLACK_S)
        try:
            async with auditor(self._config, self._config.servers[self.planned.server]) as connection:
                row = await connection.fetchrow(self._sql["passed"], self.planned.user, CODE, REQUESTED_BY, since)
        except NotCollected as error:
            log.info("whether the drift is reported cannot be asked: %s", error)
            return False
        assert row is not None, "a SELECT of two values has a row"
        if row["reported"]:
            self.reported_s = self._clock()
        return bool(row["reported"] or row["due"])

    async def _projected(self) -> asyncpg.Record | None:
        try:
            async with auditor(self._config, self._config.servers[self.planned.server]) as connection:
                return await connection.fetchrow(self._sql["projected"], self.planned.user)
        except NotCollected as error:
            raise NotPlanted(str(error)) from error

    async def _as_owner(self, query: str, *args: object) -> list[asyncpg.Record]:
        server = self._config.servers[self.planned.server]
        connection = await connect(server, *self._login, statement_timeout_ms=TIMEOUT_MS)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(self._sql[query], *args)
        except DRIVER_ERRORS as error:
            raise meaning_of(error) from error
        finally:
            connection.terminate()
        return rows

    def _record(self, kind: str) -> float:
        plan: dict[str, Any] = {
            "user": self.planned.user,
            "code": CODE,
            "within_s": self.planned.within_s,
            "requested_by": REQUESTED_BY,
        }
        return self._timeline.record(kind, node=self.node, detail=msgspec.json.encode(plan).decode())


def load_drift_sql() -> dict[str, str]:
    """Return the named blocks of sql/drift.sql."""
    return named_blocks(Path(__file__).parent / "sql" / "drift.sql")
