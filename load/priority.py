"""Real-time scheduling for what must be on time but uses a fraction of a core."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def real_time() -> Iterator[bool]:
    """Schedule this thread before all ordinary ones within the block, where the system allows it; say whether it does.

    A generator on the same cores as the service must have the processor when an arrival is due, as clients on machines
    of their own would.
    """
    try:
        before, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except (AttributeError, OSError):
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, before, parameters)
