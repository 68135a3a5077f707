"""Tells one process about balances as they change, for as many listeners as it has.

Every process that listens reads the whole of `user.balance.updated` by itself: there is no group, so nothing is
rebalanced when one comes or goes, and nothing is read while nobody listens. Only records of wallets that somebody
listens to are decoded. A listener gets updates with a rising `seq`; when it is slow, the newest replace the oldest,
for a balance is a state. What a listener missed before it came stands in the ledger: each entry has the balance after
it, so `seq` alone is enough to go on (the Last-Event-ID of an event stream), whatever Kafka still holds.
"""

import asyncio
import logging
import threading
from collections import defaultdict, deque
from typing import Any, Self

import msgspec
from confluent_kafka import KafkaException

from reference.bus import Tail
from reference.commands import BALANCE_TOPIC
from reference.config import ServiceConfig
from reference.projector import BalanceUpdate

log = logging.getLogger("ledgerproof.feed")

BUFFER_MAX = 64
"""Updates that wait for one listener."""
LISTENERS_MAX = 10_000
POLL_S = 0.1
START_TIMEOUT_S = 10.0
RETRY_AFTER_S = 1.0

_decode = msgspec.json.Decoder(BalanceUpdate).decode


class FeedClosed(Exception):
    """The feed was closed: the process is about to end."""


class TooManyListeners(Exception):
    """The process follows as many balances as it can."""


class Subscription:
    """The updates of one wallet for one listener, as an asynchronous iterator; leave it with `close` or `async with`.

    To miss nothing: subscribe, then `offer` what the ledger says after the last seq that the listener has, then
    iterate. Updates that are not newer than the last one given are left out.
    """

    def __init__(self, feed: "BalanceFeed", user_id: int, after_seq: int) -> None:
        self.user_id = user_id
        self.dropped = 0
        """Updates that were replaced by newer ones because the listener was slow."""
        self._feed = feed
        self._last_seq = after_seq
        self._waiting: deque[BalanceUpdate] = deque()
        self._there_is_one = asyncio.Event()
        self._closed = False

    def offer(self, update: BalanceUpdate) -> None:
        """Add an update; call it in the event loop."""
        if len(self._waiting) == BUFFER_MAX:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(update)
        self._there_is_one.set()

    def close(self) -> None:
        """Stop listening; an iteration under way ends. Harmless to repeat."""
        self._closed = True
        self._there_is_one.set()
        self._feed._forget(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BalanceUpdate:
        while True:
            while self._waiting:
                update = self._waiting.popleft()
                if update.seq > self._last_seq:
                    self._last_seq = update.seq
                    return update
            if self._closed:
                raise StopAsyncIteration
            self._there_is_one.clear()
            await self._there_is_one.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class BalanceFeed:
    """The one reader of balance updates in a process."""

    def __init__(self, config: ServiceConfig, name: str) -> None:
        self._config = config
        self._name = name
        self._listeners: dict[bytes, set[Subscription]] = defaultdict(set)
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reader: threading.Thread | None = None
        self._reading = asyncio.Event()
        self._stop = threading.Event()
        self._closed = False

    @property
    def listeners(self) -> int:
        """How many subscriptions are open."""
        return self._count

    async def subscribe(self, user_id: int, after_seq: int = 0) -> Subscription:
        """Listen to a wallet; whatever the projector tells after the return arrives.

        Raises TooManyListeners, FeedClosed, and TimeoutError when Kafka does not answer.
        """
        if self._closed:
            raise FeedClosed
        if self._count >= LISTENERS_MAX:
            raise TooManyListeners(f"{LISTENERS_MAX} already listen to this process")
        self._loop = asyncio.get_running_loop()
        subscription = Subscription(self, user_id, after_seq)
        self._listeners[str(user_id).encode()].add(subscription)
        self._count += 1
        if self._reader is None:
            self._reading.clear()
            self._stop = threading.Event()
            self._reader = threading.Thread(target=self._read, args=(self._stop,), name="balance-feed", daemon=True)
            self._reader.start()
        try:
            await asyncio.wait_for(self._reading.wait(), START_TIMEOUT_S)
        except BaseException:
            subscription.close()
            raise
        return subscription

    async def close(self) -> None:
        """End every subscription and the reader."""
        self._closed = True
        for listeners in list(self._listeners.values()):
            for subscription in list(listeners):
                subscription.close()
        self._stop_reader()

    def _forget(self, subscription: Subscription) -> None:
        key = str(subscription.user_id).encode()
        listeners = self._listeners.get(key)
        if listeners is None or subscription not in listeners:
            return
        listeners.discard(subscription)
        self._count -= 1
        if not listeners:
            del self._listeners[key]
        if self._count == 0:
            self._stop_reader()

    def _stop_reader(self) -> None:
        """Let the reader end by itself; the next subscription starts another."""
        self._stop.set()
        self._reader = None

    def _read(self, stop: threading.Event) -> None:
        """Read from the end of the topic until `stop`, in a thread of its own; begin again after a fault."""
        while not stop.is_set():
            try:
                # From its end: listeners that were here before a fault are told from the ledger by who serves them.
                tail = Tail(self._config, BALANCE_TOPIC, self._name)
            except KafkaException as error:
                log.warning("balance updates cannot be read: %s", error)
                stop.wait(RETRY_AFTER_S)
                continue
            try:
                self._in_loop(self._reading.set)
                while not stop.is_set():
                    wanted = [record for record in tail.poll(POLL_S) if record.key() in self._listeners]
                    if wanted:
                        self._in_loop(self._deliver, wanted)
            except KafkaException as error:
                log.warning("balance updates are interrupted: %s", error)
            finally:
                tail.close()

    def _in_loop(self, action: Any, *arguments: Any) -> None:
        assert self._loop is not None, "subscribe sets it before the reader starts"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, *arguments)

    def _deliver(self, records: list[Any]) -> None:
        for record in records:
            try:
                update = _decode(record.value() or b"")
            except msgspec.DecodeError as error:
                log.warning("%s/%s: not an update: %s", record.partition(), record.offset(), error)
                continue
            for subscription in self._listeners.get(record.key(), ()):
                subscription.offer(update)
