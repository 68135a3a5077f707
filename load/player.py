"""Plays one worker's share of a schedule: one greenlet an arrival, each due whatever became of the earlier ones.

Latency counts from the intended time. What cannot be sent is counted, never put off: an arrival beyond MAX_IN_FLIGHT
is dropped, one sent late says so, and a generator that falls far behind stops and says why.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import gevent
import gevent.pool
import msgspec

from load import requests
from load.alarm import Alarm
from load.answers import Lost, NotSent, get, post
from load.observer import Observer, ObserverError
from load.plan import WorkerPlan
from load.priority import real_time
from load.requests import Answer, Command, EntriesPage, Names
from load.result import WorkerResult
from load.schedule import Arrival, Schedule
from load.tally import Tally
from load.traces import TraceSchedule
from load.wire import Wire, classify

MAX_IN_FLIGHT: Final = 4000
"""Arrivals of one worker under way at once, each on a connection of its own."""
MAX_LAG_S: Final = 5.0
"""A generator this far behind its own schedule stops: what it measures is itself."""
TICK_S: Final = 0.0001
"""The generator sleeps at least this long between two looks at its schedule, for a waking costs CPU."""
LOOK_S: Final = 0.25
"""Nothing may be due for a long time; whether the run was stopped is looked at this often."""
BURST: Final = 32
"""Arrivals begun at most before answers that have come are looked at."""
PREPARE_CONCURRENCY: Final = 64
PREPARE_TRIES: Final = 5
CONNECTIONS_AHEAD: Final = 64
"""Connections to each API process that are opened before the load begins."""
CLOSE_S: Final = 2.0
"""How long `close` waits for the arrivals whose connections it dropped to be counted."""
OPEN_BETS: Final = 2000
"""Accepted bets that are remembered for cancels."""

RequestHook = Callable[..., None]

_decode = msgspec.json.Decoder(Answer).decode
_decode_page = msgspec.json.Decoder(EntriesPage).decode
_NO_ANSWER: Final = Answer()


class NotPrepared(Exception):
    """The service refused what a healthy one accepts: an opening deposit or a new match."""


class Player:
    """Plays one share once: `prepare`, then `play`, then `close`; `stop` may come at any time."""

    def __init__(
        self,
        plan: WorkerPlan,
        share: Schedule | TraceSchedule,
        match_ids: Sequence[str],
        on_request: RequestHook,
    ) -> None:
        """Take the share of worker `plan.index`; `on_request` is Locust's `events.request.fire`."""
        self._plan = plan
        self._share = share
        traced = share if isinstance(share, TraceSchedule) else None
        self._names = Names(
            plan.run, plan.world, plan.first_wallet, match_ids, [] if traced is None else traced.outcomes
        )
        self._created = frozenset() if traced is None else traced.created
        """Matches that the load creates itself, while it goes on."""
        self._cancelled = frozenset() if traced is None else traced.cancelled
        self._bets_by_key: dict[tuple[int, str], tuple[int, str, str]] = {}
        """(user, match, bet) of the accepted bets that a later row of a trace cancels, by wallet and recorded key."""
        self._on_request = on_request
        self._wires = [Wire(host, port, timeout_s=plan.timeout_s) for host, port in plan.targets]
        self._grpc: list[Any] = []
        self._observer: Observer | None = None
        self._heads: dict[int, int] = {}
        """Newest seq that the owner of each wallet has seen."""
        self._bets: deque[tuple[int, str, str]] = deque(maxlen=OPEN_BETS)
        """(user, match, bet) of accepted bets that no cancel has named."""
        self._in_flight = 0
        self._stopping = False
        self.result = WorkerResult(plan.index, scheduled=len(share))
        self._tally = Tally(self.result)

    def prepare(self) -> None:
        """Open connections, and where the plan says so this worker's part of the wallets and matches.

        Raises NotSent, NotPrepared, or OSError if the history cannot be begun.
        """
        if self._plan.history is not None:
            self._observer = Observer(self._plan.history, self._plan.index, self._plan.origin_s)
        for wire in self._wires:
            wire.connect(CONNECTIONS_AHEAD)
        if self._plan.grpc_targets and self._share.count_of("grpc_bet"):
            # Only here, so that a load without gRPC does not pay for it.
            from load.grpc_door import GrpcDoor  # noqa: PLC0415

            self._grpc = [
                GrpcDoor(address, self._plan.token, timeout_s=self._plan.timeout_s)
                for address in self._plan.grpc_targets
            ]
        if self._plan.prepare:
            pool = gevent.pool.Pool(PREPARE_CONCURRENCY)
            every = range(self._plan.index, len(self._names.match_ids), self._plan.count)
            mine = [match for match in every if match not in self._created]
            commands = [self._names.create(match) for match in mine]
            commands += [self._names.opening(rank) for rank in self._plan.wallet_ranks]
            try:
                for problem in pool.imap_unordered(self._prepare_one, commands):
                    if problem is not None:
                        raise NotPrepared(problem)
            finally:
                pool.kill()

    def play(self, start_s: float) -> WorkerResult:
        """Play the share from a reading of time.monotonic() on; return when every arrival has ended."""
        cpu = time.process_time()
        alarm = Alarm()
        # A collection that looks at all that was there before would hold up every arrival due meanwhile.
        gc.collect()
        gc.freeze()
        try:
            with real_time() as self.result.real_time:
                self.result.finished = self._send_all(alarm, start_s)
                # Each request ends by its own deadline, so this ends too.
                while self._in_flight:
                    alarm.wait_until(time.monotonic() + 0.01)
        finally:
            gc.unfreeze()
            alarm.close()
            self.result.cpu_s = time.process_time() - cpu
            self.result.span_s = time.monotonic() - start_s
        return self._tally.fill()

    def stop(self) -> None:
        """Send nothing more; `play` returns once what is under way has ended."""
        self._stopping = True

    def close(self) -> WorkerResult:
        """Drop what is still under way, end the history, and return the result as it stands."""
        self._stopping = True
        for wire in self._wires:
            wire.close()
        for door in self._grpc:
            door.close()
        deadline_s = time.monotonic() + CLOSE_S
        while self._in_flight and time.monotonic() < deadline_s:
            gevent.sleep(0.01)
        if self._observer is not None:
            try:
                self._observer.close()
            except ObserverError as error:
                self.result.problems.append(str(error))
            self._observer = None
        return self._tally.fill()

    # -- sending ---------------------------------------------------------------------------------------

    def _send_all(self, alarm: Alarm, start_s: float) -> bool:
        """Begin every arrival at its time; return whether all were begun."""
        monotonic = time.monotonic
        begun = 0
        for arrival in self._share.arrivals():
            due_s = start_s + arrival.due_s
            now_s = monotonic()
            if due_s <= now_s and begun >= BURST:
                gevent.sleep(0)
                begun = 0
            while due_s > now_s and not self._stopping:
                alarm.wait_until(min(max(due_s, now_s + TICK_S), now_s + LOOK_S))
                now_s = monotonic()
                begun = 0
            if self._stopping:
                return False
            if now_s - due_s > MAX_LAG_S:
                self.result.problems.append(f"the generator fell {MAX_LAG_S:g} s behind its schedule and stopped")
                return False
            begun += 1
            if self._in_flight >= MAX_IN_FLIGHT:
                self._tally.dropped(arrival)
                continue
            self._in_flight += 1
            gevent.spawn_raw(self._arrive, arrival, due_s)
        return True

    def _arrive(self, arrival: Arrival, due_s: float) -> None:
        """Run one arrival from beginning to end. It is a greenlet of its own, so it lets no error out."""
        try:
            command = self._command(arrival)
            if command is None:
                self._tally.skipped(arrival)
                return
            sent_s = time.monotonic()
            self._tally.sent(arrival, sent_s - due_s)
            record, kind, length = self._attempt(arrival, command, due_s, sent_s)
            self._on_request(
                request_type="gRPC" if arrival.op == "grpc_bet" else "HTTP",
                name=arrival.op,
                response_time=(time.monotonic() - due_s) * 1000,
                response_length=length,
                exception=None if record == "ok" or kind in {"409", "422"} else kind,
                context={},
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the run must say so and go on
            self.result.problems.append(f"{type(error).__name__} in {arrival.op}: {error}")
            self._stopping = True
        finally:
            self._in_flight -= 1

    def _attempt(self, arrival: Arrival, command: Command, due_s: float, sent_s: float) -> tuple[str, str, int]:
        """Send a command once, record both ends and count it; return its record, its status or kind, and its length."""
        number = arrival.target % len(self._wires)
        begun = self._observer.invoke(command, number, due_s, sent_s) if self._observer is not None else None
        page: tuple[int, bool] | None = None
        try:
            status, not_admitted, answer, page, length = self._exchange(arrival, command, number)
        except (NotSent, Lost) as error:
            record = "fail" if isinstance(error, NotSent) else "info"
            if self._observer is not None and begun is not None:
                self._observer.complete(begun, record, None, _NO_ANSWER, time.monotonic(), error=str(error))
            self._tally.unanswered(arrival, record, str(error))
            return record, str(error), 0
        record = classify(status, not_admitted)
        now_s = time.monotonic()
        if record == "ok" and answer is _NO_ANSWER:
            record = "info"  # A success that cannot be read says nothing.
        if self._observer is not None and begun is not None:
            self._observer.complete(begun, record, status, answer, now_s, error=answer.title, page=page)
        self._tally.answered(arrival, record, status, now_s - due_s)
        if record == "ok":
            self._learn(arrival, command, answer)
        return record, str(status), length

    def _exchange(
        self, arrival: Arrival, command: Command, number: int
    ) -> tuple[int, bool, Answer, tuple[int, bool] | None, int]:
        """Return status, whether certainly not admitted, answer, page and length. Raises NotSent and Lost."""
        if arrival.op == "grpc_bet" and self._grpc:
            status, not_admitted, answer = self._grpc[arrival.target % len(self._grpc)].place_bet(command)
            return status, not_admitted, answer, None, 0
        token = self._plan.token
        if command.body is None:
            reply = self._wires[number].exchange(get(command.path, token))
        else:
            reply = self._wires[number].exchange(post(command.path, command.key or "", command.body, token))
        try:
            answer = _decode(reply.body)
            page = None
            if command.op == "entries" and reply.status == 200:
                answer, page = _page_of(reply.body)
        except msgspec.DecodeError:
            return reply.status, reply.not_admitted, _NO_ANSWER, None, len(reply.body)
        return reply.status, reply.not_admitted, answer, page, len(reply.body)

    # -- what an answer decides ------------------------------------------------------------------------

    def _command(self, arrival: Arrival) -> Command | None:
        """Return what an arrival sends, or None if there is nothing for it to act on."""
        user = self._names.user(arrival.wallet)
        if arrival.op == "balance":
            # Half of the readers insist on what they have seen.
            min_seq = self._heads.get(user) if arrival.target % 2 else None
            return requests.balance(user, strong=False, min_seq=min_seq)
        if arrival.op == "strong_balance":
            return requests.balance(user, strong=True, min_seq=None)
        if arrival.op == "entries":
            return requests.entries(user, max(0, self._heads.get(user, 0) - requests.PAGE))
        if arrival.op == "cancel":
            if arrival.traced is not None:
                # Kept: the same row twice is a retry.
                bet = self._bets_by_key.get((arrival.wallet, arrival.traced.bet or ""))
                return None if bet is None else requests.cancel(*bet, self._names.key(arrival))
            if not self._bets:
                return None
            place = arrival.target % len(self._bets)
            owner, match_id, bet_id = self._bets[place]
            del self._bets[place]
            return requests.cancel(owner, match_id, bet_id, f"{self._plan.run}-{arrival.number}")
        return self._names.command(arrival)

    def _learn(self, arrival: Arrival, command: Command, answer: Answer) -> None:
        """Keep what later arrivals need."""
        user = command.user
        if user is None:
            return
        if answer.seq is not None and answer.seq > self._heads.get(user, 0):
            self._heads[user] = answer.seq
        if command.op == "bet" and answer.bet_id is not None and command.match_id is not None:
            if arrival.traced is None:
                self._bets.append((user, command.match_id, answer.bet_id))
            elif (key := (arrival.wallet, arrival.traced.key or "")) in self._cancelled:
                self._bets_by_key[key] = (user, command.match_id, answer.bet_id)

    def _prepare_one(self, command: Command) -> str | None:
        """Send an opening command until it is accepted; return why it is not, or None."""
        assert command.body is not None, "opening commands are posts"
        assert command.key is not None
        problem = ""
        for number in range(PREPARE_TRIES):
            wire = self._wires[number % len(self._wires)]
            now_s = time.monotonic()
            begun = self._observer.invoke(command, number % len(self._wires), now_s, now_s) if self._observer else None
            try:
                reply = wire.exchange(post(command.path, command.key, command.body, self._plan.token))
                record, status, body = classify(reply.status, reply.not_admitted), reply.status, reply.body
                problem = f"{command.op} was answered {reply.status}: {reply.body[:200].decode(errors='replace')}"
            except (NotSent, Lost) as error:
                record, status, body = ("fail" if isinstance(error, NotSent) else "info"), None, b"{}"
                problem = f"{command.op}: {error}"
            if self._observer is not None and begun is not None:
                try:
                    answer = _decode(body)
                except msgspec.DecodeError:
                    answer = _NO_ANSWER
                self._observer.complete(begun, record, status, answer, time.monotonic(), error=answer.title or problem)
            if record == "ok":
                return None
            if record == "info":
                break  # The key is retired: nobody knows what became of it.
            gevent.sleep(0.25 * (number + 1))
        return problem


def _page_of(body: bytes) -> tuple[Answer, tuple[int, bool]]:
    """Return what a page of entries says: its last entry, how many came, and whether there are more."""
    page = _decode_page(body)
    answer = Answer()
    if page.entries:
        answer.seq, answer.balance_minor = page.entries[-1].seq, page.entries[-1].balance_minor
    return answer, (len(page.entries), page.next_cursor is not None)
