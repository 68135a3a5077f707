"""The nemesis: seeded plans, measured edges on the timeline, and a heal whatever happens."""

import threading
import time
from pathlib import Path
from typing import cast

import polars as pl
import pytest

from compose.errors import NodeNotReady
from compose.probe import Edge
from compose.stack import Stack
from invariants.timeline import Timeline
from ledgerproof.faults import SILENT, WORKERS, EdgeBook, Nemesis, PlannedFault, fault, plan_faults


class FakeStack:
    """Remembers what was asked of it; `fails` makes restarting a node fail."""

    def __init__(self, *, fails: bool = False) -> None:
        self.calls: list[str] = []
        self.fails = fails

    def kill(self, node: str) -> None:
        self.calls.append(f"kill {node}")

    def pause(self, node: str, lease_s: float) -> None:
        assert lease_s > 0
        self.calls.append(f"pause {node}")

    def start_node(self, node: str) -> None:
        self.calls.append(f"start {node}")
        if self.fails:
            raise NodeNotReady(f"{node} is not ready")


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    began = time.monotonic()
    return Timeline(tmp_path, lambda: time.monotonic() - began)


def rows(timeline: Timeline) -> list[tuple[str, str, int]]:
    return [
        (row["kind"], row["node"], row["fault_id"])
        for row in timeline.frame().filter(pl.col("kind") != "phase").iter_rows(named=True)
    ]


def test_plans_follow_the_seed_and_name_one_server_one_worker_and_redis() -> None:
    assert plan_faults(3, 60, 4) == plan_faults(3, 60, 4)
    plans = [plan_faults(seed, 60, 4) for seed in range(40)]
    assert {plan[0].node for plan in plans} == {"pg0", "pg1", "pg2", "pg3"}
    assert {plan[1].node for plan in plans} == set(WORKERS)
    for plan in plans:
        assert [item.kind for item in plan] == ["kill", "kill", "pause"]
        assert plan[2].node == "redis"


@pytest.mark.parametrize("duration_s", [15.0, 20.0, 60.0, 600.0])
def test_every_fault_ends_well_before_the_load(duration_s: float) -> None:
    for item in plan_faults(1, duration_s, 4):
        assert item.hold_s > 0.5
        assert item.at_s + item.hold_s < duration_s * 0.8


def test_a_load_too_short_for_the_faults_is_refused() -> None:
    with pytest.raises(ValueError, match="15 s"):
        plan_faults(1, 14.9, 4)


def test_a_fault_heals_even_if_its_block_raises(timeline: Timeline) -> None:
    stack = FakeStack()
    planned = PlannedFault(1, "kill", "pg0", 0.0, 1.0)
    with pytest.raises(ZeroDivisionError), fault(cast("Stack", stack), timeline, EdgeBook(timeline, 0.0), planned):
        raise ZeroDivisionError
    assert stack.calls == ["pause pg0", "kill pg0", "start pg0"]
    assert rows(timeline) == [("fault_requested", "pg0", 1), ("heal_requested", "pg0", 1)]


def test_measured_edges_belong_to_the_fault_that_was_asked_for(timeline: Timeline) -> None:
    book = EdgeBook(timeline, origin=100.0)
    planned = PlannedFault(7, "kill", "pg0", 0.0, 1.0)
    book.expect(planned, requested_s=5.0)
    assert not book.wait_started(planned, 0.0)
    book.on_edge(Edge("pg0", False, 104.9, 104.8, "reset"))
    assert book.wait_started(planned, 0.0)
    book.on_edge(Edge("pg1", False, 105.5, 105.4, "reset"))
    assert not book.wait_ended(planned, 0.0)
    book.healing(planned)
    book.on_edge(Edge("pg0", True, 108.0, 107.9, ""))
    assert book.wait_ended(planned, 0.0)
    book.on_edge(Edge("pg0", False, 120.0, 119.9, "reset"))
    found = timeline.frame().select("t", "kind", "node", "fault_id").rows()
    assert found == [
        (5.0, "fault_start", "pg0", 7),
        (5.5, "process_death", "pg1", None),
        (8.0, "fault_end", "pg0", 7),
        (20.0, "process_death", "pg0", None),
    ]


