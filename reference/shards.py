"""Moves a logical shard of wallets to another server, under load.

    copy       rows that are committed, while clients go on; verified whole: count, sum, chain, checksum
    freeze     one transaction on the old server holds the shard's lock: commands of its wallets wait or are refused
               as not admitted; the rest is copied and verified, and the relay publishes what it has of the shard
    give up    that transaction commits that the shard is not here any more: the one point at which the owner changes
    accept     the new server takes over the copy that it has; any API process that sees this step missing does it
    clear      the projection follows, the old partition is detached and dropped, other servers are told

It promises that no entry is lost, refused or doubled, and that at no time two servers hold the shard. The freeze
ends with its transaction: when the mover dies, is stopped or loses a server, the old server rolls it back by
itself within FREEZE_MAX_MS. A repeated command takes up where the last one ended: before `give up` it begins
anew, after it it goes on.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum

import asyncpg
import msgspec

from reference.cache import Cache
from reference.config import ServiceConfig
from reference.errors import LedgerError, ServerUnavailable
from reference.failpoints import hit_async
from reference.sql import load_sql
from reference.store import DRIVER_ERRORS, SHARD_CLASS, connect, meaning_of

MOVER_CLASS = 10
"""First half of the advisory lock keys of movers; a mover holds its shard's on every server it reaches."""
STATEMENT_TIMEOUT_MS = 600_000
"""No copy of a shard's table takes longer; only the freeze is bounded tightly."""
LOCK_TIMEOUT_MS = 30_000
FREEZE_MAX_MS = 5_000
"""The old server ends a freeze that takes longer, whatever became of the mover."""
FREEZE_TRY_MS = 1_200
"""A mover that has not got the rest copied, published and projected within this time lets go and tries again. With
what follows it stays below a command's deadline, so that clients wait and need not be refused."""
FREEZE_TRIES = 10
FREEZE_PAUSE_S = 0.5
PASSES_MAX = 5
"""Copies of what came during the last copy, before the shard is frozen."""
SMALL_PASS_ROWS = 2_000
BACKLOG_WAIT_S = 30.0
REDIS_WAIT_S = 15.0
"""Before the freeze, and again once the shard has moved, a Redis that is restarting or hangs is waited for."""
BACKLOG_AGE_MS = 1_000
"""Before the shard is frozen, its events of more than this age must be in Kafka; the relay gets 30 s for it."""
ACCEPT_WITHIN_S = 60.0
"""A new server that dies at the wrong moment has this long to come back while the command waits."""
CLOCKS_APART_S = 1.0
"""A new server whose clock is behind by more is not waited for."""
RETRY_S = 0.25
POLL_S = 0.005
PIPE_CHUNKS = 16
DELETE_ROWS = 10_000

MOVED = {"ledger": ("wallet_ledger", "amount"), "bets": ("bets", "reserve"), "refusals": ("refusals", "shard")}
"""What moves with its rows: the table, and a column of numbers whose sum is compared."""


READ_MODEL = {"projection": "wallet_balance_projection", "stats": "wallet_stats"}
"""What follows from the entries and moves with them, so that reads cost and say the same on the new server."""


class Phase(StrEnum):
    """How far a move is; each is told when it has been reached."""

    LOCKED = "locked"
    STAGED = "staged"
    COPIED = "copied"
    VERIFIED = "verified"
    FROZEN = "frozen"
    PREPARED = "prepared"
    GIVEN_UP = "given up"
    ACCEPTED = "accepted"
    PROJECTED = "projected"
    DETACHED = "detached"
    CLEARED = "cleared"


class MoveRefused(LedgerError):
    """The shard was not moved and is where it was; the message says why."""


class MoveUnfinished(LedgerError):
    """The move got stuck half way; no wallet is in danger. Repeating the command goes on with it."""


class Moved(msgspec.Struct, frozen=True):
    """What a command did. Times in ms; `freeze_ms` is how long the shard took no commands, 0 if it was not moved."""

    shard: int
    source: str
    target: str
    epoch: int
    moved: bool
    """False: the shard was on the target already."""
    resumed: bool
    """An earlier, interrupted move was brought to its end or taken back first."""
    entries: int = 0
    bets: int = 0
    refusals: int = 0
    frozen_rows: int = 0
    """Rows that were copied while the shard was frozen."""
    freeze_ms: float = 0.0
    freezes: int = 0
    """Attempts; all but the last were let go because the relay was behind."""
    total_ms: float = 0.0


