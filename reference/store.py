"""The one door to Postgres: connections per server and role, and what a failure on them means.

A failure is translated once, here: refused before anything was sent (`ServerUnavailable`), answered with an
error and so rolled back (`NotPosted`), or broken in between (`UnknownOutcome`).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from reference.config import ServerConfig, ServiceConfig
from reference.errors import LedgerError, NotPosted, PayoutsPaused, ServerUnavailable, UnknownOutcome
from reference.routing import shard_of, shard_of_match
from reference.sql import load_sql

CONNECT_TIMEOUT_S = 1.0
HANG_UP_TIMEOUT_S = 1.0
POOL_SIZE = 4
LEADER_CLASS = 7
"""First half of the two-part advisory lock keys of leaders; wallet locks use the one-part key space."""

PAYOUTS_PAUSED = "LP001"
"""The error code by which `payouts_open` refuses."""

# Errors a server sends while it dies or is killed: the transaction may have committed just before.
_DYING = (
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
)
_BROKEN = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError, *_DYING)


def meaning_of(error: BaseException) -> LedgerError:
    """Translate a driver's exception raised by a statement that was sent into ours."""
    if isinstance(error, LedgerError):
        return error
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate == PAYOUTS_PAUSED:
        return PayoutsPaused(str(error))
    if isinstance(error, asyncpg.DataError):
        # The driver refused to encode an argument (an InterfaceError too): nothing was sent.
        return NotPosted(f"{type(error).__name__}: {error}")
    if isinstance(error, _BROKEN):
        return UnknownOutcome(f"{type(error).__name__}: {error}")
    return NotPosted(f"{type(error).__name__}: {error}")


async def connect(
    server: ServerConfig, role: str, password: str, *, statement_timeout_ms: int, database: str | None = None
) -> asyncpg.Connection:
    """Open one connection. Raises ServerUnavailable if the server cannot be reached or refuses."""
    try:
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
            },
        )
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ServerUnavailable(f"{server.name} at {server.host}:{server.port}: {error}") from error


async def hang_up(connection: asyncpg.Connection) -> None:
    """Close a connection in order if the server plays along, and in any case."""
    try:
        await connection.close(timeout=HANG_UP_TIMEOUT_S)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


class Store:
    """Connections of one process to all servers, under one database role."""

    def __init__(self, config: ServiceConfig, role: str) -> None:
        self.config = config
        self.role = role
        self.sql = load_sql("queries")
        self._pools: list[_Pool] = [_Pool(self, index) for index in range(len(config.servers))]

    def server_of(self, user_id: int) -> int:
        """Return the index of the server that holds a wallet."""
        return self.config.routing[shard_of(user_id)]

    def home_of(self, match_id: Any) -> int:
        """Return the index of the home server of a match."""
        return self.config.routing[shard_of_match(match_id)]

    async def connect(self, server: int) -> asyncpg.Connection:
        """Open a connection of this role outside the pool; the caller closes it."""
        return await connect(
            self.config.servers[server],
            self.role,
            self.config.passwords[self.role],
            statement_timeout_ms=self.config.statement_timeout_ms,
        )

    @asynccontextmanager
    async def connection(self, server: int) -> AsyncIterator[asyncpg.Connection]:
        """Borrow a pooled connection.

        Driver errors of the body leave as UnknownOutcome or NotPosted; failing to connect is ServerUnavailable.
        """
        pool = self._pools[server]
        connection = await pool.take()
        healthy = False
        try:
            yield connection
            healthy = True
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            meaning = meaning_of(error)
            healthy = isinstance(meaning, NotPosted | PayoutsPaused)
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

    async def close(self) -> None:
        """Close every pooled connection."""
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
            with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close(timeout=1)
        self._idle.clear()


def columns(rows: Sequence[Sequence[object]], width: int) -> list[list[object]]:
    """Turn rows into `width` parallel columns, as the array parameters of the SQL functions want them."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
