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
            await f.projected(user, done.answer.seq or 0)
        await asyncio.sleep(0.25)
        for user in (ANN, BOB, CYD):
            await f.read(user)
            await f.read(user, api=1)
    await asyncio.sleep(0.7)
    for user in (ANN, BOB, CYD):
        await f.read(user)
