"""The one door to Redis: balances by wallet, each with its `seq`; a write with a lower `seq` loses.

Redis is only a cache. When it fails, callers go on without it; flushing it changes latency and nothing else.
Values expire, so that a value whose newer successor could not be written does not stay for ever.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import RedisError

from reference import metrics
from reference.config import ServiceConfig

KEY_PREFIX = "balance:"
TTL_MS = 60_000
TIMEOUT_S = 0.1
OPEN_CIRCUIT_S = 1.0
"""After a failure Redis is left alone for this long."""

_PUT = """
local written = 0
for i, key in ipairs(KEYS) do
    local old = redis.call('GET', key)
    local seq = tonumber(ARGV[3 * i - 2])
    if not old or tonumber(string.match(old, '^%d+')) < seq then
        redis.call('SET', key, ARGV[3 * i - 2] .. ' ' .. ARGV[3 * i - 1] .. ' ' .. ARGV[3 * i], 'PX', TTL)
        written = written + 1
    end
end
return written
""".replace("TTL", str(TTL_MS))


@dataclass(slots=True, frozen=True)
class Balance:
    """A wallet's balance after its entry `seq`."""

    user_id: int
    balance: int
    seq: int
    updated_at_ms: int


class Cache:
    """Balances in Redis, fenced by `seq`."""

    def __init__(self, config: ServiceConfig) -> None:
        self._redis = Redis(
            host=config.redis_host,
            port=config.redis_port,
            password=config.redis_password,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            decode_responses=False,
            max_connections=64,
        )
        self._put_script = self._redis.register_script(_PUT)
        self._closed_until = 0.0

    @property
    def available(self) -> bool:
        """False for a moment after a failure: the caller does without."""
        return time.monotonic() >= self._closed_until

    async def get(self, user_id: int) -> Balance | None:
        """Return the cached balance, or None when there is none or Redis does not answer."""
        if not self.available:
            return None
        try:
            value = await self._redis.get(f"{KEY_PREFIX}{user_id}")
        except (RedisError, OSError, TimeoutError):
            self._failed()
            return None
        if value is None:
            return None
        text = value if isinstance(value, str) else value.decode()
        seq, balance, updated_at_ms = text.split(" ")
        return Balance(user_id, int(balance), int(seq), int(updated_at_ms))

    async def put(self, balances: Sequence[Balance]) -> bool:
        """Write balances; those with a lower seq than the cached one lose. Returns False if Redis failed."""
        if not balances:
            return True
        if not self.available:
            return False
        try:
            await self._put_script(
                keys=[f"{KEY_PREFIX}{item.user_id}" for item in balances],
                args=[part for item in balances for part in (item.seq, item.balance, item.updated_at_ms)],
            )
        except (RedisError, OSError, TimeoutError):
            self._failed()
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _failed(self) -> None:
        self._closed_until = time.monotonic() + OPEN_CIRCUIT_S
        metrics.CACHE_ERRORS.inc()
