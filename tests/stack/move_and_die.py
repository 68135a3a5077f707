"""Moves a shard and kills itself with SIGKILL when it reaches a phase: `move_and_die.py FOLDER SHARD TARGET PHASE`."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from compose.stack import Stack
from reference.shards import Phase, move_shard


def main() -> None:
    folder, shard, target, last = sys.argv[1:]
    stack = Stack.attach(Path(folder))

    def reached(phase: Phase) -> None:
        if phase == last:
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(move_shard(stack.config, stack.superuser, int(shard), int(target), reached))


if __name__ == "__main__":
    main()
