"""The one door to Postgres: connections per server and role, and what a failure on them means.

A failure is translated once, here: refused before anything was sent (`ServerUnavailable`), answered with an
error and so rolled back (`NotPosted`), or broken in between (`UnknownOutcome`).

Which server holds a wallet can change while the process runs. What a process knows of that is only a cache: a
server that does not hold a wallet's shard says so instead of answering, and the caller then asks again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import asyncpg

from reference import metrics
from reference.config import ServerConfig, ServiceConfig
from reference.errors import LedgerError, NotPosted, PayoutsPaused, ServerUnavailable, ShardNotHere, UnknownOutcome
from reference.failpoints import hit_async
from reference.routing import SHARD_NOT_HERE, SHARDS, shard_of, shard_of_match
from reference.sql import load_sql

log = logging.getLogger("ledgerproof.store")

CONNECT_TIMEOUT_S = 1.0
HANG_UP_TIMEOUT_S = 1.0
POOL_SIZE = 4
LEADER_CLASS = 7
"""First half of the two-part advisory lock keys of leaders; wallet locks use the one-part key space."""
SHARD_CLASS = 9
"""First half of the keys that lock a shard: shared by who posts to it (ledger_post), exclusive by who freezes it."""
ROUTES_TIMEOUT_S = 1.0
"""A server that does not say within this time what it holds is not waited for."""
LEARN_EVERY_S = 1.0
"""Routes are asked for in the background this often at most, while a server cannot be reached."""
ACCEPTING_ROLE = "ledger_api"
"""Processes of this role let a server take over a shard whose mover died in between."""
MOVING_RETRY_S = 0.03
MOVING_WAITERS_MAX = 4096
"""Calls of one process that wait for shards being moved; more are refused at once."""

_Result = TypeVar("_Result")

PAYOUTS_PAUSED = "LP001"
"""The error code by which `payouts_open` refuses."""

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""What connecting and statements raise. The driver's own confusion is one of them: seen where a server was stopped
in the middle of an answer, it says no more about the outcome than a broken connection does."""
# Errors a server sends while it dies or is killed: the transaction may have committed just before.
_DYING = (
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
)
_BROKEN = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    *_DYING,
)


def meaning_of(error: BaseException) -> LedgerError:
    """Translate a driver's exception raised by a statement that was sent into ours."""
    if isinstance(error, LedgerError):
        return error
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate == SHARD_NOT_HERE:
        return ShardNotHere(str(error))
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate == PAYOUTS_PAUSED:
        return PayoutsPaused(str(error))
    if isinstance(error, asyncpg.DataError):
        # The driver refused to encode an argument (an InterfaceError too): nothing was sent.
        return NotPosted(f"{type(error).__name__}: {error}")
    if isinstance(error, _BROKEN):
        return UnknownOutcome(f"{type(error).__name__}: {error}")
    return NotPosted(f"{type(error).__name__}: {error}")


_KEYED_ROLES = frozenset({"ledger_api", "ledger_relay", "ledger_matcher", "ledger_settler", "ledger_projector"})
"""Roles whose every statement looks rows up by a key: none of them may read a whole table."""
_KEYED_PLANS = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
"""Kept out of the planner's choice: a plan made while a table was empty stays in use while it grows, and then each
batch of the matcher read all orders there were (decision 0028)."""


async def connect(
    server: ServerConfig, role: str, password: str, *, statement_timeout_ms: int, database: str | None = None
) -> asyncpg.Connection:
    """Open one connection. Raises ServerUnavailable if the server cannot be reached or refuses."""
    try:
        await hit_async("store.before_connect")
        return await asyncpg.connect(
            host=server.host,
            port=server.port,
            user=role,
            password=password,
            database=database or server.database,
            timeout=CONNECT_TIMEOUT_S,
            server_settings={
                "application_name": role,
                "statement_timeout": str(statement_timeout_ms),
                "plan_cache_mode": "force_generic_plan",
                **(_KEYED_PLANS if role in _KEYED_ROLES else {}),
            },
        )
    except DRIVER_ERRORS as error:
        raise ServerUnavailable(f"{server.name} at {server.host}:{server.port}: {error}") from error


class Routes:
    """Which server holds each shard of wallets, as far as this process knows: of two claims the higher epoch counts."""

    def __init__(self, config: ServiceConfig) -> None:
        self._index = {server.name: index for index, server in enumerate(config.servers)}
        self.table = list(config.routing)
        self._epochs = [0] * SHARDS
        self.complete = False
        """Every server has said what it holds at least once."""

    def learn(self, shard: int, server_name: str, epoch: int) -> bool:
        """Take a server's word for where a shard is; return whether that is news. Unknown servers are ignored."""
        if epoch <= self._epochs[shard] or server_name not in self._index:
            return False
        self._epochs[shard] = epoch
        self.table[shard] = self._index[server_name]
        return True

    def epoch(self, shard: int) -> int:
        """Return how often the shard was moved, as far as known."""
        return self._epochs[shard]

    def shards_of(self, server: int) -> list[int]:
        """Return the shards that a server holds as far as known, ascending."""
        return [shard for shard, holder in enumerate(self.table) if holder == server]


