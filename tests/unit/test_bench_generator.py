"""The load generator against real servers on real sockets, also one that stalls, one that breaks, one that is gone."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import psutil
import pytest

from ledgerproof.bench.drive import ROOT, GeneratorFailed, play
from ledgerproof.bench.generator import prepare, quantile_ms
from ledgerproof.bench.plan import Plan, Window
from ledgerproof.bench.read_rows import static_server, wrong_source
from ledgerproof.bench.requests import build

MATCH = "00000000-0000-4000-8000-000000000001"
Answer = Callable[[int, bytes], bytes | None]
"""Number of the request and its bytes to the answer's bytes; None closes the connection."""


def http(status: int, body: bytes = b"{}", header: bytes = b"content-length: %d") -> bytes:
    return b"HTTP/1.1 %d X\r\n" % status + header % len(body) + b"\r\n\r\n" + body


class Server:
    """An HTTP server in a thread: a real socket, answers by a function, and a gate that stalls all of them."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._gate = asyncio.Event()
        self._gate.set()
        self._ready = threading.Event()
        self.port = 0
        self.requests: list[bytes] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def stall(self) -> None:
        self._loop.call_soon_threadsafe(self._gate.clear)

    def go_on(self) -> None:
        self._loop.call_soon_threadsafe(self._gate.set)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        server.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0
                )
                request = head + await reader.readexactly(length)
                self.requests.append(request)
                await self._gate.wait()
                answer = self._answer(len(self.requests), request)
                if answer is None:
                    break
                # In two pieces, so that the generator has to put answers together.
                writer.write(answer[:20])
                await writer.drain()
                writer.write(answer[20:])
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()


def plan(port: int, **fields: object) -> Plan:
    usual = Plan(
        ports=[port], kind="bets", loop="open", rate=200.0, duration_s=1.0, connections=4, users=100, matches=[MATCH]
    )
    return msgspec.structs.replace(usual, **fields)


def test_every_request_of_the_schedule_is_sent_once_and_answered() -> None:
    with serving(lambda _number, _request: http(202)) as server:
        window = play(plan(server.port))
        assert window.due == window.answered == window.accepted == len(server.requests) > 100
        assert window.statuses == {"202": window.due}
        keys = [line for request in server.requests for line in request.split(b"\r\n") if b"Idempotency" in line]
        assert len(set(keys)) == len(keys) == window.due
    assert window.p99_ms is not None
    assert (window.lost, window.unreadable) == (0, 0)
    assert sum(window.accepted_by_second) <= window.accepted


def test_latency_of_a_stalled_server_counts_from_the_intended_time() -> None:
    stalled_s = 1.0
    with serving(lambda _number, _request: http(202)) as server:

        def stall() -> None:
            server.stall()
            threading.Timer(stalled_s, server.go_on).start()

        window = play(plan(server.port, duration_s=2.0, connections=1, connections_max=2), before=stall)
    assert window.due == window.accepted
    # Half of the requests were due while nothing was answered. Only two could be sent then; had latency counted
    # from sending, the median would be that of the fast half and the 99th percentile of two requests.
    assert window.queued > 0.3 * window.due
    assert window.connections == 2
    assert window.p99_ms is not None
    assert window.p99_ms > 0.8 * 1000 * stalled_s
    assert window.p50_ms is not None
    late = [value for value in window.p99_by_second_ms if value is not None]
    assert late[0] > 0.8 * 1000 * stalled_s


def test_requests_without_an_answer_are_infinitely_late_and_not_left_out() -> None:
    def answer(number: int, _request: bytes) -> bytes | None:
        return http(202) if number % 10 else None  # every tenth connection is closed instead of answered

    with serving(answer) as server:
        window = play(plan(server.port, grace_s=0.5))
    assert window.lost > 0
    assert window.answered < window.due
    assert window.p99_ms is None
    assert window.p50_ms is not None


def test_more_connections_are_opened_only_while_all_are_busy_and_within_the_bound() -> None:
    with serving(lambda _number, _request: http(202)) as server:
        calm = play(plan(server.port, rate=50.0, connections=8, connections_max=16))
        busy = play(
            plan(server.port, connections=1, connections_max=6),
            before=lambda: (server.stall(), threading.Timer(0.7, server.go_on).start()),
        )
    assert calm.connections == 8
    assert busy.connections == 6
    assert busy.accepted == busy.due


def test_refusals_and_marks_are_counted_by_what_the_body_says() -> None:
    def answer(number: int, _request: bytes) -> bytes:
        if number % 4 == 0:
            return http(503, b'{"detail":"full"}')
        return http(200, b'{"source":"%s"}' % (b"redis" if number % 2 else b"ledger"))

    with serving(answer) as server:
        window = play(plan(server.port, kind="balances", marker='"source":"', count="source"))
    assert window.statuses.keys() == {"200", "503"}
    assert window.accepted == window.statuses["200"] == window.counted
    assert set(window.marks) == {"redis", "ledger"}
    assert sum(window.marks.values()) == window.accepted
    assert window.first_problem == '{"detail":"full"}'


def test_answers_that_cannot_be_read_are_counted_and_not_accepted() -> None:
    with serving(lambda _number, _request: b"HTTP/1.1 202 X\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n") as server:
        window = play(plan(server.port, rate=20.0, grace_s=0.3))
    assert window.unreadable > 0
    assert window.accepted == 0


def test_content_length_is_found_in_any_case() -> None:
    with serving(lambda _number, _request: http(202, header=b"Content-Length: %d")) as server:
        assert play(plan(server.port, rate=20.0)).accepted > 0


def test_closed_loop_keeps_each_connection_busy_until_the_time_is_over() -> None:
    with serving(lambda _number, _request: http(200)) as server:
        window = play(plan(server.port, kind="balances", loop="closed", repeat=True, requests_max=10, duration_s=0.5))
    assert window.accepted == window.due > 10
    assert window.duration_s >= 0.4


def test_closed_loop_ends_when_its_requests_are_used_up() -> None:
    with serving(lambda _number, _request: http(200)) as server:
        window = play(plan(server.port, kind="balances", loop="closed", requests_max=25, duration_s=30.0))
        assert window.accepted == len(server.requests) == 25


def test_ceiling_is_measured_against_a_process_of_its_own() -> None:
    with static_server() as port:
        fields = {"kind": "static", "loop": "closed", "repeat": True, "requests_max": 1, "duration_s": 0.5}
        window = play(plan(port, **fields))
    assert window.accepted == window.due > 100


def test_nobody_listening_is_a_message_and_no_result() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(GeneratorFailed, match="cannot connect"):
            play(plan(taken.getsockname()[1]))


def test_generator_ends_when_its_owner_is_gone() -> None:
    with serving(lambda _number, _request: http(202)) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "ledgerproof.bench.generator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(plan(server.port, duration_s=60.0)) + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"go\n")
        process.stdin.flush()
        process.stdin.close()
        assert process.wait(20) == 1
        process.stdout.close()


def test_an_interrupted_window_leaves_no_generator_behind() -> None:
    started: list[psutil.Process] = []
    with serving(lambda _number, _request: http(202)) as server:

        def interrupt() -> None:
            started.extend(
                child for child in psutil.Process().children() if "ledgerproof.bench.generator" in child.cmdline()
            )
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            play(plan(server.port, duration_s=60.0), before=interrupt)
    assert len(started) == 1
    assert not started[0].is_running()


# --- requests ---------------------------------------------------------------------------------------------


def bodies(requests: list[bytes]) -> list[dict[str, object]]:
    return [msgspec.json.decode(request.partition(b"\r\n\r\n")[2]) for request in requests]


def test_half_of_the_bets_back_and_about_half_can_trade() -> None:
    drawn = bodies(build(plan(1), 4000))
    backs = [int(str(bet["odds"])) for bet in drawn if bet["side"] == "BACK"]
    lays = [int(str(bet["odds"])) for bet in drawn if bet["side"] == "LAY"]
    assert len(backs) == pytest.approx(2000, rel=0.1)
    assert {bet["match_id"] for bet in drawn} == {MATCH}
    # At the price in the middle, half of either side would trade.
    assert sum(odds <= 200 for odds in backs) == pytest.approx(len(backs) / 2, rel=0.15)
    assert sum(odds >= 200 for odds in lays) == pytest.approx(len(lays) / 2, rel=0.15)


def test_same_plan_makes_the_same_requests_and_another_seed_others() -> None:
    assert build(plan(1), 50) == build(plan(1), 50)
    assert build(plan(1), 50) != build(plan(1, seed=2), 50)


def test_bulk_requests_carry_as_many_commands_as_asked_under_keys_of_their_own() -> None:
    made = bodies(build(plan(1, kind="bulk", bulk=7), 3))
    commands = [command for body in made for command in body["commands"]]  # type: ignore[attr-defined]
    assert [len(body["commands"]) for body in made] == [7, 7, 7]  # type: ignore[arg-type]
    assert len({command["key"] for command in commands}) == 21


def test_token_is_sent_with_every_request_and_only_if_there_is_one() -> None:
    for kind in ("bets", "bulk", "deposits", "balances"):
        with_token = build(plan(1, kind=kind, token="abc", bulk=2), 3)
        assert all(b"\r\nAuthorization: Bearer abc\r\n" in request for request in with_token)
        assert not any(b"Authorization" in request for request in build(plan(1, kind=kind, bulk=2), 3))


def test_reads_that_do_not_repeat_ask_for_each_wallet_once() -> None:
    paths = [request.split(b" ")[1] for request in build(plan(1, kind="balances", query="?consistency=strong"), 500)]
    assert len(set(paths)) == len(paths) == 100
    assert all(path.endswith(b"/balance?consistency=strong") for path in paths)


# --- percentiles ------------------------------------------------------------------------------------------


async def test_quantiles_never_flatter_and_missing_answers_count() -> None:
    load = prepare(plan(1, rate=1000.0))
    load.latency[:] = 0.010
    load.latency[:5] = 2.0
    assert quantile_ms(load.latency[:100], 0.5) == 10.0
    assert quantile_ms(load.latency[:100], 0.99) == 2000.0
    load.latency[0] = float("inf")
    assert quantile_ms(load.latency[:100], 1.0) is None
    assert quantile_ms(load.latency[:0], 0.5) is None


def test_a_row_whose_answers_came_from_elsewhere_is_refused() -> None:
    fields = msgspec.json.decode(
        b'{"loop":"closed","duration_s":1,"due":100,"answered":100,"accepted":100,"statuses":{"200":100},'
        b'"p50_ms":1,"p99_ms":1,"max_ms":1,"accepted_p50_ms":1,"accepted_p99_ms":1,"lag_p99_ms":0,"lag_max_ms":0,'
        b'"queued":0,"connections":1,"lost":0,"unreadable":0,"marks":{"redis":100},"counted":0,"cpu_s":0.1,'
        b'"priority":"nice 0"}',
        type=Window,
    )
    assert wrong_source(fields, "redis") is None
    fields.marks = {"redis": 99, "projection": 1}
    assert "only 99 of 100" in str(wrong_source(fields, "redis"))
    fields.marks, fields.accepted = {"redis": 100}, 90
    assert "10 of 100 reads failed" in str(wrong_source(fields, "redis"))
