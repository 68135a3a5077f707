"""The checks that stop or kill processes, and those that only a larger world than this machine could run.

What they kill they start again, whatever happens; the caller heals the stack once more at the end.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

from ledgerproof.checklist.item import CannotRun, Failed, Seen, require
from ledgerproof.checklist.looking import DRAIN_TIMEOUT_S, statuses
from ledgerproof.checklist.site import Site, answered
from ledgerproof.collect import drain
from ledgerproof.wire import Reply, WireError

RECOVERY_TIMEOUT_S: Final = 90.0
POLL_S: Final = 0.1
API_BOUND_S: Final = 60.0
WORKER_BOUND_S: Final = 300.0
DATABASE_BOUND_S: Final = 600.0
"""The architecture's times of recovery."""
KILLED_SHARE: Final = 0.2
USERS: Final = 500
"""Users at once that the load check has: their connections fit into the usual limit of open files."""
USERS_ASKED: Final = 100_000
VICTIMS: Final = ("api", "relay", "projector", "matcher", "settler", "reconciler")
"""Sorts of processes, in the order in which the chaos check kills one of each."""


def _allowed(site: Site) -> None:
    if not site.breakable:
        raise CannotRun(
            "it would kill processes of a stack that is in use: say --break to allow it, or leave --stack out"
        )


async def failover(site: Site) -> str:
    """Kill one server: its wallets wait, the others go on, and what was asked meanwhile is there exactly once."""
    _allowed(site)
    stack, last = site.stack, len(site.config.servers) - 1
    if last == 0:
        raise CannotRun("the stack has one server only: there is no other that could go on")
    hurt, unhurt = site.wallet_on(last), site.wallet_on(0)
    name = site.config.servers[last].name
    began = time.monotonic()
    await asyncio.to_thread(stack.kill, name)
    try:
        during = await site.deposit(hurt, "failover")
        require(during.status != 202, f"a wallet of {name} was answered 202 while the server was dead")
        other = await site.deposit(unhurt, "failover-other")
        require(other.status == 202, f"with {name} dead, a wallet of another server was answered {other.status}")
    finally:
        await asyncio.to_thread(stack.start_node, name)
    took_s = await _until(site, lambda: site.deposit(hurt, "failover"), began)
    require(took_s < DATABASE_BOUND_S, f"{name} took {took_s:.1f} s; {DATABASE_BOUND_S:g} s are allowed")
    await drain(site.config, DRAIN_TIMEOUT_S, site.show)
    count = (await site.as_auditor(site.config.servers[last], "entries_of_key", hurt, f"{site.run_id}-failover"))[0]
    require(count == 1, f"the key that was sent again and again has {count} entries")
    return (
        f"{name} killed: its wallet answered {during.status} and the other server's {other.status}; restarted, "
        f"accepted again after {took_s:.1f} s, 1 entry (no replica here: the same server was started again)"
    )


async def chaos(site: Site) -> Seen:
    """Kill a fifth of the processes at once: the rest goes on answering, and nothing is lost or done twice."""
    _allowed(site)
    stack, nodes = site.stack, site.service_nodes()
    count = math.ceil(KILLED_SHARE * len(nodes))
    victims = _victims(site, count)
    left = [api for api in site.apis if api not in victims]
    if not left:
        raise CannotRun("the stack has one API process only: with it dead, nobody would answer")
    began = time.monotonic()
    for node in victims:
        await asyncio.to_thread(stack.kill, node)
    recovered: dict[str, float] = {}
    try:
        replies = await site.deposits(site.wallets, "chaos", api=left[0])
    finally:
        for node in victims:
            await asyncio.to_thread(stack.start_node, node)
            recovered[node] = time.monotonic() - began
    require(
        all(reply.status == 202 for reply in replies),
        f"with {', '.join(victims)} dead, {left[0]} answered {statuses(replies)}",
    )
    await drain(site.config, DRAIN_TIMEOUT_S, site.show)
    whole_s = time.monotonic() - began
    again = await site.deposits(site.wallets, "chaos", api=site.apis[0])
    fresh = [reply for reply in again if reply.status != 202 or not answered(reply)["replayed"]]
    require(not fresh, f"{len(fresh)} of {len(again)} keys were not replayed after the recovery: {statuses(fresh)}")
    for node, took_s in recovered.items():
        bound_s = API_BOUND_S if node in site.apis else WORKER_BOUND_S
        require(took_s < bound_s, f"{node} was ready after {took_s:.1f} s; {bound_s:g} s are allowed")
    times = ", ".join(f"{node} ready after {took_s:.1f} s" for node, took_s in recovered.items())
    evidence = (
        f"{count} of {len(nodes)} processes killed ({times}); {len(replies)} deposits meanwhile all accepted and, sent "
        f"again, all replayed; backlog drained after {whole_s:.1f} s"
    )
    figures = {f"{node.rstrip('0123456789')}_ready_s": round(took_s, 3) for node, took_s in recovered.items()}
    return Seen(evidence, {**figures, "drained_s": round(whole_s, 3)})


