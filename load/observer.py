"""Sends both records of every attempt to the process that writes the history, from inside a gevent process."""

from typing import Any, Final

import gevent
import msgspec
from gevent import socket

from load.records import Complete, End, Hello, Invoke, Record, frame
from load.requests import Answer, Command

FLUSH_S: Final = 0.05
"""A killed worker loses the records of this long at most, and the history then stays unclosed."""
MAX_PENDING_BYTES: Final = 64_000_000
"""More than this waiting for the writing process means that it cannot keep up."""


class ObserverError(Exception):
    """The writing process is gone or cannot keep up: the history of this run has a gap."""


class Observer:
    """The stream of one worker's records. Call `close` at the end: it sends what is left and the last record."""

    def __init__(self, address: str, worker: int, origin_s: float) -> None:
        """Connect to the writing process. `origin_s` is the reading of time.monotonic() that the history calls 0.

        Raises OSError.
        """
        self._origin_s = origin_s
        self._encode = msgspec.msgpack.Encoder().encode
        self._pending = bytearray()
        self._attempts = 0
        self._clients = 0
        self._free_clients: list[int] = []
        self._worker = worker
        self._problem: str | None = None
        self._closing = False
        self._sock: Any = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(address)
        self._put(Hello(worker))
        self._flusher = gevent.spawn(self._flush_forever)

    @property
    def problem(self) -> str | None:
        """Why the history has a gap, or None."""
        return self._problem

    def invoke(self, command: Command, api: int, intended_s: float, sent_s: float) -> tuple[int, int]:
        """Record that an attempt begins, before its request is sent; return what `complete` is to be told.

        Times are readings of time.monotonic().
        """
        self._attempts += 1
        client = self._free_clients.pop() if self._free_clients else self._new_client()
        self._put(
            Invoke(
                self._attempts,
                client,
                command.op,
                command.key,
                command.payload_hash(),
                command.user,
                f"api{api}",
                command.match_id,
                command.bet_id,
                command.selection,
                command.side,
                command.odds,
                command.amount,
                command.min_seq,
                command.strong,
                command.after_seq,
                intended_s - self._origin_s,
                sent_s - self._origin_s,
                command.tag,
            )
        )
        return self._attempts, client

    def complete(
        self,
        begun: tuple[int, int],
        record: str,
        status: int | None,
        answer: Answer,
        now_s: float,
        *,
        error: str | None = None,
        page: tuple[int, bool] | None = None,
    ) -> None:
        """Record what became of an attempt. `page` is how many entries came and whether there are more."""
        attempt, client = begun
        self._put(
            Complete(
                record,
                attempt,
                client,
                now_s - self._origin_s,
                status,
                answer.outcome,
                answer.replayed,
                answer.seq,
                answer.balance_minor,
                answer.bet_id,
                answer.source,
                answer.stale,
                None if answer.as_of_ms is None else answer.as_of_ms / 1000,
                None if page is None else page[0],
                None if page is None else page[1],
                error if record != "ok" else None,
            )
        )
        # A client whose request is still open somewhere is not used again.
        if record != "info":
            self._free_clients.append(client)

    def close(self) -> None:
        """Send what is left and the last record. Raises ObserverError if the history has a gap."""
        # Ended in the middle of a frame it would leave half of it behind.
        self._closing = True
        self._flusher.join()
        self._put(End(self._attempts))
        self._flush()
        self._sock.close()
        if self._problem is not None:
            raise ObserverError(self._problem)

    def _new_client(self) -> int:
        self._clients += 1
        # Clients of different workers are different clients.
        return self._clients * 1000 + self._worker

    def _put(self, record: Record) -> None:
        if len(self._pending) > MAX_PENDING_BYTES:
            self._problem = "the history's writer cannot keep up"
        if self._problem is None:
            self._pending += frame(self._encode(record))

    def _flush_forever(self) -> None:
        while self._problem is None and not self._closing:
            gevent.sleep(FLUSH_S)
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        if self._problem is not None:
            return
        try:
            self._sock.sendall(pending)
        except OSError as error:
            self._problem = f"the history's writer is gone: {type(error).__name__}"
