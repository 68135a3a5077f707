"""Carries out the steps of a plan's clients against the API: every attempt recorded, every wait on a condition."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from compose.errors import StackError
from compose.stack import Stack
from invariants.history import HUNG_UP
from ledgerproof import workload
from ledgerproof.client import DEFINITE_STATUSES, LIFECYCLE_RETRY_S, LIFECYCLE_TRIES, Answer, Client, Result
from ledgerproof.collect import NotDrained, drain
from ledgerproof.plan import format as plans
from ledgerproof.plan.faults import Breaker
from ledgerproof.plan.places import Places, command_of
from ledgerproof.workload import Command
from reference.commands import Side
from reference.errors import LedgerError
from reference.routing import shard_of
from reference.shards import move_shard

POLL_S: Final = 0.05
"""A condition is looked at this often."""
READY_TRIES: Final = 40
_MATCH_STEPS: Final = (
    plans.CreateMatch,
    plans.CloseMatch,
    plans.SettleMatch,
    plans.VoidMatch,
    plans.ResettleMatch,
)
_NOT_KNOWN = Result("fail", None, Answer(), "left out: what it refers to is not known")


class Astray(Exception):
    """The run cannot go on as planned; the message says where and why."""


class Performer:
    """One run of a plan's clients."""

    def __init__(self, plan: plans.Plan, places: Places, client: Client, stack: Stack, breaker: Breaker) -> None:
        self.plan = plan
        self.places = places
        self.client = client
        self._stack = stack
        self._config = stack.config
        self._breaker = breaker
        self._issued: dict[str, Command] = {}
        """By the plan's name of the key: what was sent under it."""
        self._bets: dict[str, str] = {}
        """By the plan's name of the key: the id of the bet that was placed."""
        self._signals: dict[str, asyncio.Event] = {}
        self._rng: dict[str, random.Random] = {}
        self._outcomes = {match.name: match.outcomes for match in plan.matches}
        self.succeeded: Counter[str] = Counter()
        """Attempts that were accepted, by operation."""
        self.problems: list[str] = []
        """What did not go as planned."""
        self.left_out = 0
        """Steps that could not be sent, for what they refer to was never answered."""

    # -- before and after the clients ------------------------------------------------------------------

    async def prepare(self) -> None:
        """Open the wallets and the matches. Raises Astray if one of them cannot be."""
        for match in self.plan.matches:
            if match.opened:
                step = plans.CreateMatch(match=match.name)
                key = f"{self.places.prefix}create-{match.name}"
                await self._surely(command_of(step, self.places, key, match.outcomes))
        for wallet in self.plan.wallets:
            if wallet.deposit_minor:
                key = f"{self.places.prefix}seed-{wallet.name}"
                await self._surely(workload.deposit(self.places.users[wallet.name], wallet.deposit_minor, key, "seed"))

    async def _surely(self, command: Command) -> None:
        result = _NOT_KNOWN
        for number in range(READY_TRIES):
            result = await self._attempt(command, number % len(self.client.wires), None)
            if result.record == "ok":
                self.succeeded[command.op] += 1
                return
            await asyncio.sleep(LIFECYCLE_RETRY_S)
        raise Astray(f"{command.op} under {command.key} was not accepted: {result.answer.outcome or result.error}")

    async def finish(self, within_s: float) -> list[str]:
        """Bring every match to the end that the plan names; return those that are not there in time."""
        deadline = time.monotonic() + within_s
        wanted = [match for match in self.plan.matches if match.ends != "leave"]
        done = await asyncio.gather(*(self._finish(match, deadline) for match in wanted))
        return [match.name for match, finished in zip(wanted, done, strict=True) if not finished]

    async def _finish(self, match: plans.Match, deadline: float) -> bool:
        number = 0
        while time.monotonic() < deadline:
            found = await self.client.state_of(self.places.matches[match.name])
            step: plans.Command | None = None
            if found is None:
                pass
            elif found.state == "UNKNOWN" or found.settled:
                return True
            elif found.state in {"OPEN", "CLOSED"} and match.ends == "void":
                step = plans.VoidMatch(match=match.name)
            elif found.state == "OPEN":
                step = plans.CloseMatch(match=match.name)
            elif found.state == "CLOSED":
                step = plans.SettleMatch(match=match.name, result=match.ends)
            if step is None:
                await asyncio.sleep(LIFECYCLE_RETRY_S / 2)
                continue
            number += 1
            key = f"{self.places.prefix}end-{match.name}-{number}"
            result = await self._attempt(command_of(step, self.places, key), number, None)
            if result.record == "ok":
                self.succeeded[str(step.__struct_config__.tag)] += 1
        return False

    # -- clients ---------------------------------------------------------------------------------------

    async def perform(self) -> None:
        """Run all clients at the same time. Raises Astray at the first that cannot go on, or when time is over."""
        try:
            async with asyncio.timeout(self.plan.timeout_s), asyncio.TaskGroup() as group:
                for each in self.plan.clients:
                    group.create_task(self._client(each))
        except TimeoutError as error:
            raise Astray(f"the clients did not end within {self.plan.timeout_s:g} s") from error
        except BaseExceptionGroup as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from errors

    async def _client(self, client: plans.Client) -> None:
        self._rng[client.name] = random.Random(f"{self.plan.seed}/{client.name}")  # noqa: S311 - a seeded choice
        keys = plans.keys_of(client)
        for number, step in enumerate(client.steps):
            where = f"{client.name}, step {number} ({step.__struct_config__.tag})"
            try:
                await self._step(client.name, step, keys[number], where)
            except (StackError, LedgerError) as error:
                raise Astray(f"{where}: {error}") from error

    async def _step(self, client: str, step: plans.Step, keys: list[str], where: str) -> None:
        match step:
            case plans.Race():
                command = self._of_plan(step.of, keys[0])
                await asyncio.gather(*(self._send(command, step.of, keys[0], api, where) for api in step.apis))
            case plans.Bulk():
                await self._bulk(client, step, keys, where)
            case plans.Repeat():
                await self._repeat(client, step, keys, where)
            case plans.Signal():
                self._signal(step.name).set()
            case plans.Wait():
                await self._wait(step, where)
            case plans.MoveShard():
                shard = shard_of(self.places.users[step.wallet])
                login = self._stack.superuser
                # In a loop of its own: copying must not hold up the clients.
                await asyncio.to_thread(lambda: asyncio.run(move_shard(self._config, login, shard, step.to)))
            case plans.Kill() | plans.Pause() | plans.Resume() | plans.Heal() | plans.Arm() | plans.Disarm():
                await asyncio.to_thread(self._trouble, step)
            case _:
                await self._command(client, step, keys[0], where)

    def _trouble(self, step: plans.Kill | plans.Pause | plans.Resume | plans.Heal | plans.Arm | plans.Disarm) -> None:
        """Break, heal, arm or disarm; blocks until that has been seen."""
        match step:
            case plans.Kill():
                self._breaker.fault("kill", step.node)
            case plans.Pause():
                self._breaker.fault("pause", step.node)
            case plans.Heal(node=None):
                self._breaker.heal_all()
            case plans.Heal() | plans.Resume():
                self._breaker.heal(str(step.node))
            case plans.Arm():
                self._breaker.arm(step.node, step.order())
            case plans.Disarm():
                self._breaker.disarm(step.node, step.point)

    async def _command(self, client: str, step: plans.Command, name: str, where: str) -> None:
        api = self._api(client, step.api)
        command = self._built(step, name)
        if command is None:
            self.left_out += 1
            if step.expect is not None:
                self.problems.append(f"{where}: left out, for what it refers to is not known")
            return
        if not step.persist:
            await self._send(command, step, name, api, where)
            return
        unknown = 0
        for number in range(LIFECYCLE_TRIES):
            result = await self._attempt(command, api + number, step)
            if result.record == "ok" or result.status in DEFINITE_STATUSES:
                break
            if result.record == "info" and isinstance(step, _MATCH_STEPS):
                # A step of a match is a compare-and-set, so a new key asks again safely.
                unknown += 1
                command = self._of_plan(step, f"{name}-u{unknown}")
            await asyncio.sleep(LIFECYCLE_RETRY_S)
        self._learn(command, step, name, result, where)

    async def _bulk(self, client: str, step: plans.Bulk, keys: list[str], where: str) -> None:
        commands = [self._of_plan(each, key) for each, key in zip(step.commands, keys, strict=True)]
        results = await self.client.attempt_bulk(commands, self._api(client, step.api), self.client.clock())
        for each, key, command, result in zip(step.commands, keys, commands, results, strict=True):
            self._learn(command, each, key, result, where)

    async def _repeat(self, client: str, step: plans.Repeat, keys: list[str], where: str) -> None:
        left = iter(list(enumerate(keys)))

        async def worker() -> None:
            for number, key in left:
                each = step.of
                if step.wallets:
                    each = msgspec.structs.replace(each, wallet=step.wallets[number % len(step.wallets)])
                await self._send(self._of_plan(each, key), each, key, self._api(client, each.api), where)

        await asyncio.gather(*(worker() for _ in range(min(step.at_once, step.times))))

    # -- one command -----------------------------------------------------------------------------------

    def _of_plan(self, step: plans.Command, name: str) -> Command:
        """Build a command that refers to no other one, and remember it by its name."""
        outcomes = self._outcomes[step.match] if isinstance(step, plans.CreateMatch) else ()
        command = command_of(step, self.places, self.places.prefix + name, outcomes)
        self._issued[name] = command
        return command

    def _built(self, step: plans.Command, name: str) -> Command | None:
        """Build a command; None while what it refers to is not known."""
        match step:
            case plans.Balance():
                user = self.places.users[step.wallet]
                min_seq = self.client.head_of(user) if step.min_seq == "seen" else step.min_seq
                return workload.balance(user, strong=step.consistency == "strong", min_seq=min_seq)
            case plans.Rollback():
                command = workload.rollback(self.places.users[step.wallet], self.places.prefix + step.bet)
                self._issued[name] = command
                return command
            case plans.Cancel():
                bet, bet_id = self._issued.get(step.bet), self._bets.get(step.bet)
                if bet is None or bet_id is None:
                    return None
                key = self.places.prefix + name
                self._issued[name] = workload.cancel(bet.user or 0, bet.match_id or "", bet_id, key)
                return self._issued[name]
            case plans.Retry():
                return self._issued.get(step.of)
            case plans.OtherBody():
                first = self._issued.get(step.of)
                return None if first is None else _with_more(first, step.more_minor)
        return self._of_plan(step, name)

    async def _send(self, command: Command, step: plans.Command, name: str, api: int, where: str) -> None:
        self._learn(command, step, name, await self._attempt(command, api, step), where)

    async def _attempt(self, command: Command, api: int, step: plans.Command | None) -> Result:
        """Send a command once, as its step says."""
        client = self.client
        number = api % len(client.wires)
        tag = "retry" if isinstance(step, plans.Retry) else None
        if isinstance(step, plans.Bet) and step.grpc:
            return await client.attempt(command, number, client.clock(), via=client.grpc_wires[number])
        if isinstance(step, plans.Bet) and step.patience_ms is not None:
            patience_s = step.patience_ms / 1000
            return await client.attempt(command, number, client.clock(), HUNG_UP, timeout_s=patience_s)
        return await client.attempt(command, number, client.clock(), tag)

    def _learn(self, command: Command, step: plans.Command, name: str, result: Result, where: str) -> None:
        """Keep what later steps need, and compare what was answered with what the plan expects."""
        if result.record == "ok":
            self.succeeded[command.op] += 1
        if result.answer.bet_id is not None and command.op == "bet":
            self._bets[step.of if isinstance(step, plans.Retry) else name] = result.answer.bet_id
        if step.expect is not None and step.expect not in words_of(result):
            found = "/".join(sorted(words_of(result)))
            self.problems.append(
                f"{where}: {step.expect} was expected, it was {found} ({result.error or result.status})"
            )

    def _api(self, client: str, asked: int | None) -> int:
        # Drawn also where it is not used, so that a plan keeps its choices when a step begins to name one.
        drawn = self._rng[client].randrange(len(self.client.wires))
        return drawn if asked is None else asked

    # -- waits -----------------------------------------------------------------------------------------

    def _signal(self, name: str) -> asyncio.Event:
        return self._signals.setdefault(name, asyncio.Event())

    async def _wait(self, step: plans.Wait, where: str) -> None:
        """Wait until a condition holds. Raises Astray if it does not in time."""
        try:
            async with asyncio.timeout(step.timeout_s):
                if step.until == "signal":
                    await self._signal(str(step.name)).wait()
                elif step.until == "drained":
                    await drain(self._config, step.timeout_s, lambda _: None)
                elif step.until == "running":
                    await asyncio.to_thread(self._stack.wait_ready, str(step.node), step.timeout_s)
                else:
                    holds = self._condition(step)
                    while True:
                        if await holds():
                            break
                        await asyncio.sleep(POLL_S)
        except (TimeoutError, NotDrained) as error:
            place = step.point or step.match or step.node or step.name or ""
            raise Astray(f"{where}: not {step.until} {place} within {step.timeout_s:g} s") from error

    def _condition(self, step: plans.Wait) -> Callable[[], Awaitable[bool]]:
        async def unknown() -> bool:
            return self.client.unknown_count >= step.count

        async def match_is() -> bool:
            found = await self.client.state_of(self.places.matches[str(step.match)])
            if found is None:
                return False
            return bool(found.settled) if step.until == "settled" else found.state not in {"OPEN", "UNKNOWN", None}

        async def counted() -> bool:
            hits, fired = self._breaker.counts().get((str(step.node), str(step.point)), (0, 0))
            return (hits if step.until == "hit" else fired) >= step.count

        async def dead() -> bool:
            table = await asyncio.to_thread(lambda: self._stack.status(memory=False))
            return any(node.name == step.node and node.state == "dead" for node in table)

        if step.until == "unknown":
            return unknown
        if step.until in {"settled", "closed"}:
            return match_is
        return dead if step.until == "dead" else counted


def words_of(result: Result) -> set[str]:
    """Return the words of `expect` that fit a result."""
    answer = result.answer
    words = {answer.outcome} if answer.outcome else set()
    if result.record == "info":
        return words | {"unknown"}
    if answer.replayed:
        words.add("replayed")
    if result.record == "ok":
        return words | {"ok"}
    return words | {"refused" if result.status == 422 else "rejected"}


def _with_more(command: Command, more_minor: int) -> Command:
    """Return a command with the same key and a larger amount. Raises Astray for one that has no amount."""
    amount = (command.amount or 0) + more_minor
    user, key = command.user or 0, command.key or ""
    if command.op == "bet":
        return workload.bet(
            user=user,
            match_id=command.match_id or "",
            selection=command.selection or "",
            side=Side(command.side or ""),
            odds=command.odds or 0,
            stake_minor=amount,
            key=key,
            tag="other_body",
        )
    if command.op in {"deposit", "withdraw"}:
        build = workload.deposit if command.op == "deposit" else workload.withdraw
        return build(user, amount, key, "other_body")
    raise Astray(f"the {command.op} under {key} has no amount to change")