async def hang_up(connection: asyncpg.Connection) -> None:
    """Close a connection in order if the server plays along, and in any case."""
    try:
        await connection.close(timeout=HANG_UP_TIMEOUT_S)
    except DRIVER_ERRORS:
        connection.terminate()


class Store:
    """Connections of one process to all servers, under one database role."""

    def __init__(self, config: ServiceConfig, role: str) -> None:
        self.config = config
        self.role = role
        self.sql = load_sql("queries")
        self.routes = Routes(config)
        self._pools: list[_Pool] = [_Pool(self, index) for index in range(len(config.servers))]
        self._learning: asyncio.Task[None] | None = None
        self._learn_after = 0.0
        self._moving_waiters = 0

    def server_of(self, user_id: int) -> int:
        """Return the index of the server that holds a wallet."""
        return self.routes.table[shard_of(user_id)]

    def home_of(self, match_id: Any) -> int:
        """Return the index of the home server of a match, which never changes."""
        return self.config.routing[shard_of_match(match_id)]

    async def connect(self, server: int) -> asyncpg.Connection:
        """Open a connection of this role outside the pool; the caller closes it. Raises ServerUnavailable."""
        try:
            return await connect(
                self.config.servers[server],
                self.role,
                self.config.passwords[self.role],
                statement_timeout_ms=self.config.statement_timeout_ms,
            )
        except ServerUnavailable:
            # What is wanted of this server may be on another one by now, and this one cannot say so.
            self.learn_routes()
            raise

    @asynccontextmanager
    async def connection(self, server: int) -> AsyncIterator[asyncpg.Connection]:
        """Borrow a pooled connection.

        Driver errors of the body leave as UnknownOutcome or NotPosted; failing to connect is ServerUnavailable.
        """
        pool = self._pools[server]
        connection = await pool.take()
        healthy = False
        try:
            await hit_async("store.before_statement")
            yield connection
            await hit_async("store.after_statement_before_return")
            healthy = True
        except DRIVER_ERRORS as error:
            meaning = meaning_of(error)
            healthy = isinstance(meaning, NotPosted | ShardNotHere | PayoutsPaused)
            raise meaning from error
        except LedgerError:
            healthy = True
            raise
        finally:
            pool.give_back(connection, healthy=healthy)

    async def fetch(self, server: int, query: str, *args: object) -> list[asyncpg.Record]:
        """Run one named query of queries.sql and return its rows."""
        async with self.connection(server) as connection:
            return await connection.fetch(self.sql[query], *args, timeout=self.config.statement_timeout_ms / 1000 + 1)

    async def fetchrow(self, server: int, query: str, *args: object) -> asyncpg.Record | None:
        """Run one named query and return its first row, or None."""
        rows = await self.fetch(server, query, *args)
        return rows[0] if rows else None

    async def wallet_rows(self, user_id: int, query: str, *args: object) -> list[asyncpg.Record]:
        """Run a named query on a wallet's server, wherever it is by then; its first parameters are shard and user_id.

        Raises LedgerError; ShardNotHere if the shard's move takes longer than a command may wait.
        """
        shard = shard_of(user_id)
        return await self.at_wallet(user_id, lambda server: self.fetch(server, query, shard, user_id, *args))

    async def wallet_row(self, user_id: int, query: str, *args: object) -> asyncpg.Record | None:
        """Run a named query on a wallet's server and return its first row, or None."""
        rows = await self.wallet_rows(user_id, query, *args)
        return rows[0] if rows else None

    async def at_wallet(self, user_id: int, action: Callable[[int], Awaitable[_Result]]) -> _Result:
        """Do `action(server)` on the server that holds a wallet; while its shard is being moved, wait for it.

        The action must raise ShardNotHere if it found that the server does not hold the shard, and have had no
        effect then. That error leaves when `command_deadline_ms` have passed, or too many calls are waiting.
        """
        if not self.routes.complete:
            self.learn_routes()
        try:
            return await action(self.server_of(user_id))
        except ShardNotHere:
            if self._moving_waiters >= MOVING_WAITERS_MAX:
                raise
        metrics.SHARD_WAITS.inc()
        deadline = time.monotonic() + self.config.command_deadline_ms / 1000
        self._moving_waiters += 1
        try:
            while True:
                await self.refresh_routes()
                try:
                    return await action(self.server_of(user_id))
                except ShardNotHere:
                    if time.monotonic() >= deadline:
                        raise
                await asyncio.sleep(MOVING_RETRY_S)
        finally:
            self._moving_waiters -= 1

    def learn_routes(self) -> None:
        """Begin to ask the servers what they hold, unless that was done a moment ago; does not wait."""
        if self._learning is None and time.monotonic() >= self._learn_after:
            self._learn_after = time.monotonic() + LEARN_EVERY_S
            self._begin_learning()

    async def refresh_routes(self) -> None:
        """Ask every server what it holds; callers at the same time share one round. Never fails."""
        await asyncio.shield(self._learning or self._begin_learning())

    def _begin_learning(self) -> asyncio.Task[None]:
        task = asyncio.create_task(self._learn())
        self._learning = task
        task.add_done_callback(self._learned)
        return task

    def _learned(self, task: asyncio.Task[None]) -> None:
        self._learning = None
        if not task.cancelled() and task.exception() is not None:
            log.error("routes were not learned: %r", task.exception())

    async def _learn(self) -> None:
        async def ask(server: int) -> list[asyncpg.Record]:
            try:
                async with asyncio.timeout(ROUTES_TIMEOUT_S):
                    return await self.fetch(server, "routes")
            except (LedgerError, TimeoutError):
                return []

        answers = await asyncio.gather(*(ask(server) for server in range(len(self.config.servers))))
        await hit_async("store.after_routes_before_learn")
        for row in (row for rows in answers for row in rows):
            if self.routes.learn(row["shard"], row["server_name"], row["epoch"]):
                log.info("shard %d is on %s (epoch %d)", row["shard"], row["server_name"], row["epoch"])
        self.routes.complete = self.routes.complete or all(answers)
        if self.role == ACCEPTING_ROLE:
            await self._accept(answers)

    async def _accept(self, answers: Sequence[Sequence[asyncpg.Record]]) -> None:
        """Let a server take over what the old one has given up, if whoever moved it has not done that."""
        for server, rows in enumerate(answers):
            for row in rows:
                shard = row["shard"]
                if self.routes.table[shard] == server and row["epoch"] < self.routes.epoch(shard):
                    with suppress(LedgerError):
                        await self.fetch(server, "accept_shard", shard, self.routes.epoch(shard))

    async def close(self) -> None:
        """Close every pooled connection."""
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.wait([self._learning])
        for pool in self._pools:
            await pool.close()


