"""Scenarios in which something breaks: answers get lost, parts are killed, servers and brokers are away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from compose.errors import StackError
from compose.probe import LivenessProbe, targets
from ledgerproof import workload
from ledgerproof.drift import Drift, PlannedDrift
from ledgerproof.faults import EdgeBook, Nemesis, PlannedFault
from ledgerproof.mutants.floor import RECOVER_S, Floor, ScenarioFailed
from ledgerproof.mutants.triggers.everyday import ALL, ANN, BOB, CYD, DEE, EVE, FAY, opened
from ledgerproof.mutants.tunnel import Weather


@contextlib.asynccontextmanager
async def weather(f: Floor, server: int, what: Weather) -> AsyncIterator[None]:
    """Make the API's way to a server bad while the block runs; something must have got lost then."""
    tunnel = f.tunnels[server]
    before = tunnel.lost
    tunnel.weather = what
    try:
        yield
    finally:
        tunnel.weather = Weather.FAIR
    if tunnel.lost == before:
        raise ScenarioFailed("nothing got lost: no request was under way")


async def lost_answers(f: Floor) -> None:
    """Commit commands whose answers never come, and lose requests before they arrive."""
    await opened(f)
    for user, server in ((ANN, 0), (CYD, 0), (BOB, 1), (DEE, 1)):
        async with weather(f, server, Weather.DEAF):
            await f.send(workload.deposit(user, 1_111, f.key("deaf")))
        await asyncio.sleep(0.15)
        # A connection that stands, for its first bytes would only say that there is none.
        await f.deposit(user, 3)
        async with weather(f, server, Weather.CUT):
            await f.send(workload.deposit(user, 2_222, f.key("cut")))
        await asyncio.sleep(0.15)
        await f.deposit(user, 9)
        await f.withdraw(user, 4, api=1)
        await f.read(user, strong=True)


async def relay_killed(f: Floor) -> None:
    """Kill the relay between the broker's acknowledgement and its mark, with work behind it."""
    await f.stop("relay0")
    f.start("relay0", apart=True)
    await f.ready("relay0")
    await opened(f)
    await f.until_sql(0, "SELECT NOT EXISTS (SELECT FROM events WHERE NOT published_to_kafka)", what="all is published")
    async with f.locked(0, "LOCK TABLE relay_progress IN EXCLUSIVE MODE"):
        await asyncio.gather(*(f.deposit(user, 50 + number) for user in (ANN, CYD, EVE) for number in range(3)))
        # It sends at once and then waits with its marks; the projector, which asks nobody, has the events soon.
        with contextlib.suppress(ScenarioFailed):
            await f.projected(ANN, 5, within_s=2.0)
        await f.kill("relay0")
    f.start("relay0")
    await f.ready("relay0")
    for user in (ANN, CYD, EVE):
        await f.deposit(user, 1)


async def relay_killed_in_outage(f: Floor) -> None:
    """Kill the relay while the broker is away, and start it again when both are back."""
    await f.stop("relay0")
    f.start("relay0", apart=True)
    await f.ready("relay0")
    await opened(f)
    await f.until_sql(0, "SELECT NOT EXISTS (SELECT FROM events WHERE NOT published_to_kafka)", what="all is published")
    await asyncio.to_thread(f.stack.pause, "kafka")
    try:
        for user in (ANN, CYD, EVE):
            await f.deposit(user, 70)
        # Some rounds of the relay.
        await asyncio.sleep(0.8)
        await f.kill("relay0")
    finally:
        await asyncio.to_thread(f.stack.resume, "kafka")
    f.start("relay0")
    await f.ready("relay0")
    await f.deposit(BOB, 1)


SLOW_COMMIT = """
CREATE FUNCTION commit_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.partition_key = '{user}' THEN
        PERFORM pg_sleep(0.7);
    END IF;
    RETURN NULL;
END $$
"""


async def slow_commit(f: Floor) -> None:
    """Let a transaction that took its place in the outbox early commit after later ones were published."""
    await opened(f)
    slow, quick = 207, 142
    await f.deposit(slow, 10)
    await f.deposit(quick, 10)
    await f.sql(0, SLOW_COMMIT.replace("{user}", str(slow)))
    await f.sql(0, "CREATE TRIGGER commit_late AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION commit_late()")
    late = asyncio.create_task(f.deposit(slow, 500))
    await asyncio.sleep(0.1)
    for number in range(5):
        await f.deposit(quick, 20 + number, api=1)
    await f.projected(quick, 6)
    await late
    await f.sql(0, "DROP TRIGGER commit_late ON events")
    await f.deposit(quick, 7)


