"""Scenarios about shards that move between servers."""

import asyncio
import contextlib

from ledgerproof import workload
from ledgerproof.mutants.floor import Floor
from ledgerproof.mutants.triggers.everyday import ANN, BOB, CYD, opened
from reference.errors import LedgerError
from reference.shards import move_shard


async def shard_moves(f: Floor) -> None:
    """Move the shard of a busy wallet, and send keys from before the move again after it."""
    await opened(f)
    key, refused, placed = f.key("before"), f.key("refused"), f.key("placed")
    await f.deposit(ANN, 700, key)
    await f.withdraw(ANN, 90_000_000, refused)
    m = await f.match()
    await f.bet(ANN, m, "HOME", "BACK", 200, 50, placed)
    await f.arrived(m, 1)
    going = True

    async def traffic() -> None:
        while going:
            await f.deposit(ANN, 2)
            await f.withdraw(107, 1, api=1)
            await f.read(ANN)
            await asyncio.sleep(0.01)

    await f.deposit(107, 500)
    busy = asyncio.create_task(traffic())
    # While nobody holds the shard, commands come to its old server.
    f.arm("shards.after_give_up_before_accept", "delay", delay_ms=250)
    try:
        # A move that refuses to go on is a finding of its own; what it leaves behind is judged.
        with contextlib.suppress(LedgerError):
            await move_shard(f.config, f.stack.superuser, ANN % 100, 1)
    finally:
        going = False
        await busy
    await f.deposit(ANN, 700, key, api=1)
    await f.deposit(ANN, 90_000_000)
    await f.withdraw(ANN, 90_000_000, refused, api=1)
    await f.bet(ANN, m, "HOME", "BACK", 200, 50, placed, api=1)
    await f.bet(ANN, m, "HOME", "LAY", 190, 60)
    # Its home is that of the shard that has moved: matches do not follow wallets.
    other = await f.match(shard=ANN % 100)
    await f.bet(ANN, other, "AWAY", "BACK", 300, 20)
    await f.bet(BOB, other, "AWAY", "LAY", 310, 25)
    await f.arrived_unless_kept(other, 2)
    await f.send(workload.deposit(CYD, 3, f.key("elsewhere")), 1)
    await f.close_match(other)
    await f.settle(other, "AWAY")
    await f.read(ANN, strong=True)
