"""Scenarios without any fault: an afternoon with everything in it, an open book, and careful acknowledgements."""

import asyncio
import contextlib
from typing import Final

from ledgerproof import workload
from ledgerproof.mutants.floor import Floor, ScenarioFailed

ANN, CYD, EVE, GUS = 7, 8, 33, 41
"""On the first server."""
BOB, DEE, FAY, HAL = 62, 99, 88, 75
"""On the second."""
ALL: Final = (ANN, BOB, CYD, DEE, EVE, FAY)
OPENING_MINOR = 100_000


async def opened(f: Floor) -> None:
    """Open the wallets, and place the least that a run must have: a deposit and a bet."""
    await asyncio.gather(*(f.deposit(user, OPENING_MINOR + user, api=user % 2) for user in ALL))
    match_id = await f.match()
    await f.bet(ANN, match_id, "HOME", "BACK", 200, 400)
    await f.bet(BOB, match_id, "HOME", "LAY", 210, 150, api=1)
    await f.arrived(match_id, 2)


async def commands(f: Floor) -> None:
    """Everything that happens to wallets without faults: keys again, races, bulks, reads."""
    await opened(f)
    await keys(f)
    await contention(f)
    await bulks(f)
    await reads(f)


async def matches(f: Floor) -> None:
    """Everything that happens to matches without faults: bets, cancels, late bets, settlements, corrections."""
    await opened(f)
    await settled_match(f)
    await void_match(f)
    await corrected_match(f)
    await unwanted_settlement(f)


async def keys(f: Floor) -> None:
    """Send keys again: the same body, another body, a refusal that stays one when the funds are there."""
    key = f.key("again")
    await f.deposit(DEE, 5_000, key)
    await f.deposit(DEE, 5_000, key, api=1)
    await f.send(workload.deposit(DEE, 777, key, "other_body"))
    await f.send(workload.withdraw(DEE, 5_000, key, "other_body"), 1)
    refused = f.key("too-much")
    await f.withdraw(CYD, 50_000_000, refused)
    await f.deposit(CYD, 60_000_000)
    await f.withdraw(CYD, 50_000_000, refused, api=1)
    await f.deposit(GUS, 1_000)
    await f.withdraw(GUS, 1_000)
    await f.withdraw(GUS, 1)
    await f.deposit(GUS, 5)
    await f.withdraw(GUS, 4)
    payment = f.key("pays-all")
    await f.deposit(HAL, 900)
    await f.withdraw(HAL, 900, payment)
    # Nothing is left: only a look-up tells the repeated payment from a new one.
    await f.withdraw(HAL, 900, payment, api=1)
    await f.withdraw(HAL, 901, payment)


async def contention(f: Floor) -> None:
    """Race one key on two processes, and two withdrawals for the same money."""
    deposit = workload.deposit(EVE, 1_234, f.key("raced"), "race")
    await asyncio.gather(f.send(deposit, 0), f.send(deposit, 1))
    for user in (142, 207):
        await f.deposit(user, 3_000)
        await asyncio.gather(*(f.withdraw(user, 2_000, api=number % 2) for number in range(4)))
    await asyncio.gather(*(f.deposit(EVE, 10 + number, api=number % 2) for number in range(12)))


async def bulks(f: Floor) -> None:
    """Send many commands of few wallets in one request, one of them twice, one of them without funds."""
    clock = f.client.clock
    first = workload.deposit(EVE, 321, f.key("bulk"), "bulk")
    sent = [
        first,
        workload.withdraw(EVE, 11, f.key("bulk"), "bulk"),
        workload.withdraw(EVE, 900_000_000, f.key("bulk"), "bulk"),
        workload.deposit(EVE, 22, f.key("bulk"), "bulk"),
        workload.deposit(FAY, 99, f.key("bulk"), "bulk"),
        workload.withdraw(EVE, 33, f.key("bulk"), "bulk"),
        first,
    ]
    await f.client.attempt_bulk(sent, 0, clock())
    await f.client.attempt_bulk(sent, 1, clock())
    twice = workload.withdraw(ANN, 77, f.key("bulk-twice"), "bulk")
    await f.client.attempt_bulk([twice, workload.deposit(ANN, 5, f.key("bulk"), "bulk"), twice], 0, clock())


async def bulk(f: Floor) -> None:
    """Nothing but bulks."""
    await opened(f)
    await bulks(f)


