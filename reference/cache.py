"""The one door to Redis: balances by wallet, each with its `seq`; a write with a lower `seq` loses.

Redis is only a cache. When it fails, callers go on without it; flushing it changes latency and nothing else.

Beside the values of each server stands its *epoch*, with the moment up to which the projector vouches for them. A
value counts only under the epoch it was written in, and may be written only by someone who knew that epoch before
reading the value from the projection. So whoever cannot vouch for the cache any more (a write failed, a predecessor
died, Redis came back empty) begins a new epoch, which empties the cache of that server in one step; and whatever
was read before that arrives too late and is refused (decision 0014).
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import RedisError

from reference import metrics
from reference.config import ServiceConfig
from reference.failpoints import hit_async

KEY_PREFIX = "balance:"
EPOCH_PREFIX = "balance-epoch:"
TTL_MS = 60_000
"""Wallets that nobody touches make room."""
TIMEOUT_S = 0.1
ASKERS_MAX = 2
"""Questions of one process under way at once: while one is answered, the next gathers what comes."""
ASKED_MAX = 256
"""Wallets in one question."""
FENCE_POLL_S = 0.25
OPEN_CIRCUIT_S = 1.0
"""After a failure Redis is left alone for this long."""
HOLD_MAX_S = 10.0
"""A value is written at most this long after it was read; far less than TTL_MS, so that no newer one can have
expired meanwhile."""

# KEYS: the epoch, then the balances. ARGV: the epoch known, then seq, balance, updated_at_ms of each. Returns the epoch
# and how many values lost to newer ones.
_PUT = """
local now = string.match(redis.call('GET', KEYS[1]) or '', '^%S+') or ''
if now ~= ARGV[1] then return now .. ' 0' end
local lost = 0
for i = 2, #KEYS do
    local seq, balance, at = ARGV[3 * i - 4], ARGV[3 * i - 3], ARGV[3 * i - 2]
    local old_seq, old_epoch = string.match(redis.call('GET', KEYS[i]) or '', '^(%d+) %S+ %S+ (%S+)$')
    if old_epoch ~= now or tonumber(old_seq) < tonumber(seq) then
        redis.call('SET', KEYS[i], seq .. ' ' .. balance .. ' ' .. at .. ' ' .. now, 'PX', TTL)
    elseif tonumber(old_seq) > tonumber(seq) then
        lost = lost + 1
    end
end
return now .. ' ' .. lost
""".replace("TTL", str(TTL_MS))

# ARGV: the epoch known, the moment in Unix milliseconds.
_VOUCH = """
local now, at = string.match(redis.call('GET', KEYS[1]) or '', '^(%S+) (%d+)$')
if now == ARGV[1] and tonumber(at) < tonumber(ARGV[2]) then
    redis.call('SET', KEYS[1], now .. ' ' .. ARGV[2])
end
return now or ''
"""


@dataclass(slots=True, frozen=True)
class Balance:
    """A wallet's balance after its entry `seq`."""

    user_id: int
    balance: int
    seq: int
    updated_at_ms: int
    """When the entry was written, Unix milliseconds by the database's clock."""


@dataclass(slots=True, frozen=True)
class Cached:
    """What Redis knows of a wallet."""

    balance: Balance | None
    epoch: str | None
    """The epoch of the wallet's server, to be shown when a value is put; None: nothing can be put."""
    complete_at_ms: int
    """No value of this epoch is older than this, Unix milliseconds by the database's clock."""


NOTHING = Cached(None, None, 0)


def _cached(user_id: int, epoch_text: str | None, text: str | None) -> Cached:
    """Read what Redis holds for a server's epoch and for a wallet of that server; what cannot be read is nothing."""
    try:
        epoch, complete_at_ms = (epoch_text or "").split(" ")
        known = Cached(None, epoch, int(complete_at_ms))
    except ValueError:
        return NOTHING
    with suppress(ValueError):
        seq, balance, updated_at_ms, written_in = (text or "").split(" ")
        if written_in == epoch:
            return replace(known, balance=Balance(user_id, int(balance), int(seq), int(updated_at_ms)))
    return known


def impatient_redis(config: ServiceConfig, *, max_connections: int) -> Redis:
    """Return a client for callers that can do without Redis: a call takes no longer than TIMEOUT_S.

    Left to itself, the library tries ten times with pauses, so that a Redis that hangs would hold every call for five
    seconds. Here a call is sent again only, once, when its connection turned out to be broken, as after a restart.
    """
    return Redis(
        host=config.redis_host,
        port=config.redis_port,
        password=config.redis_password,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 1, supported_errors=(Disconnected,)),
        decode_responses=True,
        max_connections=max_connections,
    )


