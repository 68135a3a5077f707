"""The frame of a worker: a passing fault is repeated, a dead main task ends the process with an exit code."""

import asyncio
import os
import signal
import socket

import pytest

from reference import service
from reference.projector import claims
from reference.service import DIED_EXIT, Fatal, always_ready, run_process, run_worker


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ends_with(port: int, rounds: list[BaseException | None]) -> tuple[int, int]:
    """Run a worker whose rounds end as told and then stop it; return its exit code and the rounds it made."""
    made = 0

    async def main(stopping: asyncio.Event) -> None:
        async def run_once() -> None:
            nonlocal made
            made += 1
            if made > len(rounds):
                os.kill(os.getpid(), signal.SIGTERM)
                await stopping.wait()
            elif (fault := rounds[made - 1]) is not None:
                raise fault

        await run_worker(port, run_once, always_ready, stopping)

    return run_process(main), made


def test_a_passing_fault_is_repeated_and_an_asked_stop_is_no_death(port, monkeypatch) -> None:
    monkeypatch.setattr(service, "FAILED_ROUND_PAUSE_S", 0.01)
    assert ends_with(port, [None, OSError("no route"), ValueError("odd"), None]) == (0, 5)


@pytest.mark.parametrize("fault", [Fatal("fenced"), asyncio.CancelledError()])
def test_a_dead_main_task_ends_the_process_with_a_code_and_a_line(port, fault, caplog) -> None:
    assert ends_with(port, [None, fault]) == (DIED_EXIT, 2)
    assert "the process died" in caplog.text


def test_a_dead_side_task_ends_the_process_too(port, caplog) -> None:
    async def dies() -> None:
        raise LookupError("gone")

    async def main(stopping: asyncio.Event) -> None:
        async def works() -> None:
            await stopping.wait()

        await run_worker(port, works, always_ready, stopping, [asyncio.create_task(dies(), name="side task")])

    assert run_process(main) == DIED_EXIT
    assert "side task" in caplog.text


def test_a_health_port_that_is_taken_ends_the_process(caplog) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()

        async def main(stopping: asyncio.Event) -> None:
            async def run_once() -> None:
                await asyncio.sleep(0.01)

            await run_worker(holder.getsockname()[1], run_once, always_ready, stopping)

        assert run_process(main) == DIED_EXIT


def test_a_partition_is_complete_only_behind_everything_that_was_sent_to_it() -> None:
    sent = {"a": {"0": 9, "1": 9, "3": 0}}
    applied = {("a", 0): 10, ("a", 1): 9, ("a", 2): -1, ("a", 3): -1, ("b", 0): 0}
    assert claims(sent, 5, applied) == {"a/0": 5, "a/2": 5, "b/0": 5}