async def settled_match(f: Floor) -> None:
    """Play a match to its end: odd odds, two prices, priorities, cancels, rollbacks, a late bet."""
    m = await f.match()
    await f.bet(BOB, m, "HOME", "LAY", 233, 501)
    await f.bet(CYD, m, "HOME", "LAY", 251, 777)
    await f.bet(FAY, m, "HOME", "LAY", 233, 100)
    await f.arrived(m, 3)
    await f.bet(ANN, m, "HOME", "BACK", 220, 903, api=1)
    await f.arrived(m, 4)
    await f.bet(DEE, m, "HOME", "BACK", 251, 100)
    await f.arrived(m, 5)
    # Her own bet is passed over.
    await f.bet(DEE, m, "HOME", "LAY", 260, 50)
    await f.bet(EVE, m, "DRAW", "LAY", 333, 91)
    await f.arrived(m, 7)
    await f.bet(ANN, m, "DRAW", "BACK", 300, 50)
    await f.bet(FAY, m, "DRAW", "BACK", 333, 17)
    rest = await f.bet(BOB, m, "AWAY", "BACK", 400, 1_000)
    await f.arrived(m, 10)
    key = f.key("cancel")
    await f.cancel(BOB, m, rest.answer.bet_id or "", key)
    await f.cancel(BOB, m, rest.answer.bet_id or "", key, api=1)
    # The matcher is away: the cancel is there before its bet.
    await f.stop("matcher0")
    quick = await f.bet(CYD, m, "AWAY", "LAY", 310, 70)
    await f.cancel(CYD, m, quick.answer.bet_id or "")
    f.start("matcher0")
    await f.ready("matcher0")
    await roll_backs(f, m)
    await f.arrived(m, 12)
    await f.bet(GUS, m, "AWAY", "BACK", 200, 10**6)
    await f.close_match(m)
    late = [f.bet(CYD, m, "HOME", "BACK", 200, 60, api=1), f.bet(DEE, m, "HOME", "LAY", 233, 61, api=1)]
    await asyncio.gather(*late)
    await f.settle(m, "HOME")
    await f.settle(m, "HOME")


async def roll_backs(f: Floor, match_id: str) -> None:
    """Take a bet back before it comes, and another one after it came."""
    early = f.key("rolled-back")
    await f.roll_back(CYD, early)
    await f.bet(CYD, match_id, "AWAY", "LAY", 310, 70, early, api=1)
    placed = f.key("rolled-back")
    await f.bet(DEE, match_id, "AWAY", "BACK", 900, 40, placed)
    await f.arrived(match_id, 12)
    await f.roll_back(DEE, placed, api=1)
    await f.roll_back(DEE, placed)


async def void_match(f: Floor) -> None:
    """Void an open match with matched and unmatched bets."""
    m = await f.match()
    await f.bet(ANN, m, "HOME", "BACK", 200, 400)
    await f.bet(BOB, m, "HOME", "LAY", 217, 301)
    await f.arrived(m, 2)
    await f.void(m)


async def corrected_match(f: Floor) -> None:
    """Settle a match four times: who won by mistake has spent it, wins a part again, and loses."""
    m = await f.match()
    poor = 133
    await f.deposit(poor, 1_000)
    await f.bet(FAY, m, "HOME", "LAY", 233, 501)
    await f.arrived(m, 1)
    await f.bet(poor, m, "HOME", "BACK", 210, 701)
    await f.bet(EVE, m, "AWAY", "LAY", 300, 90)
    await f.arrived(m, 3)
    await f.bet(FAY, m, "AWAY", "BACK", 290, 55)
    await f.arrived(m, 4)
    await f.close_match(m)
    await f.settle(m, "HOME")
    held = await f.read(poor, strong=True)
    await f.withdraw(poor, (held.answer.balance_minor or 101) - 100)
    await f.resettle(m, "AWAY")
    await f.resettle(m, None)
    await f.resettle(m, "DRAW")
    await f.resettle(m, "HOME")


async def unwanted_settlement(f: Floor) -> None:
    """Ask for what the state of a match does not allow."""
    m = await f.match()
    await f.bet(ANN, m, "HOME", "BACK", 200, 40)
    await f.arrived(m, 1)
    await f.settle(m, "HOME")
    await f.void(m)
    await f.settle(m, "AWAY")


async def reads(f: Floor) -> None:
    """Read every wallet in each way, right after a command and later."""
    for user in ALL:
        done = await f.deposit(user, 3)
        await f.read(user, min_seq=done.answer.seq, api=1)
        await f.read(user, strong=True)
        # A planted bug may keep it back for good; then the reads are the more telling.
        with contextlib.suppress(ScenarioFailed):
            await f.projected(user, done.answer.seq or 0, within_s=3.0)
        await f.read(user, api=1)
        await f.read(user, min_seq=done.answer.seq)
        await f.send(workload.entries(user, 0))


