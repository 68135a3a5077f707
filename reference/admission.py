"""Who is let in, whichever door they come through: tokens, the rate limit, and the end of a process.

Everything refused here was certainly not done.
"""

import asyncio
import contextlib
from enum import Enum
from typing import Final

from reference.auth import Caller, Gate, check_admin, check_wallet
from reference.config import ServiceConfig
from reference.errors import Draining
from reference.limiter import Limiter

DRAIN_WITHIN_S: Final = 12.0
"""Requests under way when the process is asked to stop are waited for this long: longer than a deadline in the queue
and a statement together can take."""


REFUSE_FOR_S: Final = 0.3
"""After that notice, calls are refused with their reason for at least this long before connections are closed: a caller
whose connection just ends cannot know what became of its call."""


class Needs(Enum):
    """What a caller must be."""

    NOBODY = 0
    ANYBODY = 1
    """Any valid token."""
    WALLET = 2
    """The wallet that is asked for, or a service."""
    ADMIN = 3


class Admission:
    """Decides about every request of one process, and knows how many are under way."""

    def __init__(self, config: ServiceConfig) -> None:
        self.gate = Gate(config.token_key, trust_every_caller=config.trust_every_caller)
        self.limiter = Limiter(config)
        self.stopping = False
        """The process was asked to stop: it is not ready any more, and still takes requests for a moment."""
        self.draining = False
        """Nothing new is let in."""
        self.under_way = 0
        self._notice_s = config.drain_notice_ms / 1000
        self._idle = asyncio.Event()

    async def admit(self, needs: Needs, authorization: str | None, user: str, cost: int = 1) -> Caller:
        """Let a request in for wallet `user` (its number in decimal), or raise.

        Raises Draining, Unauthenticated, Forbidden or RateLimited.
        """
        if self.draining:
            raise Draining("this process is stopping; send the request to another one")
        caller = self.gate.caller(authorization)
        if needs is Needs.WALLET:
            check_wallet(caller, user)
        elif needs is Needs.ADMIN:
            check_admin(caller)
        if caller.subject and not caller.service:
            await self.limiter.take(int(caller.subject), cost)
        return caller

    def leave(self) -> None:
        """Count a request that has its answer."""
        self.under_way -= 1
        if self.draining and not self.under_way:
            self._idle.set()

    async def drain(self) -> int:
        """Stop being ready, then refuse what is new and wait for what is under way; return how many are left."""
        self.stopping = True
        await asyncio.sleep(self._notice_s)
        self.draining = True
        refusing = asyncio.create_task(asyncio.sleep(REFUSE_FOR_S))
        if self.under_way:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), DRAIN_WITHIN_S)
        await refusing
        return self.under_way

    async def close(self) -> None:
        """Close the limiter's connections."""
        await self.limiter.close()