async def matcher_killed(f: Floor) -> None:
    """Kill the matcher after its effect and before its offset, so that bets are delivered again."""
    await f.stop("matcher0")
    f.start("matcher0", apart=True)
    await f.ready("matcher0")
    await opened(f)
    m = await f.match()
    await f.bet(BOB, m, "HOME", "LAY", 233, 501)
    await f.arrived(m, 1)
    await asyncio.gather(
        f.bet(ANN, m, "HOME", "BACK", 220, 300),
        f.bet(CYD, m, "AWAY", "LAY", 300, 91),
        f.bet(DEE, m, "HOME", "BACK", 210, 55),
    )
    await f.arrived(m, 4)
    await f.kill("matcher0")
    f.start("matcher0")
    await f.ready("matcher0")
    await f.bet(EVE, m, "AWAY", "BACK", 290, 40)
    await f.arrived(m, 5)
    await f.close_match(m)
    await f.settle(m, "HOME")


HANDLED: Final = {
    "ledger_matcher": "UPDATE ON matches",
    "ledger_projector": "INSERT, UPDATE ON wallet_balance_projection",
}
"""Role → a privilege without which it cannot do its work."""


async def _handlers_broken(f: Floor) -> str:
    """Take the workers' privileges away once they have begun, and give them something to do; return the match."""
    await opened(f)
    m = await f.match()
    first = await f.deposit(ANN, 11)
    await f.projected(ANN, first.answer.seq or 0)
    for server in range(len(f.tunnels)):
        for role, what in HANDLED.items():
            await f.sql(server, f"REVOKE {what} FROM {role}")
    await asyncio.gather(*(f.deposit(user, 13) for user in (ANN, BOB, CYD)))
    await f.bet(DEE, m, "HOME", "BACK", 200, 100)
    return m


async def _handlers_mended(f: Floor) -> None:
    """Give the workers their privileges back."""
    for server in range(len(f.tunnels)):
        for role, what in HANDLED.items():
            await f.sql(server, f"GRANT {what} TO {role}")


async def handlers_fail(f: Floor) -> None:
    """Take the workers' privileges away for a moment, so that what they handle fails."""
    m = await _handlers_broken(f)
    await f.bet(FAY, m, "HOME", "LAY", 220, 70)
    # The handlers have met the error by then; they try again every half second.
    await asyncio.sleep(0.9)
    await _handlers_mended(f)
    await asyncio.sleep(0.7)


async def settler_interrupted(f: Floor) -> None:
    """Break the settler off between two servers, before it marks a page and before it finishes, time and again."""
    await opened(f)
    m = await f.match()
    await asyncio.gather(*(f.bet(user, m, "HOME", "LAY", 233, 101) for user in ALL[:3]))
    await f.arrived(m, 3)
    await asyncio.gather(*(f.bet(user, m, "HOME", "BACK", 220, 133) for user in ALL[3:]))
    await f.arrived(m, 6)
    await f.close_match(m)
    # Payouts are paused at first: what cannot be posted yet is posted later.
    for server in range(len(f.tunnels)):
        await f.sql(server, "SELECT payouts_pause('operator', 'to have a look', NULL)")
    await f.settle(m, "HOME", wait=False)
    await asyncio.sleep(0.6)
    for server in range(len(f.tunnels)):
        await f.sql(server, "SELECT payouts_resume('operator', 'nothing was wrong')")
    await f.settled(m)
    for step in (f.resettle(m, "DRAW"), f.resettle(m, "AWAY"), f.resettle(m, None)):
        for point in ("settler.between_bets", "settler.after_pay_before_mark", "settler.before_finish"):
            f.arm(point, "raise")
        await step


async def workers_restart(f: Floor) -> None:
    """End the workers in order while what they handle fails, and start them again."""
    await _handlers_broken(f)
    await f.until_sql(0, "SELECT NOT EXISTS (SELECT FROM events WHERE NOT published_to_kafka)", what="all is published")
    await f.until_sql(1, "SELECT NOT EXISTS (SELECT FROM events WHERE NOT published_to_kafka)", what="all is published")
    await asyncio.sleep(0.6)
    await asyncio.gather(f.stop("matcher0"), f.stop("projector0"))
    await _handlers_mended(f)
    f.start("matcher0")
    f.start("projector0")
    await asyncio.gather(f.ready("matcher0"), f.ready("projector0"))