class _Pool:
    """At most POOL_SIZE connections to one server; broken ones are thrown away, never handed out again."""

    def __init__(self, store: Store, server: int) -> None:
        self._store = store
        self._server = server
        self._idle: list[asyncpg.Connection] = []
        self._slots = asyncio.Semaphore(POOL_SIZE)

    async def take(self) -> asyncpg.Connection:
        await self._slots.acquire()
        try:
            while self._idle:
                connection = self._idle.pop()
                if not connection.is_closed():
                    return connection
            return await self._store.connect(self._server)
        except BaseException:
            self._slots.release()
            raise

    def give_back(self, connection: asyncpg.Connection, *, healthy: bool) -> None:
        if healthy and not connection.is_closed() and not connection.is_in_transaction():
            self._idle.append(connection)
        else:
            connection.terminate()
        self._slots.release()

    async def close(self) -> None:
        for connection in self._idle:
            with suppress(*DRIVER_ERRORS):
                await connection.close(timeout=1)
        self._idle.clear()


def columns(rows: Sequence[Sequence[object]], width: int) -> list[list[object]]:
    """Turn rows into `width` parallel columns, as the array parameters of the SQL functions want them."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def text_array(values: Sequence[str | None]) -> str:
    """Return texts as the literal of an SQL array, to be cast by the statement (`$1::text::text[]`).

    The driver looks at each element of a list through an abstract base class, ten times as long as this takes, and
    batches are mostly columns of text.
    """
    plain = [value for value in values if value is not None]
    if not plain:
        return "{" + ",".join(["NULL"] * len(values)) + "}"
    joined = "".join(plain)
    if '"' in joined or "\\" in joined:
        values = [value and value.replace("\\", "\\\\").replace('"', '\\"') for value in values]
        plain = [value for value in values if value is not None]
    if len(plain) == len(values):
        return '{"' + '","'.join(plain) + '"}'
    return "{" + ",".join(["NULL" if value is None else '"' + value + '"' for value in values]) + "}"


def table(rows: Sequence[Sequence[object]], kinds: str) -> list[object]:
    """Return rows as parallel columns; `kinds` has a letter a column, `t` for one of text (see `text_array`)."""
    return [
        text_array(column) if kind == "t" else column  # type: ignore[arg-type] # the letter says so
        for kind, column in zip(kinds, columns(rows, len(kinds)), strict=True)
    ]