class ShardView(msgspec.Struct, frozen=True):
    """Where a shard is. `entries` is the planner's estimate."""

    shard: int
    server: str | None
    """None while it is between servers."""
    epoch: int
    entries: int
    bytes: int
    problem: str | None = None


@dataclass
class _Server:
    name: str
    index: int
    main: asyncpg.Connection
    """Holds the mover's lock."""
    side: asyncpg.Connection


def _nothing(_: Phase) -> None:
    """Tell nobody."""


async def list_shards(config: ServiceConfig, login: tuple[str, str]) -> list[ShardView]:
    """Return where every shard is, and what is wrong with those that are between servers or left copies behind.

    `login` is name and password of the servers' superuser.

    Raises MoveRefused if a server cannot be asked: then the list would not be the truth.
    """
    sql = load_sql("shards")
    claims: dict[int, list[tuple[str, asyncpg.Record]]] = {}
    sizes: dict[int, asyncpg.Record] = {}
    for server in config.servers:
        try:
            connection = await connect(server, *login, statement_timeout_ms=LOCK_TIMEOUT_MS)
        except ServerUnavailable as error:
            raise MoveRefused(f"{error}; start it, or list again when it is back") from error
        try:
            for row in await connection.fetch(sql["routes"]):
                claims.setdefault(row["shard"], []).append((server.name, row))
            sizes |= {row["shard"]: row for row in await connection.fetch(sql["sizes"])}
        finally:
            connection.terminate()
    return [_view(shard, rows, sizes.get(shard)) for shard, rows in sorted(claims.items())]


def _view(shard: int, rows: Sequence[tuple[str, asyncpg.Record]], size: asyncpg.Record | None) -> ShardView:
    holders = [name for name, row in rows if row["here"]]
    _, newest = max(rows, key=lambda item: int(item[1]["epoch"]))
    problem = None
    if not holders:
        problem = f"between servers: repeat `ledgerproof shards move --shard {shard} --to {newest['server_name']}`"
    elif len(holders) > 1:
        problem = f"two owners: {', '.join(holders)}; stop the service"
    else:
        copies = [name for name, row in rows if row["copied"] and not row["here"]]
        if copies:
            problem = (
                f"a copy on {', '.join(copies)}: a move is under way, or was interrupted and "
                f"`ledgerproof shards move --shard {shard} --to {holders[0]}` clears it"
            )
    return ShardView(
        shard,
        holders[0] if len(holders) == 1 else None,
        newest["epoch"],
        size["entries"] if size else 0,
        size["bytes"] if size else 0,
        problem,
    )


async def move_shard(
    config: ServiceConfig,
    login: tuple[str, str],
    shard: int,
    target: int,
    reached: Callable[[Phase], None] = _nothing,
) -> Moved:
    """Move a shard to the server with the index `target` and say what was done; `reached` is told each phase.

    `login` is name and password of the servers' superuser.
    Raises MoveRefused when nothing was moved, and MoveUnfinished when the command has to be repeated.
    """
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        try:
            move = _Move(config, login, shard, stack, reached)
            done = await move.run(target)
        except (ExceptionGroup, *DRIVER_ERRORS) as error:
            first: BaseException = error
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            if isinstance(first, LedgerError):
                raise first from error
            raise MoveUnfinished(f"{meaning_of(first)}; repeat the command to finish or take back the move") from error
    return msgspec.structs.replace(done, total_ms=round((time.monotonic() - began) * 1000, 1))


