"""The rate limit of each user: a token bucket in Redis, shared by every API process.

Requests that arrive in the same tick of the event loop are asked for in one call, and a user who was refused is
refused here until the wait is over, so that a flood costs neither Redis nor much of this process. When Redis does
not answer, requests are let through and counted: a limit that fails must not close the exchange.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from redis.exceptions import RedisError

from reference import metrics
from reference.cache import impatient_redis
from reference.config import ServiceConfig
from reference.errors import RateLimited

KEY_PREFIX: Final = "rate:"
OPEN_CIRCUIT_S: Final = 1.0
"""After a failure Redis is left alone for this long."""
BATCH_MAX: Final = 256
REFUSED_MAX: Final = 10_000
"""Refused users remembered at most; the oldest is forgotten first and asked for again."""

# Redis's own clock is used, so that the clocks of the API processes do not matter. A refused request takes nothing.
_TAKE: Final = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + time[2] / 1000
local per_ms, burst = ARGV[1] / 1000, tonumber(ARGV[2])
local waits = {}
for i, key in ipairs(KEYS) do
    local cost, left = tonumber(ARGV[i + 2]), burst
    local old = redis.call('GET', key)
    if old then
        local before, at_ms = string.match(old, '^(%S+) (%S+)$')
        left = math.min(burst, before + math.max(0, now_ms - at_ms) * per_ms)
    end
    if left >= cost then
        redis.call('SET', key, string.format('%.4f %.3f', left - cost, now_ms), 'PX', math.ceil(burst / per_ms) + 1000)
        waits[i] = 0
    else
        waits[i] = math.ceil((cost - left) / per_ms)
    end
end
return waits
"""

_Waiting = tuple[int, int, "asyncio.Future[float]"]


class Limiter:
    """Takes from the buckets of users on behalf of one API process."""

    def __init__(self, config: ServiceConfig) -> None:
        self._per_s = config.rate_limit_per_s
        self._burst = config.rate_limit_burst
        self._redis = impatient_redis(config, max_connections=8)
        self._script = self._redis.register_script(_TAKE)
        self._waiting: list[_Waiting] = []
        self._refused_until: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._down_until = 0.0

    async def take(self, user_id: int, cost: int = 1) -> None:
        """Take `cost` requests (at most a whole burst) from a user's bucket. Raises RateLimited."""
        now = time.monotonic()
        until = self._refused_until.get(user_id)
        if until is not None:
            if now < until:
                metrics.RATE_LIMITED.inc()
                raise RateLimited(until - now)
            del self._refused_until[user_id]
        if now < self._down_until:
            metrics.RATE_LIMIT_OPEN.inc()
            return
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[float] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._ask)
        self._waiting.append((user_id, min(cost, self._burst), answer))
        wait_s = await answer
        if wait_s > 0:
            while len(self._refused_until) >= REFUSED_MAX:
                self._refused_until.pop(next(iter(self._refused_until)))
            self._refused_until[user_id] = time.monotonic() + wait_s
            metrics.RATE_LIMITED.inc()
            raise RateLimited(wait_s)

    def _ask(self) -> None:
        """Send everything that arrived in this tick, in calls of BATCH_MAX."""
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), BATCH_MAX):
            task = asyncio.create_task(self._call(waiting[start : start + BATCH_MAX]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call(self, waiting: Sequence[_Waiting]) -> None:
        try:
            waits_ms: list[int] = await self._script(
                keys=[f"{KEY_PREFIX}{user_id}" for user_id, _, _ in waiting],
                args=[self._per_s, self._burst, *(cost for _, cost, _ in waiting)],
            )
        except (RedisError, OSError, TimeoutError):
            self._down_until = time.monotonic() + OPEN_CIRCUIT_S
            metrics.RATE_LIMIT_OPEN.inc(len(waiting))
            waits_ms = [0] * len(waiting)
        for (_, _, answer), wait_ms in zip(waiting, waits_ms, strict=True):
            if not answer.done():
                answer.set_result(wait_ms / 1000)

    async def close(self) -> None:
        """Wait for calls under way and close the connections."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()
