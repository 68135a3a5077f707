"""Runs a schedule against the API and records every attempt before it is sent and after it is answered.

The client never decides that something did not happen because it did not hear of it: `classify` is the whole
rule. A key whose answer stayed unknown is retired: nothing is sent under it again before the end of the run,
when the ledger has said what became of it.

Times are seconds on the run's clock. One asyncio task per arrival; latency counts from the intended time.
"""

import asyncio
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from invariants.fates import LEDGER_OPS
from invariants.history import Recorder
from ledgerproof import workload
from ledgerproof.grpc_wire import GrpcWire
from ledgerproof.wire import Lost, NotSent, Reply, Wire, get, post
from ledgerproof.workload import Command, Kind, MatchPlan, Schedule
from reference.commands import Side

REQUEST_TIMEOUT_S = 3.0
"""A request without a complete answer after this long has an unknown outcome."""
MAX_IN_FLIGHT = 800
"""Requests waiting for an answer of one API process, each on a connection of its own; an arrival beyond this is
counted as dropped."""
LATE_AFTER_S = 0.1
"""An arrival sent this much after its intended time counts as late."""
MAX_LAG_S = 5.0
"""A generator this far behind its own schedule stops: what it measures is itself."""
TICK_S = 0.002
"""The generator looks at its schedule this often: waking up costs more CPU than sending."""
LIFECYCLE_TRIES = 60
LIFECYCLE_RETRY_S = 0.25
SEED_CONCURRENCY = 128
SEED_TRIES = 5

DEFINITE_STATUSES: Final = frozenset({400, 401, 403, 404, 405, 409, 411, 413, 414, 415, 422, 429, 431})
"""Refusals by status alone: the service answered, and it answers these before or instead of posting."""


class Answer(msgspec.Struct):
    """The fields of any answer that the client looks at; unknown ones are ignored."""

    outcome: str | None = None
    replayed: bool | None = None
    seq: int | None = None
    balance_minor: int | None = None
    bet_id: str | None = None
    source: str | None = None
    stale: bool | None = None
    as_of_ms: int | None = None
    page_rows: int | None = None
    """Of a page of entries: how many came."""
    page_cut: bool | None = None
    """Of a page of entries: whether there are more."""
    state: str | None = None
    settled: bool | None = None
    settlement_version: int | None = None
    title: str | None = None


class BulkItem(Answer):
    """One result of a bulk."""

    status: int = 0
    admitted: bool | None = None


class BulkItems(msgspec.Struct):
    """The answer to a bulk."""

    results: list[BulkItem]


class PageEntry(msgspec.Struct):
    """What the client looks at of one entry."""

    seq: int
    balance_minor: int


class EntriesPage(msgspec.Struct):
    """A page of a wallet's entries."""

    entries: list[PageEntry]
    next_cursor: str | None = None


_decode = msgspec.json.Decoder(Answer).decode
_decode_page = msgspec.json.Decoder(EntriesPage).decode
_decode_bulk = msgspec.json.Decoder(BulkItems).decode
_NO_ANSWER = Answer()


@dataclass(slots=True)
class Result:
    """What became of one attempt: `record` is ok, fail or info."""

    record: str
    status: int | None
    answer: Answer
    error: str | None = None

    @property
    def stored(self) -> bool:
        """Return whether the service keeps this answer under the key."""
        return self.record == "ok" or self.status == 422


def classify(status: int, not_admitted: bool) -> str:
    """Return what an HTTP answer says about its command: "ok", "fail" (certainly no effect) or "info".

    2xx is ok. A refusal (422, 409) and a rejected request (400, 429 and other client errors that are
    answered without posting) are fail; so is a 503 that certifies `x-admitted: 0`. Everything else leaves
    open whether the command had its effect.
    """
    if 200 <= status < 300:
        return "ok"
    if status in DEFINITE_STATUSES or (status == 503 and not_admitted):
        return "fail"
    return "info"


Identity = tuple[str, int | None, str]
"""What a key identifies a command by: its family (`fates.LEDGER_OPS` are one), its wallet, and the key."""


