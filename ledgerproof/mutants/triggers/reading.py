"""Scenarios about what readers are told while the read model is behind."""

import asyncio

from ledgerproof.mutants.floor import Floor
from ledgerproof.mutants.triggers.everyday import ANN, BOB, CYD, opened


async def projection_stands_still(f: Floor) -> None:
    """Read wallets while the projector is away: at once, with the seq of the last write, strongly, and late."""
    await opened(f)
    for user in (ANN, BOB, CYD):
        done = await f.deposit(user, 21)
        await f.projected(user, done.answer.seq or 0)
        await f.read(user)
    await f.stop("projector0")
    for user in (ANN, BOB, CYD):
        done = await f.deposit(user, 22)
        await f.read(user, min_seq=done.answer.seq)
        await f.read(user, strong=True)
        await f.read(user, min_seq=done.answer.seq, api=1)
    await asyncio.sleep(1.2)
    for user in (ANN, BOB, CYD):
        await f.read(user)
        await f.read(user, api=1)
        await f.read(user, strong=True)
    f.start("projector0")
    await f.ready("projector0")
    await asyncio.sleep(0.5)
    for user in (ANN, BOB, CYD):
        await f.read(user)


async def cache_is_behind(f: Floor) -> None:
    """Read the same wallets again and again from the cache while they change."""
    await opened(f)
    for _ in range(4):
        for user in (ANN, BOB, CYD):
            done = await f.deposit(user, 31)
            await f.read(user, min_seq=done.answer.seq)
            await f.read(user, strong=True)
            await f.projected(user, done.answer.seq or 0)
        await asyncio.sleep(0.25)
        for user in (ANN, BOB, CYD):
            await f.read(user)
            await f.read(user, api=1)
    await asyncio.sleep(0.7)
    for user in (ANN, BOB, CYD):
        await f.read(user)


async def old_reads(f: Floor) -> None:
    """Read wallets that nobody has read before, long after the projector went away and they changed."""
    await opened(f)
    for user in (ANN, BOB, CYD):
        done = await f.deposit(user, 41)
        await f.projected(user, done.answer.seq or 0)
    await f.stop("projector0")
    for user in (ANN, BOB, CYD):
        await f.deposit(user, 42)
    await asyncio.sleep(1.3)
    for user in (ANN, BOB, CYD):
        await f.read(user, api=1)
    f.start("projector0")
    await f.ready("projector0")


async def cache_fill_is_late(f: Floor) -> None:
    """Let a reader fill the cache with what it read before the wallet changed."""
    await opened(f)
    user = 241
    done = await f.deposit(user, 51)
    await f.projected(user, done.answer.seq or 0)
    # Nothing is cached: the next read fills the cache, a little later.
    await asyncio.to_thread(f.forget_cached, user)
    f.arm("reads.before_fill", "hang")
    await f.read(user)
    await f.until_fired("reads.before_fill")
    done = await f.deposit(user, 52)
    await f.projected(user, done.answer.seq or 0)
    await f.until_cached(user, done.answer.seq or 0)
    f.points.disarm("reads.before_fill")
    await asyncio.sleep(1.3)
    for api in (0, 1):
        await f.read(user, api=api)


async def cache_away(f: Floor) -> None:
    """Stop Redis while wallets change, and read them when it is back."""
    await opened(f)
    for user in (ANN, CYD):
        done = await f.deposit(user, 61)
        await f.projected(user, done.answer.seq or 0)
        await f.until_cached(user, done.answer.seq or 0)
    await asyncio.to_thread(f.stack.pause, "redis")
    try:
        for user in (ANN, CYD):
            done = await f.deposit(user, 62)
            await f.projected(user, done.answer.seq or 0)
        await asyncio.sleep(0.5)
    finally:
        await asyncio.to_thread(f.stack.resume, "redis")
    # The door to Redis stays shut for a second after a failure.
    await asyncio.sleep(1.8)
    for user in (ANN, CYD):
        await f.read(user, api=1)


async def payout_reads(f: Floor) -> None:
    """Read a wallet before and after it is paid, on both processes: nobody acknowledges a payout, but it was seen."""
    await opened(f)
    m = await f.match()
    await f.bet(ANN, m, "HOME", "BACK", 210, 100)
    await f.arrived(m, 1)
    await f.bet(BOB, m, "HOME", "LAY", 220, 100)
    await f.arrived(m, 2)
    before = await f.read(ANN, strong=True)
    await f.projected(ANN, before.answer.seq or 0)
    await f.read(ANN, api=1)
    await f.close_match(m)
    await f.settle(m, "HOME")
    after = await f.read(ANN, strong=True)
    await f.projected(ANN, after.answer.seq or 0)
    await f.read(ANN)
    await asyncio.sleep(0.9)
    await f.read(ANN, api=1)