def test_a_slow_answer_before_the_fault_is_not_its_end(timeline: Timeline) -> None:
    book = EdgeBook(timeline, origin=0.0)
    planned = PlannedFault(1, "kill", "api0", 0.0, 1.0)
    book.expect(planned, requested_s=5.0)
    book.on_edge(Edge("api0", False, 5.1, 5.0, SILENT))
    book.on_edge(Edge("api0", True, 5.3, 5.2, ""))
    assert not book.wait_started(planned, 0.0), "it was only slow"
    book.on_edge(Edge("api0", False, 5.5, 5.4, "reset"))
    book.healing(planned)
    book.on_edge(Edge("api0", True, 9.0, 8.9, ""))
    found = timeline.frame().select("t", "kind").rows()
    assert found == [(5.1, "fault_start"), (5.3, "note"), (5.5, "fault_start"), (9.0, "fault_end")]


def test_a_busy_process_is_not_called_dead(timeline: Timeline) -> None:
    book = EdgeBook(timeline, origin=0.0)
    book.on_edge(Edge("api0", False, 1.0, 0.9, SILENT))
    book.on_edge(Edge("api0", True, 2.0, 1.9, ""))
    book.on_edge(Edge("api0", False, 3.0, 2.9, "Connection reset by peer"))
    book.on_edge(Edge("api0", True, 4.0, 3.9, ""))
    assert timeline.frame()["kind"].to_list() == ["note", "note", "process_death", "process_start"]


def nemesis_of(stack: FakeStack, timeline: Timeline, planned: list[PlannedFault]) -> tuple[Nemesis, EdgeBook, float]:
    origin = time.monotonic()
    book = EdgeBook(timeline, origin)
    return Nemesis(cast("Stack", stack), timeline, book, planned, lambda: time.monotonic() - origin), book, origin


def test_cancelling_ends_a_fault_early_and_heals_it(timeline: Timeline) -> None:
    stack = FakeStack()
    nemesis, _, _ = nemesis_of(
        stack, timeline, [PlannedFault(1, "pause", "redis", 0.0, 60.0), PlannedFault(2, "kill", "pg0", 50.0, 1.0)]
    )
    began = time.monotonic()
    nemesis.start(0.0)
    while not stack.calls:
        time.sleep(0.005)
    assert nemesis.now == "pause redis"
    nemesis.cancel()
    nemesis.join()
    assert time.monotonic() - began < 5
    assert stack.calls == ["pause redis", "start redis"]
    assert nemesis.problems == []


def test_a_node_that_does_not_come_back_is_a_problem(timeline: Timeline) -> None:
    nemesis, _, _ = nemesis_of(FakeStack(fails=True), timeline, [PlannedFault(1, "kill", "pg0", 0.0, 0.01)])
    nemesis.start(0.0)
    nemesis.join()
    assert nemesis.problems == ["kill pg0: pg0 is not ready"]


def test_a_slow_heal_delays_no_other_fault(timeline: Timeline) -> None:
    class Slow(FakeStack):
        def start_node(self, node: str) -> None:
            super().start_node(node)
            if node == "pg0":
                gate.wait(5)

    gate = threading.Event()
    stack = Slow()
    planned = [PlannedFault(1, "kill", "pg0", 0.0, 0.01), PlannedFault(2, "kill", "relay0", 0.05, 0.01)]
    nemesis, book, origin = nemesis_of(stack, timeline, planned)
    nemesis.start(0.0)
    deadline = time.monotonic() + 5
    while "start relay0" not in stack.calls and time.monotonic() < deadline:
        time.sleep(0.005)
    assert "start relay0" in stack.calls
    gate.set()
    for item in planned:
        now = time.monotonic()
        book.on_edge(Edge(item.node, False, now, now, "reset"))
        book.healing(item)
        book.on_edge(Edge(item.node, True, now, now, ""))
    nemesis.join()
    assert origin < time.monotonic()