class _Move:
    """One command: its connections, and what it has copied."""

    def __init__(
        self,
        config: ServiceConfig,
        login: tuple[str, str],
        shard: int,
        stack: AsyncExitStack,
        reached: Callable[[Phase], None],
    ) -> None:
        self._config = config
        self._login = login
        self._shard = shard
        self._stack = stack
        self._reached = reached
        self._sql = load_sql("shards")
        self._servers: dict[int, _Server] = {}
        self._columns: dict[str, list[str]] = {}
        self._given_up = False
        self._cache = Cache(config)
        self._fenced: set[str] = set()
        """Servers whose cache has begun a new epoch for this move."""
        stack.push_async_callback(self._cache.close)

    async def run(self, target: int) -> Moved:
        """Bring an earlier move to its end, then move the shard unless it is there."""
        await self._connect_all(target)
        self._reached(Phase.LOCKED)
        owner, epoch, resumed = await self._owner()
        for index in self._servers:
            if index != owner:
                resumed = await self._clear(index, owner) or resumed
        names = [server.name for server in self._config.servers]
        if owner == target:
            await self._tell(owner, epoch)
            return Moved(self._shard, names[owner], names[target], epoch, moved=False, resumed=resumed)
        source, goal = self._servers[owner], self._servers[target]
        try:
            moved = await self._copy_and_freeze(source, goal, epoch)
        except BaseException:
            if not self._given_up:
                with contextlib.suppress(*DRIVER_ERRORS):
                    await self._discard(source, goal)
            raise
        await hit_async("shards.after_accept_before_clear")
        await self._clear(owner, target)
        await self._tell(target, epoch + 1)
        self._reached(Phase.CLEARED)
        return msgspec.structs.replace(moved, resumed=resumed)

    # -- who is who ------------------------------------------------------------------------------------

    async def _connect_all(self, target: int) -> None:
        """Connect to every server there is and take the mover's lock of the shard on each, in ascending order."""
        for index, server in enumerate(self._config.servers):
            try:
                main, side = await self._connect(index), await self._connect(index)
            except ServerUnavailable as error:
                if index == target:
                    raise MoveRefused(f"{error}; start it first") from error
                continue
            if not await main.fetchval(self._sql["mover_lock"], MOVER_CLASS, self._shard):
                raise MoveRefused(f"another command is moving shard {self._shard}; wait for it or end it")
            self._servers[index] = _Server(server.name, index, main, side)
        goal = self._servers[target].main
        for table in [*(table for table, _ in MOVED.values()), *READ_MODEL.values()]:
            columns = [await server.main.fetchval(self._sql["columns"], table) for server in self._servers.values()]
            self._columns[table] = await goal.fetchval(self._sql["columns"], table)
            if any(sorted(found) != sorted(self._columns[table]) for found in columns):
                raise MoveRefused(f"{table} has other columns on another server: bring all to one version first")

    async def _connect(self, index: int) -> asyncpg.Connection:
        server = self._config.servers[index]
        connection = await connect(server, *self._login, statement_timeout_ms=STATEMENT_TIMEOUT_MS)
        self._stack.callback(connection.terminate)
        # A machine that vanishes without a word must not keep a lock; and a lock not got soon is not waited for.
        await connection.execute(
            f"SET lock_timeout = {LOCK_TIMEOUT_MS}; SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 1; "
            "SET tcp_keepalives_count = 5; SET client_min_messages = warning"
        )
        return connection

    async def _owner(self) -> tuple[int, int, bool]:
        """Return who holds the shard, its epoch, and whether a server had to be made to take over."""
        rows = {
            index: next(row for row in await server.main.fetch(self._sql["routes"]) if row["shard"] == self._shard)
            for index, server in self._servers.items()
        }
        holders = [(index, row["epoch"]) for index, row in rows.items() if row["here"]]
        if len(holders) == 1:
            return holders[0][0], holders[0][1], False
        if holders:
            names = ", ".join(self._servers[index].name for index, _ in holders)
            raise MoveRefused(f"shard {self._shard} is on {names} at once: stop the service and look at both")
        newest = max(rows.values(), key=lambda row: int(row["epoch"]))
        heir = next((index for index in self._servers if self._servers[index].name == newest["server_name"]), None)
        if heir is None:
            raise MoveRefused(f"shard {self._shard} is on {newest['server_name']}, which cannot be reached: start it")
        if not await self._servers[heir].main.fetchval(self._sql["accept"], self._shard, newest["epoch"]):
            raise MoveRefused(
                f"no server that can be reached holds shard {self._shard}; start every server and repeat the command"
            )
        self._reached(Phase.ACCEPTED)
        return heir, newest["epoch"], True

    # -- copy ------------------------------------------------------------------------------------------

    async def _copy_and_freeze(self, source: _Server, target: _Server, epoch: int) -> Moved:
        await target.main.execute(self._text("stage"))
        self._reached(Phase.STAGED)
        # All tables as of one moment: what comes later is told apart by the newest seq that was copied.
        async with source.main.transaction(isolation="repeatable_read"):
            for name, (table, _) in MOVED.items():
                query = self._text(f"all_{name}", table)
                await self._pipe(source.main, query, target.main, self._place(table), self._columns[table])
        self._reached(Phase.COPIED)
        await self._catch_up(source, target)
        self._reached(Phase.VERIFIED)
        if not await self._published(source, time.monotonic() + BACKLOG_WAIT_S, BACKLOG_AGE_MS):
            raise MoveRefused(
                f"the relay of {source.name} has not published the events of shard {self._shard} for "
                f"{BACKLOG_WAIT_S:g} s: is Kafka well, and the relay?"
            )
        await hit_async("shards.after_copy_before_freeze")
        # Nothing may count that the cache kept from an earlier stay of the shard on its new server.
        if not await self._fence_cache(target, REDIS_WAIT_S):
            raise MoveRefused(
                f"Redis does not answer for {REDIS_WAIT_S:g} s, and what it may keep of the shard must not count: "
                "start it and try again"
            )
        for attempt in range(1, FREEZE_TRIES + 1):
            await self._send_marks(target, source)
            if not await self._projected(source, BACKLOG_WAIT_S):
                raise MoveRefused(
                    f"the projection of shard {self._shard} is behind for {BACKLOG_WAIT_S:g} s: is the projector well?"
                )
            await self._copy_read_model(source, target)
            frozen = await self._freeze(source, target, epoch)
            if frozen is not None:
                freeze_ms, copied = frozen
                rows = {name: await self._sum(target, name, "all", "count") for name in MOVED}
                return Moved(
                    self._shard,
                    source.name,
                    target.name,
                    epoch + 1,
                    moved=True,
                    resumed=False,
                    entries=rows["ledger"]["rows"],
                    bets=rows["bets"]["rows"],
                    refusals=rows["refusals"]["rows"],
                    frozen_rows=copied,
                    freeze_ms=round(freeze_ms, 1),
                    freezes=attempt,
                )
            await asyncio.sleep(FREEZE_PAUSE_S)
        raise MoveRefused(
            f"the events of shard {self._shard} were not published and projected within {FREEZE_TRY_MS} ms, "
            f"{FREEZE_TRIES} times over: are Kafka, the relay and the projector well, or is there too much load?"
        )

    async def _catch_up(self, source: _Server, target: _Server) -> None:
        """Copy what came during the copy until that is little, and verify every row that is there by then."""
        for left in reversed(range(PASSES_MAX)):
            await self._send_marks(target, source)
            async with source.main.transaction(isolation="repeatable_read"):
                if await self._copy_new(source, target) > SMALL_PASS_ROWS and left:
                    continue
                for name in MOVED:
                    await self._compare(name, "all", "total", (source, target))
            if breaks := await target.main.fetchval(self._text("breaks")):
                raise MoveRefused(f"{breaks} entries of shard {self._shard} do not continue the one before them")
            return

    async def _send_marks(self, holder: _Server, other: _Server) -> None:
        """Tell `other` what `holder` has already of the shard, in temporary tables of its main connection."""
        await other.main.execute(self._sql["make_marks"])
        await self._pipe(holder.main, self._text("read_heads"), other.main, "heads", ["user_id", "seq"])
        keys = ["user_id", "idempotent_key"]
        await self._pipe(holder.main, self._text("read_keys"), other.main, "keys", keys)
        await other.main.execute("ANALYZE heads; ANALYZE keys")

    async def _copy_new(self, source: _Server, target: _Server) -> int:
        """Copy, verify and commit what the target has not by its marks. Returns the number of rows."""
        rows = 0
        await target.main.execute(self._sql["make_incoming"])
        for name, (table, _) in MOVED.items():
            query = self._text(f"new_{name}", table)
            await self._pipe(source.main, query, target.main, f"incoming_{name}", self._columns[table])
        async with target.main.transaction():
            for name, (table, _) in MOVED.items():
                rows += (await self._compare(name, "new", "total", (source, target), "incoming"))["rows"]
                await target.main.execute(self._text(f"add_{name}", table))
            if breaks := await target.main.fetchval(self._text("new_breaks")):
                raise MoveRefused(f"{breaks} new entries of shard {self._shard} do not continue the one before them")
        return rows

    # -- freeze ----------------------------------------------------------------------------------------

    async def _freeze(self, source: _Server, target: _Server, epoch: int) -> tuple[float, int] | None:
        """Freeze the shard, copy the rest, change its owner; None if the relay was too slow and all is as it was.

        Returns how long the shard took no commands, in ms, and how many rows were copied meanwhile.
        """
        # The table lock that taking over needs is got before the freeze, so that nothing is waited for in it.
        await target.side.execute("BEGIN; LOCK TABLE wallet_ledger IN SHARE UPDATE EXCLUSIVE MODE")
        began = time.monotonic()
        await source.main.execute(
            f"BEGIN; SET LOCAL transaction_timeout = {FREEZE_MAX_MS}; SET LOCAL lock_timeout = {FREEZE_TRY_MS}"
        )
        try:
            try:
                await source.main.execute(self._sql["freeze"], SHARD_CLASS, self._shard)
            except asyncpg.LockNotAvailableError:
                return None
            self._reached(Phase.FROZEN)
            async with asyncio.TaskGroup() as group:
                published = group.create_task(self._published(source, began + FREEZE_TRY_MS / 1000))
                copying = group.create_task(self._copy_rest(source, target))
            if not published.result() or not await self._projected_rest(source, target, began + FREEZE_TRY_MS / 1000):
                return None
            await hit_async("shards.after_freeze_before_give_up")
            await self._give_up(source, target, epoch)
        finally:
            if not self._given_up:
                for connection in (source.main, target.side):
                    with contextlib.suppress(*DRIVER_ERRORS):
                        await connection.execute("ROLLBACK")
        await hit_async("shards.after_give_up_before_accept")
        # What readers with old routes find in the cache was written before; what is written after counts no more. The
        # shard has no owner now, so a Redis in trouble is asked once here, and waited for when the shard is cleared.
        await self._fence_cache(source, 0.0)
        await self._accept(target, epoch + 1)
        return (time.monotonic() - began) * 1000, copying.result()

    async def _copy_rest(self, source: _Server, target: _Server) -> int:
        """Copy what came since the last pass and compare the whole: what is counted now cannot change any more."""
        copied = await self._copy_new(source, target)
        for name in MOVED:
            await self._compare(name, "all", "count", (source, target))
        return copied

    async def _projected(self, source: _Server, within_s: float) -> bool:
        """Wait until the projection has every entry that the target has; return whether that happened in time."""
        deadline = time.monotonic() + within_s
        while await source.main.fetchval(self._text("unprojected")):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(10 * POLL_S)
        return True

    async def _projected_rest(self, source: _Server, target: _Server, deadline: float) -> bool:
        """Wait until the projection has the entries copied last, and copy their wallets' rows after it.

        The new server's progress says nothing of events that the old one's relay sent: its projection must be
        complete in them when it takes over, or it would look fresher than it is.
        """
        heads = await target.main.fetch(self._sql["incoming_heads"])
        users, seqs = [row["user_id"] for row in heads], [row["seq"] for row in heads]
        while await source.side.fetchval(self._text("unprojected_of"), users, seqs):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        table = READ_MODEL["projection"]
        rows = await source.side.fetch(self._text("some_projection", table), users)
        await target.main.execute(self._sql["make_incoming_projection"])
        await target.main.copy_records_to_table(
            "incoming_projection", records=[tuple(row) for row in rows], columns=self._columns[table]
        )
        await target.main.execute(self._text("merge_projection", table))
        return True

    async def _fence_cache(self, server: _Server, within_s: float) -> bool:
        """Begin a new epoch of a server's cache, so that nothing of before counts; return whether Redis did so."""
        if not await self._cache.fence(server.name, within_s):
            return False
        self._fenced.add(server.name)
        return True

    async def _give_up(self, source: _Server, target: _Server, epoch: int) -> None:
        """Commit on the old server that the shard is the new one's, which has its copy by then and is told so."""
        done = await target.main.execute(self._sql["prepare"], self._shard, epoch + 1)
        if done != "UPDATE 1":
            raise MoveRefused(f"{target.name} holds shard {self._shard} already, or knows of a later move")
        await self._wait_for_clock(source, target)
        self._reached(Phase.PREPARED)
        done = await source.main.execute(self._sql["give_up"], self._shard, target.name, epoch)
        if done != "UPDATE 1":
            raise MoveRefused(f"{source.name} does not hold shard {self._shard} any more")
        # From here on the copy may be the only one that counts, whatever is heard of the commit.
        self._given_up = True
        try:
            await source.main.execute("COMMIT")
        except DRIVER_ERRORS as error:
            raise MoveUnfinished(
                f"{source.name} broke off while it gave shard {self._shard} up ({error}); repeat the command"
            ) from error
        self._reached(Phase.GIVEN_UP)

    async def _wait_for_clock(self, source: _Server, target: _Server) -> None:
        """Wait until the new server's clock has passed the old one's, so that no wallet's entries go back in time."""
        query = "SELECT clock_timestamp()"
        ahead_s = (await source.main.fetchval(query) - await target.main.fetchval(query)).total_seconds()
        if ahead_s > CLOCKS_APART_S:
            raise MoveRefused(f"the clock of {source.name} is {ahead_s:.1f} s ahead of that of {target.name}: set it")
        await asyncio.sleep(max(0.0, ahead_s))

    async def _accept(self, target: _Server, epoch: int) -> None:
        """Let the new server take over; if it died just now, wait for it and let it do so then."""
        deadline = time.monotonic() + ACCEPT_WITHIN_S
        connection = target.side
        while True:
            try:
                taken = await connection.fetchval(self._sql["accept"], self._shard, epoch)
                await connection.execute("COMMIT")
                break
            except (LedgerError, *DRIVER_ERRORS) as error:
                if time.monotonic() > deadline:
                    raise MoveUnfinished(
                        f"{target.name} has the only copy of shard {self._shard} and does not take it over ({error}): "
                        "start it and repeat the command"
                    ) from error
            await asyncio.sleep(RETRY_S)
            with contextlib.suppress(LedgerError):
                target.main, target.side = await self._connect(target.index), await self._connect(target.index)
                await target.main.fetchval(self._sql["mover_lock"], MOVER_CLASS, self._shard)
                connection = target.side
        if not taken:
            raise MoveUnfinished(f"{target.name} has no copy of shard {self._shard} to take over; repeat the command")
        self._reached(Phase.ACCEPTED)

    async def _published(self, source: _Server, deadline: float, older_than_ms: int = 0) -> bool:
        """Wait until the shard's events of a certain age are in Kafka; return whether that happened in time.

        Later events of its wallets come from another server's relay: these must be in their topics before.
        """
        while await source.side.fetchval(self._text("unpublished"), older_than_ms):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    # -- clear -----------------------------------------------------------------------------------------

    async def _clear(self, index: int, owner: int) -> bool:
        """Remove what a server keeps of a shard that is another's; return whether there was anything."""
        old, holder = self._servers[index], self._servers[owner]
        attached = await old.main.fetchval(self._text("attachment"))
        if attached is None and not await old.main.fetchval(self._text("remains")):
            return False
        if old.name not in self._fenced and not await self._fence_cache(old, REDIS_WAIT_S):
            raise MoveUnfinished(
                f"Redis does not answer for {REDIS_WAIT_S:g} s, and what it keeps of shard {self._shard} from "
                f"{old.name} must not count any more: start it and repeat the command"
            )
        await old.main.execute(self._sql["unprepare"], self._shard)
        async with old.main.transaction():
            await old.main.execute(self._sql["projection_barrier"])
        await self._copy_read_model(old, holder)
        if attached is not None:
            await self._send_marks(old, holder)
            for name in MOVED:
                # Nothing is dropped that its owner has not got, to the last byte.
                await self._compare(name, "all", "total", (old, holder), "known")
        self._reached(Phase.PROJECTED)
        if attached == "yes":
            await old.main.execute(self._text("detach"))
        elif attached == "pending":
            await old.main.execute(self._text("finish_detach"))
        self._reached(Phase.DETACHED)
        if attached is not None:
            await old.main.execute(self._text("drop"))
        await self._delete_rows(old)
        return True

    async def _copy_read_model(self, source: _Server, target: _Server) -> None:
        """Bring projection and statistics over; a row of the target that is newer wins."""
        await target.main.execute(self._sql["make_incoming_projection"])
        for name, table in READ_MODEL.items():
            query = self._text(f"all_{name}", table)
            await self._pipe(source.side, query, target.main, f"incoming_{name}", self._columns[table])
            await target.main.execute(self._text(f"merge_{name}", table))

    async def _delete_rows(self, server: _Server) -> None:
        for name in ("delete_bets", "delete_refusals", "delete_projection", "delete_stats", "delete_rebuilds"):
            while await server.main.execute(self._text(name), DELETE_ROWS) == f"DELETE {DELETE_ROWS}":
                continue

    async def _discard(self, source: _Server, target: _Server) -> None:
        """Take back a copy that never counted. What cannot be removed now, the next command removes."""
        rows = await source.side.fetch(self._sql["routes"])
        if self._given_up or not next(row["here"] for row in rows if row["shard"] == self._shard):
            return
        await target.main.execute("ROLLBACK")
        await target.main.execute(self._sql["unprepare"], self._shard)
        if await target.main.fetchval(self._text("attachment")) == "no":
            await target.main.execute(self._text("drop"))
        await self._delete_rows(target)

    async def _tell(self, owner: int, epoch: int) -> None:
        """Tell the other servers where the shard is, so that a process learns it from any of them."""
        name = self._servers[owner].name
        for index, server in self._servers.items():
            if index != owner:
                await server.main.execute(self._sql["tell"], self._shard, name, epoch)

    # -- statements ------------------------------------------------------------------------------------

    def _text(self, name: str, table: str | None = None, **parts: str) -> str:
        """Return a statement with its shard and columns; both come from the schema and from nobody's input."""
        text = self._sql[name]
        for part, value in parts.items():
            text = text.replace(f"{{{part}}}", value)
        if table is not None:
            columns = self._columns[table]
            text = text.replace("{names}", ", ".join(f'"{column}"' for column in columns))
            text = text.replace("{columns}", ", ".join(f't."{column}"' for column in columns))
        return text.replace("{shard}", str(self._shard))

    def _place(self, table: str) -> str:
        return f"wallet_ledger_{self._shard}" if table == "wallet_ledger" else table

    async def _compare(
        self, name: str, which: str, how: str, servers: tuple[_Server, _Server], theirs: str | None = None
    ) -> asyncpg.Record:
        """Count and add up the same rows on both servers; raises MoveRefused if they differ."""
        source, target = servers
        ours, found = await asyncio.gather(
            self._sum(source, name, which, how), self._sum(target, name, theirs or which, how)
        )
        if ours != found:
            raise MoveRefused(
                f"{name} of shard {self._shard} differ: {source.name} has {dict(ours)}, {target.name} {dict(found)}"
            )
        return ours

    async def _sum(self, server: _Server, name: str, which: str, how: str) -> asyncpg.Record:
        table, amount = MOVED[name]
        rows = self._sql[f"{which}_{name}"]
        row = await server.main.fetchrow(self._text(how, table, rows=rows, amount=amount))
        assert row is not None, "an aggregate has one row"
        return row

    async def _pipe(
        self,
        source: asyncpg.Connection,
        query: str,
        target: asyncpg.Connection,
        table: str,
        columns: Sequence[str],
    ) -> None:
        """Copy the rows of a query into a table of another server, a few chunks at a time in memory."""
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue(PIPE_CHUNKS)

        async def read() -> None:
            await source.copy_from_query(query, output=chunks.put, format="binary")
            await chunks.put(None)

        async def write() -> AsyncIterator[bytes]:
            while (chunk := await chunks.get()) is not None:
                yield chunk

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(target.copy_to_table(table, source=write(), columns=list(columns), format="binary"))