async def open_book(f: Floor) -> None:
    """Leave matches open, with fills, partial fills and bets of one batch on several matches."""
    await opened(f)
    open_ones = [await f.match() for _ in range(3)]
    await asyncio.gather(*(f.bet(user, m, "HOME", "LAY", 233, 101 + user) for m in open_ones for user in ALL[:3]))
    for m in open_ones:
        await f.arrived(m, 3)
    await asyncio.gather(*(f.bet(DEE, m, "HOME", "BACK", 220, 155) for m in open_ones))
    for m in open_ones:
        await f.arrived(m, 4)
    await f.close_match(open_ones[2])
    # The other process still takes the match for open.
    await asyncio.gather(
        f.bet(EVE, open_ones[2], "HOME", "BACK", 205, 30, api=1),
        f.bet(FAY, open_ones[2], "HOME", "LAY", 300, 31, api=1),
    )
    # A wallet's own bets do not trade with each other.
    await f.bet(FAY, open_ones[1], "DRAW", "LAY", 310, 44)
    await f.arrived(open_ones[1], 5)
    await f.bet(FAY, open_ones[1], "DRAW", "BACK", 300, 45)
    await f.arrived_unless_kept(open_ones[1], 6)
    await f.read(DEE, strong=True)


async def acknowledgements(f: Floor) -> None:
    """Hold what one process has admitted, and let the other one post to the same wallet after the answer."""
    await opened(f)
    for number in range(4):
        f.arm("writer.before_post", "delay", delay_ms=150)
        await f.deposit(ANN, 1_000 + number, api=0)
        await f.withdraw(ANN, 7, api=1)
    await f.read(ANN, strong=True, api=1)


async def contended(f: Floor) -> None:
    """Let two processes post to the same wallets again and again at the same moment."""
    await opened(f)
    for _ in range(5):
        sent = [f.deposit(user, 5, api=api) for user in (ANN, CYD, BOB, DEE) for api in (0, 1)]
        sent += [f.withdraw(user, 2, api=api) for user in (ANN, BOB) for api in (0, 1)]
        await asyncio.gather(*sent)
    await f.read(ANN, strong=True)


async def beyond_funds(f: Floor) -> None:
    """Ask for more than there is, several times at once."""
    await opened(f)
    for user in (142, 207):
        await f.deposit(user, 3_000)
        await asyncio.gather(*(f.withdraw(user, 2_000, api=number % 2) for number in range(3)))


async def late_bets(f: Floor) -> None:
    """Bet on a match that every process knows to be closed, before and after it is settled."""
    await opened(f)
    m = await f.match()
    await f.bet(ANN, m, "HOME", "BACK", 210, 55)
    await f.bet(BOB, m, "HOME", "LAY", 220, 30, api=1)
    await f.arrived(m, 2)
    await f.close_match(m)
    await f.close_match(m, api=1)
    refused = [await f.bet(CYD, m, "HOME", "LAY", 230, 25, api=api) for api in (0, 1)]
    await asyncio.sleep(0.3)
    await f.read(CYD, strong=True)
    assert len(refused) == 2


async def resettle_again(f: Floor) -> None:
    """Correct a match, correct it back, and let the first correction be delivered once more."""
    await opened(f)
    m = await f.match()
    await f.bet(ANN, m, "HOME", "BACK", 210, 55)
    await f.bet(BOB, m, "HOME", "LAY", 220, 30, api=1)
    await f.arrived(m, 2)
    await f.close_match(m)
    await f.settle(m, "HOME")
    first = f.key("resettle")
    await f.resettle(m, "AWAY", key=first)
    await f.resettle(m, "HOME")
    await f.resettle(m, "AWAY", key=first)
    await f.read(ANN, strong=True)


async def late_cancel(f: Floor) -> None:
    """Cancel a bet whose match has closed."""
    await opened(f)
    m = await f.match()
    early = await f.bet(ANN, m, "HOME", "BACK", 210, 55)
    late = await f.bet(BOB, m, "DRAW", "LAY", 220, 30, api=1)
    await f.arrived(m, 2)
    await f.cancel(ANN, m, early.answer.bet_id or "")
    await f.close_match(m)
    await f.cancel(BOB, m, late.answer.bet_id or "")