def identity_of(command: Command) -> Identity:
    """Return the identity of a command with a key: a bet and the rollback of its key are two."""
    return "ledger" if command.op in LEDGER_OPS else command.op, command.user, command.key or ""


class _State:
    """What is known of an arrival's key."""

    NONE, IN_FLIGHT, STORED, UNKNOWN, FAILED = range(5)


class Client:
    """Sends commands over one connection pool per API process and records both ends of every attempt."""

    def __init__(
        self,
        wires: Sequence[Wire],
        recorder: Recorder,
        clock: Callable[[], float],
        *,
        token: str = "",
        grpc_wires: Sequence[GrpcWire] = (),
    ) -> None:
        self.wires = wires
        self.recorder = recorder
        self.clock = clock
        self._token = token
        self.grpc_wires = grpc_wires
        """One per API process, or none: then everything goes over HTTP."""
        self._in_flight = [0] * len(wires)
        self.sent = 0
        self.acknowledged_bets = 0
        self.refused = 0
        self.failed = 0
        self.unknown_count = 0
        self.unknown: dict[Identity, Command] = {}
        """Commands with an unknown outcome, for the resolution at the end."""
        self.last_unknown_sent_s = 0.0
        """When the last request that stayed without an answer was sent."""
        self._heads: dict[int, int] = {}
        """Newest seq each wallet's owner has seen."""
        self._attempts = 0
        self._free_clients: list[int] = []
        self._clients = 0

    @property
    def in_flight(self) -> int:
        """Return how many requests wait for an answer."""
        return sum(self._in_flight)

    # -- one attempt -----------------------------------------------------------------------------------

    async def attempt(
        self,
        command: Command,
        api: int,
        intended_s: float,
        tag: str | None = None,
        *,
        timeout_s: float | None = None,
        via: GrpcWire | None = None,
    ) -> Result:
        """Send a command once (over gRPC if `via` is given), record both ends, and say what became of it."""
        attempt, client, sent_s = self._invoke(command, api, intended_s, tag)
        self._in_flight[api] += 1
        self.sent += 1
        try:
            result = await self._exchange(command, api, timeout_s, via)
        except NotSent as error:
            result = Result("fail", None, _NO_ANSWER, str(error))
        except Lost as error:
            result = Result("info", None, _NO_ANSWER, str(error))
        except asyncio.CancelledError:
            self._complete(attempt, client, Result("info", None, _NO_ANSWER, "the client was stopped"))
            raise
        finally:
            self._in_flight[api] -= 1
        self._complete(attempt, client, result)
        self._learn(command, result, sent_s)
        return result

    async def _exchange(self, command: Command, api: int, timeout_s: float | None, via: GrpcWire | None) -> Result:
        if via is not None:
            status, not_admitted, answer = await via.place_bet(command)
            record = classify(status, not_admitted)
            return Result(
                record, status, msgspec.convert(answer, Answer), None if record == "ok" else answer.get("title")
            )
        body, key = command.body, command.key or ""
        request = get(command.path, self._token) if body is None else post(command.path, key, body, self._token)
        reply = await self.wires[api].exchange(request, timeout_s)
        return _page_of(reply) if command.op == "entries" else _result_of(reply)

    def _invoke(self, command: Command, api: int, intended_s: float, tag: str | None) -> tuple[int, int, float]:
        """Record that an attempt begins; return its number, its client and when it began."""
        client = self._free_clients.pop() if self._free_clients else self._new_client()
        self._attempts += 1
        attempt = self._attempts
        sent_s = self.clock()
        self.recorder.append(
            {
                "record": "invoke",
                "attempt": attempt,
                "client": client,
                "op": command.op,
                "key": command.key,
                "payload_hash": command.payload_hash,
                "user": command.user,
                "api": f"api{api}",
                "match_id": command.match_id,
                "bet_id": command.bet_id,
                "selection": command.selection,
                "side": command.side,
                "odds": command.odds,
                "amount": command.amount,
                "min_seq": command.min_seq,
                "strong": command.strong,
                "after_seq": command.after_seq,
                "intended": intended_s,
                "t": sent_s,
                "tag": tag or command.tag,
            }
        )
        return attempt, client, sent_s

    async def attempt_bulk(self, commands: Sequence[Command], api: int, intended_s: float) -> list[Result]:
        """Send many commands in one request; each is an attempt of its own with a result of its own."""
        begun = [self._invoke(command, api, intended_s, None) for command in commands]
        self._in_flight[api] += 1
        self.sent += len(commands)
        whole: Result | None = None
        results: list[Result] = []
        try:
            request = post("/v1/commands", "", workload.bulk_body(commands), self._token)
            reply = await self.wires[api].exchange(request)
            whole = _result_of(reply)
            if whole.record == "ok":
                results = _results_of_bulk(reply.body, len(commands))
        except NotSent as error:
            whole = Result("fail", None, _NO_ANSWER, str(error))
        except Lost as error:
            whole = Result("info", None, _NO_ANSWER, str(error))
        except asyncio.CancelledError:
            whole = Result("info", None, _NO_ANSWER, "the client was stopped")
            raise
        finally:
            self._in_flight[api] -= 1
            if not results:
                assert whole is not None, "every path above sets it"
                results = [whole] * len(commands)
            for (attempt, client, sent_s), command, result in zip(begun, commands, results, strict=True):
                self._complete(attempt, client, result)
                self._learn(command, result, sent_s)
        return results

    def go_on_from(self, attempts: int, clients: int) -> None:
        """Go on with numbers of attempts and clients behind those that others have used in the same history."""
        self._attempts, self._clients = attempts, clients

    def _new_client(self) -> int:
        self._clients += 1
        return self._clients

    def _complete(self, attempt: int, client: int, result: Result) -> None:
        answer = result.answer
        self.recorder.append(
            {
                "record": result.record,
                "attempt": attempt,
                "client": client,
                "t": self.clock(),
                "status": result.status,
                "outcome": answer.outcome,
                "replayed": answer.replayed,
                "seq": answer.seq,
                "balance": answer.balance_minor,
                "bet_id": answer.bet_id,
                "source": answer.source,
                "stale": answer.stale,
                "as_of": None if answer.as_of_ms is None else answer.as_of_ms / 1000,
                "page_rows": answer.page_rows,
                "page_cut": answer.page_cut,
                "error": result.error,
            }
        )
        # A client whose request is still open somewhere is not used again.
        if result.record != "info":
            self._free_clients.append(client)

    def _learn(self, command: Command, result: Result, sent_s: float) -> None:
        """Keep what later arrivals and the progress display need."""
        answer = result.answer
        if result.record == "ok":
            if command.op == "bet" and not answer.replayed:
                self.acknowledged_bets += 1
            user, seq = command.user, answer.seq
            if user is not None and seq is not None and seq > self._heads.get(user, 0):
                self._heads[user] = seq
        elif result.record == "fail":
            if result.stored or result.status == 409:
                self.refused += 1
            else:
                self.failed += 1
        else:
            self.unknown_count += 1
            self.last_unknown_sent_s = max(self.last_unknown_sent_s, sent_s)
            if command.key is not None:
                # The first body of a key is the one it was meant for; a later one only asked whether it differs.
                self.unknown.setdefault(identity_of(command), command)

    def head_of(self, user: int) -> int | None:
        """Return the newest seq that the owner of a wallet has seen."""
        return self._heads.get(user)

    async def state_of(self, match_id: str) -> Answer | None:
        """Return what the service says of a match, or None while it cannot say. It is not recorded."""
        for wire in self.wires:
            try:
                reply = await wire.exchange(get(f"/v1/matches/{match_id}", self._token))
            except (NotSent, Lost):
                continue
            if reply.status == 200:
                return _decode(reply.body)
            if reply.status == 404:
                return Answer(state="UNKNOWN")
        return None

    async def retry_unknown(self, identities: Iterable[Identity]) -> list[tuple[Command, Result]]:
        """Send these commands once more under the same keys and return what was answered."""
        commands = [self.unknown[identity] for identity in identities]
        results: list[tuple[Command, Result]] = []

        async def again(command: Command, number: int) -> None:
            result = await self.attempt(command, number % len(self.wires), self.clock(), "final_retry")
            results.append((command, result))

        await self._each(again(command, number) for number, command in enumerate(commands))
        return results

    async def _each(self, coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run many coroutines, SEED_CONCURRENCY at a time; the first error stops all."""
        waiting = iter(coroutines)

        async def worker() -> None:
            for coroutine in waiting:
                await coroutine

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(SEED_CONCURRENCY):
                    group.create_task(worker())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors


class Player(Client):
    """Plays a schedule: a client whose commands were drawn beforehand and arrive whatever becomes of earlier ones."""

    def __init__(
        self,
        schedule: Schedule,
        wires: Sequence[Wire],
        recorder: Recorder,
        clock: Callable[[], float],
        origin_unix_s: float,
        *,
        token: str = "",
        grpc_wires: Sequence[GrpcWire] = (),
    ) -> None:
        super().__init__(wires, recorder, clock, token=token, grpc_wires=grpc_wires)
        self.schedule = schedule
        self.origin_unix_s = origin_unix_s
        self.dropped = 0
        self.skipped = 0
        self.late = 0
        self.due = 0
        """Arrivals whose time has come, sent or not."""
        self.lags_s = array("d")
        self.last_lag_s = 0.0
        self.gave_up = False
        self._state = bytearray(len(schedule))
        self._bet_ids: dict[int, str] = {}
        self._steps: dict[int, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    # -- the open schedule -----------------------------------------------------------------------------

    async def run(self, start_s: float) -> None:
        """Play the whole schedule, its time zero being `start_s`, and wait for the last answer.

        Raises whatever an arrival's task raised: that is a fault of the harness, never an answer.
        """
        times = (self.schedule.t + start_s).tolist()
        kinds = [Kind(kind) for kind in self.schedule.kind.tolist()]
        apis = self.schedule.api.tolist()
        for arrival, intended_s in enumerate(times):
            now = self.clock()
            while now < intended_s:
                await asyncio.sleep(max(intended_s - now, TICK_S))
                now = self.clock()
            if self._failure is not None:
                break
            lag_s = now - intended_s
            self.lags_s.append(lag_s)
            self.last_lag_s = lag_s
            self.due = arrival + 1
            if lag_s > LATE_AFTER_S:
                self.late += 1
                if lag_s > MAX_LAG_S:
                    self.gave_up = True
                    break
                # Far behind, this loop would otherwise never let an answer in.
                if arrival % 16 == 0:
                    await asyncio.sleep(0)
            kind = kinds[arrival]
            if self._in_flight[apis[arrival]] >= MAX_IN_FLIGHT and kind not in workload.LIFECYCLE:
                self.dropped += 1
                continue
            self._spawn(self._arrive(arrival, kind, intended_s))
        await self.settle_down()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error

    async def settle_down(self) -> None:
        """Wait until no arrival is at work any more; raise what one of them raised."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Cancel what is at work; its attempts are recorded as unknown."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _arrive(self, arrival: int, kind: Kind, intended_s: float) -> None:
        schedule = self.schedule
        api = int(schedule.api[arrival])
        user = int(schedule.user[arrival])
        if kind in {Kind.BET, Kind.DEPOSIT, Kind.WITHDRAW, Kind.BEYOND, Kind.LATE}:
            await self._post_own(arrival, schedule.command(arrival), api, intended_s)
        elif kind is Kind.BALANCE:
            # The amount of a read is its drawn choice: of 20, two are strong and ten ask for their writes.
            choice = int(schedule.amount[arrival]) % 20
            min_seq = self._heads.get(user) if choice < 10 else None
            await self.attempt(workload.balance(user, strong=choice >= 18, min_seq=min_seq), api, intended_s)
        elif kind is Kind.ENTRIES:
            after = max(0, self._heads.get(user, 0) - 20)
            await self.attempt(workload.entries(user, after), api, intended_s)
        elif kind is Kind.IMPATIENT:
            await self.attempt(schedule.command(arrival), api, intended_s, timeout_s=schedule.patience_s(arrival))
        elif kind is Kind.RACE:
            await self._race(arrival, api, intended_s)
        elif kind is Kind.CONTEND:
            await self._contend(arrival, api, intended_s)
        elif kind is Kind.BULK:
            await self.attempt_bulk(schedule.bulk(arrival), api, intended_s)
        elif kind is Kind.ROLLBACK:
            await self._rollback(arrival, api, intended_s)
        elif kind is Kind.GRPC:
            via = self.grpc_wires[api] if self.grpc_wires else None
            await self.attempt(schedule.command(arrival), api, intended_s, via=via)
        elif kind in workload.LIFECYCLE:
            await self._lifecycle(kind, int(schedule.match[arrival]), api, intended_s)
        else:
            await self._about_target(arrival, kind, api, intended_s)

    async def _post_own(
        self, arrival: int, command: Command, api: int, intended_s: float, tag: str | None = None
    ) -> None:
        """Post an arrival's own command, or post it again, and remember what its key is worth."""
        if self._state[arrival] == _State.NONE:
            self._state[arrival] = _State.IN_FLIGHT
        result = await self.attempt(command, api, intended_s, tag)
        if result.record == "info":
            self._state[arrival] = _State.UNKNOWN
        elif self._state[arrival] != _State.UNKNOWN:
            if result.stored:
                self._state[arrival] = _State.STORED
            elif self._state[arrival] != _State.STORED:
                self._state[arrival] = _State.FAILED
        if result.answer.bet_id is not None:
            self._bet_ids[arrival] = result.answer.bet_id

    async def _about_target(self, arrival: int, kind: Kind, api: int, intended_s: float) -> None:
        """Cancel, repeat or contradict an earlier command, if that one got far enough."""
        schedule = self.schedule
        target = int(schedule.target[arrival])
        state = self._state[target]
        if kind is Kind.CANCEL and target in self._bet_ids:
            original = schedule.command(target)
            command = workload.cancel(
                int(schedule.user[target]),
                original.match_id or "",
                self._bet_ids[target],
                schedule.key_of(arrival),
            )
            await self.attempt(command, api, intended_s)
        elif kind is Kind.RETRY and state in {_State.STORED, _State.FAILED}:
            await self._post_own(target, schedule.command(target), api, intended_s, "retry")
        elif kind is Kind.OTHER_BODY and state == _State.STORED:
            other = schedule.command(target)
            command = workload.bet(
                user=int(schedule.user[target]),
                match_id=other.match_id or "",
                selection=other.selection or "",
                side=Side(other.side or ""),
                odds=other.odds or 0,
                stake_minor=(other.amount or 0) + 10,
                key=schedule.key_of(target),
                tag="other_body",
            )
            result = await self.attempt(command, api, intended_s)
            if result.record == "info":
                self._state[target] = _State.UNKNOWN
        else:
            self.skipped += 1

    async def _race(self, arrival: int, api: int, intended_s: float) -> None:
        """Send one bet to two API processes at the same moment."""
        command = self.schedule.command(arrival)
        other = (api + 1) % len(self.wires)
        await asyncio.gather(
            self._post_own(arrival, command, api, intended_s),
            self._post_own(arrival, command, other, intended_s),
        )

    async def _rollback(self, arrival: int, api: int, intended_s: float) -> None:
        """Send a bet and the rollback of its key, in an order that the arrival's stake decides."""
        bet = self.schedule.command(arrival)
        back = workload.rollback(bet.user or 0, bet.key or "")
        other = (api + 1) % len(self.wires)
        order = (bet.amount or 0) // 10 % 3
        if order == 0:
            await self.attempt(back, api, intended_s)
            await self.attempt(bet, other, self.clock())
        elif order == 1:
            await asyncio.gather(self.attempt(bet, api, intended_s), self.attempt(back, other, intended_s))
        else:
            await self.attempt(bet, api, intended_s)
            await self.attempt(back, other, self.clock())

    async def _contend(self, arrival: int, api: int, intended_s: float) -> None:
        """Deposit, then withdraw all of it twice at once: the wallet can pay one of the two at most."""
        user = int(self.schedule.user[arrival])
        amount = int(self.schedule.amount[arrival])
        key = self.schedule.key_of(arrival)
        opened = await self.attempt(workload.deposit(user, amount, f"{key}-in", "contend"), api, intended_s)
        if opened.record != "ok":
            return
        now = self.clock()
        other = (api + 1) % len(self.wires)
        await asyncio.gather(
            self.attempt(workload.withdraw(user, amount, f"{key}-a", "contend"), api, now),
            self.attempt(workload.withdraw(user, amount, f"{key}-b", "contend"), other, now),
        )

    # -- matches ---------------------------------------------------------------------------------------

    async def _lifecycle(self, kind: Kind, match: int, api: int, intended_s: float) -> None:
        """Take one step of a match, after its earlier steps; try again while it certainly did not happen."""
        lock = self._steps.setdefault(match, asyncio.Lock())
        async with lock:
            await self._step(kind, match, api, intended_s, "")

    async def _step(self, kind: Kind, match: int, api: int, intended_s: float, suffix: str) -> Result:
        command = self.schedule.lifecycle_command(kind, match, self.origin_unix_s, suffix)
        unknown = 0
        if kind in workload.RESETTLES:
            await self._spend(match, api, f"-{kind.name.lower()}{suffix}")
        for number in range(LIFECYCLE_TRIES):
            result = await self.attempt(
                command, (api + number) % len(self.wires), intended_s, "retry" if number else None
            )
            if result.record == "ok" or result.status in DEFINITE_STATUSES:
                break
            if result.record == "info":
                # The old key is retired. A step is a compare-and-set, so a new key asks again safely.
                unknown += 1
                command = self.schedule.lifecycle_command(kind, match, self.origin_unix_s, f"{suffix}-u{unknown}")
            await asyncio.sleep(LIFECYCLE_RETRY_S)
            intended_s = self.clock()
        if kind is Kind.CREATE and result.record == "ok" and self.schedule.matches[match].corrections:
            for spender_command in self.schedule.spender_commands(match):
                if (await self.attempt(spender_command, api, self.clock())).record != "ok":
                    break
        return result

    async def _spend(self, match: int, api: int, suffix: str) -> None:
        """Withdraw all that the spender of a match holds; whether it can is not what this is about."""
        user = workload.SPENDERS_FROM + match
        read = await self.attempt(workload.balance(user, strong=True, min_seq=None), api, self.clock())
        held = read.answer.balance_minor
        if read.record == "ok" and held:
            key = f"w{self.schedule.seed}-m{match}-spent{suffix}"
            await self.attempt(workload.withdraw(user, held, key, "spender"), api, self.clock())

    async def match_state(self, match: int) -> Answer | None:
        """Return what the service says of a match of the schedule, or None while it cannot say. Not recorded."""
        return await self.state_of(str(self.schedule.matches[match].match_id))

    async def finish_matches(self, deadline_s: float) -> list[str]:
        """Close, settle (or void) and correct every match that is left; return the ids of those still unpaid then.

        `deadline_s` is on the run's clock.
        """
        left: dict[int, int] = dict.fromkeys(range(len(self.schedule.matches)), 0)
        while left and self.clock() < deadline_s:
            done = await asyncio.gather(*(self._finish(match, tries) for match, tries in left.items()))
            for match, finished in zip(list(left), done, strict=True):
                if finished:
                    del left[match]
                else:
                    left[match] += 1
            if left:
                await asyncio.sleep(LIFECYCLE_RETRY_S)
        return [str(self.schedule.matches[match].match_id) for match in left]

    async def _finish(self, match: int, tries: int) -> bool:
        """Take a match one step towards its end; return whether all its bets are paid."""
        async with self._steps.setdefault(match, asyncio.Lock()):
            answer = await self.match_state(match)
            if answer is None:
                return False
            plan = self.schedule.matches[match]
            step = None
            if answer.state == "OPEN":
                step = Kind.CLOSE if plan.closes_first else Kind.VOID
            elif answer.state == "CLOSED":
                step = Kind.VOID if plan.void else Kind.SETTLE
            elif answer.settled and not plan.void:
                step = _correction_due(plan, answer.settlement_version)
            if step is not None:
                await self._step(step, match, match % len(self.wires), self.clock(), f"-end{tries}")
                return False
            return answer.state in {"SETTLED", "UNKNOWN"} or bool(answer.settled)

    # -- before and after the load ---------------------------------------------------------------------

    async def seed(self) -> None:
        """Open the wallets and the first matches. Raises NotSeeded if one of them cannot be."""
        deposits = (
            (workload.deposit(user, amount, f"w{self.schedule.seed}-seed-{user}", "seed"), user)
            for user, amount in self.schedule.seed_deposits
        )
        await self._each(self._seed_one(command, number) for command, number in deposits)
        first = [i for i, plan in enumerate(self.schedule.matches) if plan.created_s < 0.0]
        await self._each(self._lifecycle(Kind.CREATE, match, match % 2, self.clock()) for match in first)
        for match in first:
            answer = await self.match_state(match)
            if answer is None or answer.state != "OPEN":
                raise NotSeeded("a match could not be created while the run was being seeded")

    async def open(self, command: Command) -> None:
        """Do an opening deposit. Raises NotSeeded if it is not accepted."""
        await self._seed_one(command, 0)

    async def _seed_one(self, command: Command, number: int) -> None:
        for _ in range(SEED_TRIES):
            result = await self.attempt(command, number % len(self.wires), self.clock())
            if result.record == "ok":
                return
            if result.record == "info":
                break
            await asyncio.sleep(LIFECYCLE_RETRY_S)
        raise NotSeeded(
            f"the opening deposit of wallet {command.user} was not accepted: "
            f"{result.answer.outcome or result.error} (status {result.status})"
        )


def _correction_due(plan: MatchPlan, version: int | None) -> Kind | None:
    """Return the correction that follows a finished settlement version by plan, or None after the last."""
    due = range(len(plan.corrections))
    return workload.RESETTLES[version - 1] if version is not None and version - 1 in due else None


class NotSeeded(Exception):
    """The run could not be prepared: the service refused what a healthy one accepts."""


def _result_of(reply: Reply) -> Result:
    """Return what a complete answer says; a 2xx that cannot be read says nothing."""
    record = classify(reply.status, reply.not_admitted)
    try:
        answer = _decode(reply.body)
    except msgspec.DecodeError:
        if record == "ok":
            return Result("info", reply.status, _NO_ANSWER, "the answer is not JSON of the agreed form")
        return Result(record, reply.status, _NO_ANSWER, "the answer has no readable body")
    return Result(record, reply.status, answer, None if record == "ok" else answer.title)


def _page_of(reply: Reply) -> Result:
    """Return what a page of entries says: its last entry, how many came, and whether there are more."""
    result = _result_of(reply)
    if result.record != "ok":
        return result
    try:
        page = _decode_page(reply.body)
    except msgspec.DecodeError:
        return Result("info", reply.status, _NO_ANSWER, "the answer is not a page of entries")
    answer = Answer(page_rows=len(page.entries), page_cut=page.next_cursor is not None)
    if page.entries:
        answer.seq, answer.balance_minor = page.entries[-1].seq, page.entries[-1].balance_minor
    return Result("ok", reply.status, answer)


def _results_of_bulk(body: bytes, count: int) -> list[Result]:
    """Return what a bulk's answer says of each command; an answer of another form says nothing of any."""
    try:
        answers = _decode_bulk(body).results
    except msgspec.DecodeError:
        answers = []
    if len(answers) != count:
        return [Result("info", 200, _NO_ANSWER, "the answer is not one result a command")] * count
    found = []
    for answer in answers:
        record = classify(answer.status, answer.admitted is False)
        found.append(Result(record, answer.status, answer, None if record == "ok" else answer.title))
    return found


def monotonic_clock(origin: float) -> Callable[[], float]:
    """Return a clock that counts seconds from `origin`, a reading of time.monotonic()."""
    monotonic = time.monotonic

    def clock() -> float:
        return monotonic() - origin

    return clock
