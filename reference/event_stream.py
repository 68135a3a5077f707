"""Event streams: the balance of one wallet after every change, as server-sent events, until the client leaves.

A stream ends in order when its token expires and when the process is asked to stop; the client then connects again
and says with Last-Event-ID what it has. Nothing can be missed by that: each event is the whole state.
"""

import asyncio
import contextlib
import time
from typing import Any, Final

import msgspec

from reference import metrics
from reference.answers import BalanceEvent
from reference.auth import Caller
from reference.balance_feed import BalanceFeed, FeedClosed, Subscription, TooManyListeners
from reference.config import ServiceConfig
from reference.errors import Draining, QueueFull, ServerUnavailable
from reference.http_request import ConnectionEnded
from reference.projector import BalanceUpdate
from reference.reads import Reads

HEARTBEAT_S: Final = 15.0
"""A silent stream says at least this often that it is there, for proxies that cut silent connections."""
RETRY_MS: Final = 1000
"""Clients are told to wait this long before they connect again."""
HEADERS: Final = [("content-type", "text/event-stream"), ("cache-control", "no-store"), ("x-accel-buffering", "no")]

_encode = msgspec.json.Encoder().encode


class EventStreams:
    """The streams of one API process."""

    def __init__(self, config: ServiceConfig, reads: Reads) -> None:
        self._streams_max = config.event_streams_max
        self._reads = reads
        self._feed = BalanceFeed(config, "events")

    async def serve(self, proto: Any, caller: Caller, user_id: int, last_seq: int) -> None:
        """Serve a stream until it ends. Raises NotAdmitted before anything of it was sent."""
        if self._feed.listeners >= self._streams_max:
            raise QueueFull(f"{self._streams_max} event streams are open in this process")
        try:
            subscription = await self._feed.subscribe(user_id, last_seq)
        except FeedClosed as error:
            raise Draining("this process is stopping; connect to another one") from error
        except TooManyListeners as error:
            raise QueueFull(str(error)) from error
        except TimeoutError as error:
            raise ServerUnavailable("balance updates cannot be read now") from error
        metrics.EVENT_STREAMS.inc()
        async with subscription:
            try:
                head = await self._reads.balance(user_id, strong=True, min_seq=0)
                if head is not None:
                    subscription.offer(BalanceUpdate(user_id, head.balance_minor, head.seq, head.updated_at_ms))
                await self._play(proto, subscription, caller.expires_s)
            finally:
                metrics.EVENT_STREAMS.dec()

    async def _play(self, proto: Any, subscription: Subscription, expires_s: float) -> None:
        transport = proto.response_stream(200, HEADERS)
        gone = proto.client_disconnect()
        coming: asyncio.Future[BalanceUpdate] | None = None
        with contextlib.suppress(ConnectionEnded):
            await transport.send_str(f"retry: {RETRY_MS}\n\n")
            while not gone.done() and (left_s := expires_s - time.time()) > 0:
                if coming is None:
                    coming = asyncio.ensure_future(anext(subscription))
                await asyncio.wait(
                    [coming, gone], timeout=min(HEARTBEAT_S, left_s), return_when=asyncio.FIRST_COMPLETED
                )
                if not coming.done():
                    await transport.send_str(": still here\n\n")
                    continue
                # A coroutine cannot let StopAsyncIteration through: it would become a RuntimeError.
                if isinstance(coming.exception(), StopAsyncIteration):
                    break
                update = coming.result()
                coming = None
                await transport.send_bytes(_event(update))
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def close(self) -> None:
        """End every stream and take no further one."""
        await self._feed.close()


def _event(update: BalanceUpdate) -> bytes:
    event = BalanceEvent(update.user_id, update.seq, update.balance, update.updated_at)
    return b"id: %d\nevent: user.balance.updated\ndata: %s\n\n" % (update.seq, _encode(event))