class Cache:
    """Balances in Redis, fenced by epoch and `seq`."""

    def __init__(self, config: ServiceConfig) -> None:
        self._redis = impatient_redis(config, max_connections=64)
        self._put_script = self._redis.register_script(_PUT)
        self._vouch_script = self._redis.register_script(_VOUCH)
        self._closed_until = 0.0
        self._wanted: deque[tuple[str, int, asyncio.Future[Cached]]] = deque()
        self._askers: set[asyncio.Task[None]] = set()

    @property
    def available(self) -> bool:
        """False for a moment after a failure: the caller does without."""
        return time.monotonic() >= self._closed_until

    async def get(self, server: str, user_id: int) -> Cached:
        """Return what is cached for a wallet of a server; nothing when Redis does not answer.

        Calls that come while Redis is being asked are asked together afterwards: a question costs this process
        far more than the wallets in it.
        """
        if not self.available:
            return NOTHING
        answer: asyncio.Future[Cached] = asyncio.get_running_loop().create_future()
        self._wanted.append((server, user_id, answer))
        if len(self._askers) < ASKERS_MAX:
            asker = asyncio.create_task(self._ask())
            self._askers.add(asker)
            asker.add_done_callback(self._askers.discard)
        return await answer

    async def _ask(self) -> None:
        """Ask for what is wanted until nothing is; every answer awaited comes, whatever happens."""
        while self._wanted:
            asked = [self._wanted.popleft() for _ in range(min(len(self._wanted), ASKED_MAX))]
            servers = list(dict.fromkeys(server for server, _, _ in asked))
            found: list[Any] = [None] * (len(servers) + len(asked))
            try:
                await hit_async("cache.before_get")
                found = await self._redis.mget(
                    *(EPOCH_PREFIX + server for server in servers),
                    *(f"{KEY_PREFIX}{user_id}" for _, user_id, _ in asked),
                )
            except (RedisError, OSError, TimeoutError):
                self._failed()
            finally:
                epochs = dict(zip(servers, found, strict=False))
                for (server, user_id, answer), text in zip(asked, found[len(servers) :], strict=True):
                    if not answer.done():
                        answer.set_result(_cached(user_id, epochs[server], text))

    async def put(self, server: str, epoch: str, balances: Sequence[Balance], read_since: float) -> str | None:
        """Write balances of a server that were read from the projection after `epoch` was learnt.

        Values with a lower seq than the cached ones lose. Returns the epoch that Redis is in: another than `epoch`
        (empty: none) means that nothing was written. Returns None if Redis failed, or if the values are too old:
        `read_since` is `time.monotonic()` from before they were read.
        """
        if not balances:
            return epoch
        if not self.available or time.monotonic() - read_since > HOLD_MAX_S:
            return None
        keys = [EPOCH_PREFIX + server, *(f"{KEY_PREFIX}{item.user_id}" for item in balances)]
        parts = [part for item in balances for part in (item.seq, item.balance, item.updated_at_ms)]
        said = await self._run(self._put_script, keys, [epoch, *parts])
        if said is None:
            return None
        now, _, lost = said.partition(" ")
        metrics.CACHE_FILLS_LOST.inc(int(lost))
        return now

    async def begin(self, server: str) -> str | None:
        """Begin a new epoch, whatever there was, and return it; None if Redis failed.

        An epoch that somebody else has begun is no substitute: it may be older than the write that got lost, and a
        reader may have filled it from before that.
        """
        if not self.available:
            return None
        epoch = secrets.token_hex(8)
        try:
            await self._redis.set(EPOCH_PREFIX + server, f"{epoch} 0")
        except (RedisError, OSError, TimeoutError):
            self._failed()
            return None
        metrics.CACHE_EPOCHS.labels(server).inc()
        return epoch

    async def fence(self, server: str, within_s: float) -> bool:
        """Begin a new epoch, waiting for a Redis in trouble; return whether that was done in time."""
        deadline = time.monotonic() + within_s
        while await self.begin(server) is None:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(FENCE_POLL_S)
        return True

    async def vouch(self, server: str, epoch: str, complete_at_ms: int) -> str | None:
        """Say that no value of the epoch is older than a moment; return as `put` does."""
        return await self._run(self._vouch_script, [EPOCH_PREFIX + server], [epoch, complete_at_ms])

    async def close(self) -> None:
        """Close the connections once what was asked is answered."""
        await asyncio.gather(*self._askers, return_exceptions=True)
        await self._redis.aclose()

    async def _run(self, script: object, keys: list[str], args: list[str | int]) -> str | None:
        if not self.available:
            return None
        try:
            if script is self._put_script:
                await hit_async("cache.before_set")
            return str(await script(keys=keys, args=args))  # type: ignore[operator]
        except (RedisError, OSError, TimeoutError):
            self._failed()
            return None

    def _failed(self) -> None:
        self._closed_until = time.monotonic() + OPEN_CIRCUIT_S
        metrics.CACHE_ERRORS.inc()