async def events_come_again(f: Floor) -> None:
    """Deliver old events once more, as a relay that died before its marks does."""
    await opened(f)
    m = await f.match()
    for user in (BOB, FAY):
        await f.bet(user, m, "HOME", "LAY", 233, 120)
    await f.arrived(m, 2)
    await f.bet(ANN, m, "HOME", "BACK", 220, 90)
    await f.bet(DEE, m, "AWAY", "BACK", 300, 35)
    rest = await f.bet(CYD, m, "DRAW", "BACK", 300, 35)
    await f.arrived(m, 5)
    await f.cancel(CYD, m, rest.answer.bet_id or "")
    last = await f.deposit(EVE, 77)
    await f.projected(EVE, last.answer.seq or 0)
    for topic in ("wallet.posted", "bet.created", "bet.matched"):
        await f.send_again(topic)
    # Records that come after these, so that the last one of a wallet is an old one.
    await asyncio.sleep(0.8)
    await f.deposit(DEE, 1)


async def late_relay(f: Floor) -> None:
    """End the load while the relay is away; it comes back a little later, and the harness must wait for it."""
    await opened(f)
    await f.stop("relay0")
    for user in (ANN, BOB):
        await f.deposit(user, 90)

    async def back() -> None:
        await asyncio.sleep(4.0)
        f.start("relay0")

    f.beside(back())


async def server_killed(f: Floor) -> None:
    """Kill a server right after it acknowledged, and start it again: what was acknowledged must be there."""
    await opened(f)
    await asyncio.gather(*(f.deposit(user, 100 + number) for user in (BOB, DEE, FAY) for number in range(4)))
    await asyncio.to_thread(f.stack.kill, "pg1")
    # Its parent, which is another process, takes note of its end first: Postgres takes a zombie for alive.
    await asyncio.sleep(0.5)
    await asyncio.to_thread(f.stack.start_node, "pg1")
    await asyncio.sleep(0.5)
    for user in (BOB, DEE, FAY):
        await f.deposit(user, 1)


async def nodes_broken(f: Floor) -> None:
    """Let the harness's own nemesis kill a server and pause Redis, measured by its probe, and go on long after."""
    await opened(f)
    recording = f.recording
    book = EdgeBook(recording.timeline, recording.origin)
    planned = [PlannedFault(1, "kill", "pg1", 0.4, 1.2), PlannedFault(2, "pause", "redis", 0.5, 1.5)]
    nemesis = Nemesis(f.stack, recording.timeline, book, planned, recording.clock)
    with LivenessProbe(targets(f.stack.state), interval_s=0.1, on_edge=book.on_edge):
        # Before anything breaks the probe must have seen everything alive.
        await asyncio.sleep(0.6)
        holder = await f.owner(1)
        await holder.execute(f"BEGIN; SELECT pg_advisory_xact_lock({BOB})")
        nemesis.start(recording.clock())
        # This one waits for its wallet when the server is killed: nobody can say what became of it.
        waiting = asyncio.create_task(f.send(workload.deposit(BOB, 5, f.key("under-way"))))
        while any(thread.is_alive() for thread in nemesis._threads):
            await f.send(workload.deposit(DEE, 2, f.key("during")), 1)
            await f.send(workload.deposit(ANN, 2, f.key("during")))
            await asyncio.sleep(0.15)
        await waiting
        holder.terminate()
        await asyncio.to_thread(nemesis.join)
        try:
            await asyncio.to_thread(f.stack.heal)
        except StackError as error:
            # As in every run: what cannot be healed makes it INVALID, and it is brought to its end.
            recording.invalid(str(error))
    for problem in nemesis.problems:
        recording.invalid(f"fault: {problem}")
    # As long as the service is given to come back, and a little more.
    over_s = recording.clock() + RECOVER_S + 1.5
    while recording.clock() < over_s:
        await f.send(workload.deposit(BOB, 6, f.key("after")))
        await f.send(workload.deposit(DEE, 6, f.key("after")), 1)
        await asyncio.sleep(0.2)


async def drift_planted(f: Floor) -> None:
    """Make one balance of the read model wrong and wait for the service's own reconciler to say so."""
    await opened(f)
    planned = PlannedDrift(9_007, f.server_of(9_007), 8.0)
    drift = Drift(f.config, f.stack.superuser, f.recording.timeline, f.recording.clock, planned)
    f.planted_drift(planned.user)
    await drift.plant(1, f.sure)
    f.start("reconciler0")
    await drift.run()
    await f.stop("reconciler0")
    if drift.problem is not None:
        raise ScenarioFailed(f"the planted drift could not be repaired: {drift.problem}")
