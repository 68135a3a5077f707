"""End a pause when its lease is over, even if whoever paused the node was killed meanwhile.

Started by `Stack.pause` as a process of its own: `python -m compose.lease STACK_FOLDER NODE PAUSE_ID SECONDS`.
The pause it belongs to is the one whose identifier is in the node's `pause` file: a node that was resumed,
and perhaps paused again under another lease, is none of its business.
"""

import sys
import time
from pathlib import Path

from compose import nodes, state
from compose.errors import StackError

CHECK_S = 0.2
LEASE_MAX_S = 3600.0


def main(arguments: list[str]) -> int:
    """Wait for the end of the lease or of the pause, whichever is first."""
    folder, name, pause_id, lease_s = Path(arguments[0]), arguments[1], arguments[2], float(arguments[3])
    deadline = time.monotonic() + lease_s
    node = nodes.named(state.load(folder), name)
    while nodes.current_pause(node) == pause_id:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            nodes.resume(node)
            print(f"{name}: lease of {lease_s:g} s over, resumed", flush=True)
            return 0
        time.sleep(min(CHECK_S, left_s))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except StackError as error:
        sys.exit(str(error))
