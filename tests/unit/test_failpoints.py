"""Failpoints: nothing unless asked for, named in one catalogue, and doing what they are armed with."""

import asyncio
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from timeit import timeit

import msgspec
import pytest

from reference import failpoint_socket, failpoints
from reference.config import ROLES, ServiceConfig
from reference.failpoint_socket import SOCKET_FILE, Answer, Request
from reference.failpoints import CATALOGUE, Arm, Failpoints, InjectedFault, hit, hit_async
from reference.routing import SHARDS

ROOT = Path(__file__).parents[2]
NAME = "relay.after_send_before_mark"
OTHER = "api.after_commit_before_ack"


@pytest.fixture
def points(tmp_path: Path) -> Iterator[Failpoints]:
    made = Failpoints(tmp_path)
    failpoints.activate(made)
    yield made
    failpoints.activate(None)


def state(points: Failpoints, name: str = NAME) -> failpoints.PointState:
    return next(point for point in points.states() if point.name == name)


def until(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


# --- the catalogue ----------------------------------------------------------------------------------------


def test_every_point_in_the_code_is_in_the_catalogue_and_the_other_way_round() -> None:
    calls = re.compile(r"\bhit(?:_async)?\(\"([^\"]+)\"\)")
    found = [name for path in sorted((ROOT / "reference").rglob("*.py")) for name in calls.findall(path.read_text())]
    assert set(found) == set(CATALOGUE)


def test_there_are_enough_points_and_all_parts_have_some() -> None:
    assert len(CATALOGUE) >= 24
    parts = {"api", "desk", "writer", "store", "relay", "publisher", "consumer", "matcher", "settler", "projector"}
    assert {name.split(".")[0] for name in CATALOGUE} >= parts | {"cache", "reconciler", "shards"}
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+", name) for name in CATALOGUE)
    assert all(sentence.endswith(".") for sentence in CATALOGUE.values())


def test_calls_are_written_so_that_the_catalogue_test_sees_them() -> None:
    for path in sorted((ROOT / "reference").rglob("*.py")):
        if path.name.startswith("failpoint"):
            continue
        text = path.read_text()
        for line in re.findall(r".*(?<!\w)(?:hit|hit_async)\(.*", text):
            assert re.search(r"(?<!\w)hit(?:_async)?\(\"[^\"]+\"\)", line), f"{path.name}: {line}"
            assert ("await hit_async" in line) == ("hit_async(" in line), f"{path.name}: not awaited: {line}"


# --- off --------------------------------------------------------------------------------------------------


def test_a_point_that_nobody_controls_costs_less_than_a_microsecond() -> None:
    async def many(count: int) -> float:
        began = time.thread_time()
        for _ in range(count):
            await hit_async(OTHER)
        return time.thread_time() - began

    # In CPU time, and the best of some tries: what else the machine does must not count.
    count = 5_000
    sync_ns = min(timeit(lambda: hit(NAME), number=count, timer=time.thread_time) for _ in range(20)) / count * 1e9
    async_ns = min(asyncio.run(many(count)) for _ in range(20)) / count * 1e9
    # 30 ns and 100 ns on an idle machine.
    assert sync_ns < 1_000, sync_ns
    assert async_ns < 1_000, async_ns


def config(folder: Path | None) -> ServiceConfig:
    return ServiceConfig(
        servers=[{"name": "pg0", "host": "127.0.0.1", "port": 1}],  # type: ignore[list-item] # not looked at here
        routing=[0] * SHARDS,
        passwords=dict.fromkeys(ROLES, "secret"),
        kafka_bootstrap="127.0.0.1:2",
        redis_host="127.0.0.1",
        redis_port=3,
        failpoint_folder=None if folder is None else str(folder),
    )


def test_without_a_folder_in_the_configuration_nothing_is_opened(tmp_path: Path) -> None:
    assert config(None).failpoint_folder is None, "and that is the default"
    before = threading.active_count()
    failpoint_socket.listen(config(None), "api0")
    assert threading.active_count() == before
    assert failpoints._active is None
    assert list(tmp_path.iterdir()) == []


# --- armed ------------------------------------------------------------------------------------------------


def test_hits_are_counted_and_do_nothing_unless_armed(points: Failpoints) -> None:
    hit(NAME)
    hit(NAME)
    assert (state(points).hits, state(points).fired) == (2, 0)
    assert state(points, OTHER).hits == 0


def test_raising_skips_and_ends_as_it_was_told(points: Failpoints) -> None:
    points.arm(Arm(NAME, "raise", times=2, skip=1))
    outcomes = []
    for _ in range(5):
        try:
            hit(NAME)
            outcomes.append("passed")
        except InjectedFault as error:
            assert NAME in str(error)
            outcomes.append("raised")
    assert outcomes == ["passed", "raised", "raised", "passed", "passed"]
    assert state(points).fired == 2


def test_every_hit_raises_until_disarmed(points: Failpoints) -> None:
    points.arm(Arm(NAME, "raise", times=None))
    for _ in range(3):
        with pytest.raises(ConnectionError):
            hit(NAME)
    points.disarm(NAME)
    hit(NAME)
    assert state(points).armed is None


async def test_a_delay_holds_up_its_coroutine_and_no_other(points: Failpoints) -> None:
    points.arm(Arm(NAME, "delay", delay_ms=200))
    began = time.monotonic()
    delayed = asyncio.create_task(hit_async(NAME))
    await asyncio.sleep(0)
    await hit_async(OTHER)
    assert time.monotonic() - began < 0.15
    await delayed
    assert time.monotonic() - began >= 0.2


async def test_what_hangs_goes_on_when_released(points: Failpoints) -> None:
    points.arm(Arm(NAME, "hang"))
    hanging = asyncio.create_task(hit_async(NAME))
    await asyncio.sleep(0.01)
    assert not hanging.done()
    assert state(points).hanging == 1
    # As the admin socket does it: from another thread.
    await asyncio.to_thread(points.disarm, NAME)
    await asyncio.wait_for(hanging, 5)
    assert state(points).hanging == 0


def test_a_thread_that_hangs_goes_on_when_released(points: Failpoints) -> None:
    points.arm(Arm(NAME, "hang"))
    thread = threading.Thread(target=hit, args=(NAME,))
    thread.start()
    until(lambda: state(points).hanging == 1)
    points.disarm()
    thread.join(5)
    assert not thread.is_alive()


async def test_a_hang_that_nobody_releases_ends_by_itself(points: Failpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "HANG_MAX_S", 0.05)
    points.arm(Arm(NAME, "hang", times=None))
    await asyncio.wait_for(hit_async(NAME), 5)
    hit(NAME)
    assert state(points).hanging == 0


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "api.nowhere", "action": "exit"}, "no failpoint 'api.nowhere'"),
        ({"name": NAME, "action": "exit", "times": 0}, "times must be 1 to"),
        ({"name": NAME, "action": "exit", "skip": -1}, "skip must be 0 to"),
        ({"name": NAME, "action": "delay"}, "delay_ms belongs"),
        ({"name": NAME, "action": "exit", "delay_ms": 5}, "delay_ms belongs"),
        ({"name": NAME, "action": "delay", "delay_ms": 10**6}, "delay_ms must be"),
        ({"name": NAME, "action": "explode"}, "Invalid enum value 'explode'"),
        ({"name": NAME, "action": "exit", "time": 1}, "unknown field `time`"),
    ],
)
def test_an_impossible_order_is_refused_with_the_reason(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(fields, Arm)


# --- processes --------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from reference import failpoints
points = failpoints.Failpoints(Path(sys.argv[1]))
failpoints.activate(points)
points.arm(failpoints.Arm({name!r}, "exit", skip=2))
for _ in range(5):
    failpoints.hit({name!r})
print("survived")
"""


def test_an_exit_is_a_kill_and_its_hits_outlive_the_process(tmp_path: Path) -> None:
    for run in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(name=NAME), str(tmp_path)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert done.stdout == ""
        assert failpoints.read_counts(tmp_path)[NAME] == (3 * run, run)
    fired = failpoints.read_fired(tmp_path)
    assert [(one.name, one.action, one.hit) for one in fired] == [(NAME, "exit", 3), (NAME, "exit", 6)]
    assert fired[0].t < fired[1].t < time.monotonic()


def test_what_never_counted_has_no_counts(tmp_path: Path) -> None:
    assert failpoints.read_counts(tmp_path) == {}
    assert failpoints.read_fired(tmp_path) == []


# --- the socket -------------------------------------------------------------------------------------------


def ask(folder: Path, line: bytes) -> Answer:
    with socket.socket(socket.AF_UNIX) as door, failpoint_socket.short_path(folder, SOCKET_FILE) as path:
        door.settimeout(5)
        door.connect(path)
        door.sendall(line + b"\n")
        return msgspec.json.decode(door.makefile("rb").readline(), type=Answer)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Path]:
    # Longer than an address of a socket may be.
    root = tmp_path / ("long" * 30)
    root.mkdir()
    failpoint_socket.listen(config(root), "api0")
    yield root / "api0"
    failpoints.activate(None)


def test_the_socket_is_its_owners_alone_and_arms_points(listening: Path) -> None:
    mode = (listening / SOCKET_FILE).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    answer = ask(listening, msgspec.json.encode(Request(arm=Arm(NAME, "raise", times=None))))
    assert answer.error is None
    with pytest.raises(InjectedFault):
        hit(NAME)
    points = {point.name: point for point in ask(listening, b"{}").points}
    assert set(points) == set(CATALOGUE)
    assert (points[NAME].hits, points[NAME].fired) == (1, 1)
    assert points[NAME].armed == Arm(NAME, "raise", times=None)
    ask(listening, b'{"disarm": ""}')
    hit(NAME)


def test_the_socket_answers_while_the_event_loop_hangs_and_releases_it(listening: Path) -> None:
    ask(listening, msgspec.json.encode(Request(arm=Arm(NAME, "hang"))))

    async def blocked() -> None:
        hit(NAME)

    thread = threading.Thread(target=asyncio.run, args=(blocked(),))
    thread.start()
    until(lambda: any(point.hanging for point in ask(listening, b"{}").points))
    ask(listening, msgspec.json.encode(Request(disarm=NAME)))
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("line", [b"nonsense", b'{"arm": {"name": "x", "action": "exit"}}', b'{"unheard_of": 1}'])
def test_a_request_that_makes_no_sense_is_refused_and_harms_nothing(listening: Path, line: bytes) -> None:
    assert ask(listening, line).error
    assert ask(listening, b"{}").error is None


def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "api0").mkdir()
    left = socket.socket(socket.AF_UNIX)
    with failpoint_socket.short_path(tmp_path / "api0", SOCKET_FILE) as path:
        left.bind(path)
    left.close()
    try:
        failpoint_socket.listen(config(tmp_path), "api0")
        assert len(ask(tmp_path / "api0", b"{}").points) == len(CATALOGUE)
    finally:
        failpoints.activate(None)
