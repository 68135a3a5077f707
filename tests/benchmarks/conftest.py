"""Every timing carries a yardstick of its own: a fixed loop, timed just before and just after it.

Both count processor time of this process, all threads of it: on a machine that others use, time by the clock is
mostly theirs.
"""

import statistics
import time
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 9
"""Of the yardstick on each side of a benchmark; about a millisecond each."""
STEPS = 4_000


def yardstick() -> int:
    """Do what a plain interpreter does: integers, a dictionary, a method. Never change it: stored ratios rest on it."""
    seen: dict[int, int] = {}
    value = 1
    for number in range(STEPS):
        value = (value * 1_103_515_245 + 12_345) % 2_147_483_648
        seen[value % 997] = seen.get(value % 997, 0) + number
    return value + len(seen)


def yardstick_times() -> list[float]:
    """Return the seconds of ROUNDS runs of the yardstick."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        yardstick()
        times.append(time.process_time() - began)
    return times


@pytest.fixture(autouse=True)
def _with_yardstick(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put the yardstick's median beside the benchmark's own; machines differ, and one machine differs by the hour."""
    if "benchmark" not in request.fixturenames:
        yield
        return
    benchmark: BenchmarkFixture = request.getfixturevalue("benchmark")
    before = yardstick_times()
    yield
    benchmark.extra_info["yardstick_s"] = statistics.median(before + yardstick_times())