def _victims(site: Site, count: int) -> list[str]:
    """Return the processes to kill: the last of each sort, the API first, unless it is alone."""
    found: list[str] = []
    for sort in VICTIMS:
        names = site.stack.nodes_of(sort)
        if names and not (sort == "api" and len(names) == 1):
            found.append(names[-1])
    return found[:count]


async def load(site: Site) -> str:
    """100,000 users at once do not fit; as many as fit are tried and named."""
    users = [site.first_wallet + 1_000 + number for number in range(USERS)]
    began = time.monotonic()

    async def one(number: int) -> tuple[int, float]:
        reply = await site.deposit(users[number], "load", api=site.apis[number % len(site.apis)])
        return reply.status, time.monotonic() - began

    done = await asyncio.gather(*(one(number) for number in range(USERS)))
    accepted = sorted(at_s for status, at_s in done if status == 202)
    slowest = f", the slowest after {accepted[-1] * 1000:.0f} ms" if accepted else ""
    text = f"of {USERS} users at the same moment {len(accepted)} were accepted{slowest}"
    require(len(accepted) == USERS, f"{text}; the others were turned away")
    raise CannotRun(
        f"{USERS_ASKED:,} users need more than one machine. Nearest: {text}; `ledgerproof bench` finds the highest "
        "rate, and `ledgerproof sla` how many machines would carry the whole"
    )


async def rollout(site: Site) -> str:
    """Shares of traffic need a router before the pods; the nearest is to replace the processes one by one."""
    why = "shares of 10 to 100 % need a router in front of many processes, which this stack does not have"
    if not site.breakable or len(site.apis) < 2:
        raise CannotRun(why)
    accepted = 0
    for number, node in enumerate(site.apis):
        other = site.apis[(number + 1) % len(site.apis)]
        stopping = asyncio.ensure_future(asyncio.to_thread(site.stack.stop, node))
        try:
            replies = await site.deposits(site.wallets, f"rollout-{number}", api=other)
        finally:
            await stopping
            await asyncio.to_thread(site.stack.start_node, node)
        require(
            all(reply.status == 202 for reply in replies),
            f"while {node} was replaced, {other} answered {statuses(replies)}",
        )
        accepted += len(replies)
    raise CannotRun(
        f"{why}. Nearest: each of {len(site.apis)} API processes was stopped in order and started again while another "
        f"accepted {accepted} of {accepted} deposits"
    )


async def on_call(_site: Site) -> str:
    """People are not processes."""
    raise CannotRun("no program can see whether a person is on call")


async def _until(site: Site, send: Callable[[], Awaitable[Reply]], began: float) -> float:
    """Send until the answer is 202 and return the seconds since `began`. Raises Failed after a bound."""
    last = "nothing"
    while time.monotonic() - began < RECOVERY_TIMEOUT_S:
        try:
            reply = await send()
        except WireError as error:
            last = str(error)
        else:
            if reply.status == 202:
                return time.monotonic() - began
            last = str(reply.status)
        site.show(f"waiting for an accepted deposit, last answer {last}")
        await asyncio.sleep(POLL_S)
    raise Failed(f"not recovered within {RECOVERY_TIMEOUT_S:g} s; last answer {last}")
