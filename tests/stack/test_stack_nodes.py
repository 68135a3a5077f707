"""Each kind of node can be killed, paused, resumed, started and stopped, and keeps what it promised to keep.

Every test leaves the shared stack healthy.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
import redis
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from compose import nodes, processes, wire
from compose.errors import NodeDied, PortTaken, SpecError, StackNotFound, UnknownNode
from compose.probe import LivenessProbe
from compose.stack import Stack
from compose.state import NodeRecord

ONE_OF_EACH = ("pg0", "kafka", "redis", "relay0")
READY_S = 60.0
"""Patience with a busy machine; nothing here is a measurement."""


@pytest.fixture(autouse=True)
def _healthy(stack: Stack) -> Iterator[None]:
    """Leave the stack as it was found."""
    yield
    stack.heal(READY_S)


@pytest.fixture
async def superuser(stack: Stack) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's session on pg0."""
    connection = await _connect(stack)
    yield connection
    if not connection.is_closed():
        await connection.close(timeout=5)


async def _connect(stack: Stack) -> asyncpg.Connection:
    user, password = stack.superuser
    return await asyncpg.connect(
        host="127.0.0.1", port=stack.port("pg0"), user=user, password=password, database="postgres"
    )


def _state(stack: Stack, node: str) -> str:
    return next(status.state for status in stack.status(memory=False) if status.name == node)


def _record(stack: Stack, node: str) -> NodeRecord:
    return nodes.named(stack.state, node)


@pytest.mark.parametrize("node", ONE_OF_EACH)
def test_killed_node_is_gone_with_its_whole_tree_and_comes_back_on_its_port(stack: Stack, node: str) -> None:
    before = _record(stack, node)
    stack.kill(node)
    assert nodes.find(before) == []
    assert _state(stack, node) == "dead"
    stack.kill(node)  # harmless
    stack.start_node(node, READY_S)
    after = _record(stack, node)
    assert _state(stack, node) == "running"
    assert after.port == before.port
    assert after.process != before.process


@pytest.mark.parametrize("node", ONE_OF_EACH)
def test_paused_node_hangs_with_its_whole_tree_until_it_is_resumed(stack: Stack, node: str) -> None:
    record = _record(stack, node)
    stack.pause(node)
    assert _state(stack, node) == "paused"
    assert {row.state for row in nodes.find(record)} == {"T"}
    with pytest.raises(wire.NoAnswer) as silent:
        nodes.check_ready(record, stack.state.redis_password, timeout_s=0.3)
    assert not silent.value.definite  # it hangs; a dead one refuses
    stack.resume(node)
    assert _state(stack, node) == "running"
    stack.wait_ready(node, READY_S)
    assert _record(stack, node).process == record.process


@pytest.mark.parametrize("node", ONE_OF_EACH)
def test_stopped_node_ends_in_order_even_when_paused(stack: Stack, node: str) -> None:
    stack.pause(node)
    stack.stop(node, READY_S)
    assert _state(stack, node) == "dead"


@pytest.mark.parametrize("node", ["pg0", "redis"])
def test_probe_sees_kill_and_pause_as_down_and_start_and_resume_as_up(stack: Stack, node: str) -> None:
    earlier = 0.0
    with LivenessProbe.of(stack) as probe:
        for hurt, help_ in ((stack.kill, stack.start_node), (stack.pause, stack.resume)):
            deadline = time.monotonic() + READY_S
            while not probe.is_up(node):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            began = time.monotonic()
            hurt(node)
            # Dated back to the question before, which is at most a time-out and an interval earlier.
            down = probe.wait_edge(node, up=False, after=max(earlier, began - 1.0), timeout_s=READY_S)
            assert down is not None
            helped = time.monotonic()
            help_(node)
            up = probe.wait_edge(node, up=True, after=helped, timeout_s=READY_S)
            assert up is not None
            assert up.t > down.t
            earlier = up.t


def test_heal_brings_back_everything_and_is_harmless_to_repeat(stack: Stack) -> None:
    stack.kill("pg1")
    stack.pause("redis")
    stack.kill("matcher0")
    assert sorted(stack.heal(READY_S)) == ["resumed redis", "started matcher0", "started pg1"]
    assert {status.state for status in stack.status(memory=False)} == {"running"}
    assert stack.heal(READY_S) == []


async def test_committed_row_survives_the_kill_of_its_server(stack: Stack, superuser: asyncpg.Connection) -> None:
    await superuser.execute("CREATE TABLE IF NOT EXISTS survives (at float8)")
    at = time.time()
    await superuser.execute("INSERT INTO survives VALUES ($1)", at)
    stack.kill("pg0")
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await superuser.fetchval("SELECT 1")
    stack.start_node("pg0", READY_S)
    again = await _connect(stack)
    assert await again.fetchval("SELECT count(*) FROM survives WHERE at = $1", at) == 1
    await again.execute("DROP TABLE survives")
    await again.close()


async def test_nothing_is_written_while_a_server_is_paused(stack: Stack, superuser: asyncpg.Connection) -> None:
    wal = Path(_record(stack, "pg0").folder) / "data" / "pg_wal"

    def written() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in wal.glob("0*")}

    await superuser.execute("CREATE TABLE IF NOT EXISTS pauses (at float8)")
    stack.pause("pg0")
    before = written()
    with pytest.raises(TimeoutError):
        await superuser.execute("INSERT INTO pauses VALUES (1)", timeout=0.5)
    assert written() == before
    stack.resume("pg0")
    again = await _connect(stack)
    await again.execute("DROP TABLE pauses")
    await again.close()


async def test_servers_are_durable_and_take_passwords_only(stack: Stack, superuser: asyncpg.Connection) -> None:
    wanted = {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "password_encryption": "scram-sha-256",
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "jit": "off",
        "data_checksums": "on",
    }
    for name, value in wanted.items():
        assert await superuser.fetchval("SELECT current_setting($1)", name) == value, name
    for password in ("wrong", ""):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(
                host="127.0.0.1", port=stack.port("pg0"), user="postgres", password=password, database="postgres"
            )


async def test_every_server_is_a_cluster_of_its_own(stack: Stack, superuser: asyncpg.Connection) -> None:
    user, password = stack.superuser
    other = await asyncpg.connect(
        host="127.0.0.1", port=stack.port("pg1"), user=user, password=password, database="postgres"
    )
    query = "SELECT system_identifier FROM pg_control_system()"
    assert await superuser.fetchval(query) != await other.fetchval(query)
    await other.close()


def test_postgres_does_not_run_as_root(stack: Stack) -> None:
    pids = [row.identity.pid for row in nodes.find(_record(stack, "pg0"))]
    assert pids
    for pid in pids:
        assert "\nUid:\t0\t" not in Path(f"/proc/{pid}/status").read_text()


def test_redis_wants_its_password_and_keeps_nothing(stack: Stack) -> None:
    port = stack.port("redis")
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis(port=port, password=stack.config.redis_password) as ours:
        ours.set("compose:kept", "1")
        stack.kill("redis")
        stack.start_node("redis", READY_S)
        assert ours.get("compose:kept") is None


def test_kafka_keeps_its_events_over_a_kill(stack: Stack) -> None:
    servers: dict[str, str | int | float | bool] = {"bootstrap.servers": stack.config.kafka_bootstrap}
    topic = f"compose-{time.time_ns()}"
    admin = AdminClient(servers)
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
    producer = Producer({**servers, "acks": "all"})
    for number in range(100):
        producer.produce(topic, str(number).encode())
    assert producer.flush(30) == 0
    stack.kill("kafka")
    stack.start_node("kafka", READY_S)
    consumer = Consumer({**servers, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.assign([TopicPartition(topic, 0, 0)])
    assert [m.value() for m in consumer.consume(100, timeout=60)] == [str(n).encode() for n in range(100)]
    consumer.close()
    admin.delete_topics([topic])[topic].result(30)


def test_nothing_listens_beyond_this_machine(stack: Stack) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))  # sends nothing; tells our own address towards outside
        except OSError:
            pytest.skip("this machine has no other address")
        address = route.getsockname()[0]
    for status in stack.status(memory=False):
        with pytest.raises(OSError):
            socket.create_connection((address, status.port), timeout=1).close()


def test_status_measures_processes_memory_and_cpu(stack: Stack) -> None:
    found = {status.name: status for status in stack.status()}
    assert set(found) == {name for name, _kind in stack.state.spec.nodes()}
    assert found["pg0"].processes > 3
    assert found["kafka"].memory_bytes > 50 << 20
    assert found["kafka"].cpu_s > 0
    assert sum(status.memory_bytes for status in found.values()) < 1_500_000_000


def test_stack_is_reached_from_another_process(stack: Stack) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom compose.stack import Stack\n"
        "stack = Stack.attach(Path(sys.argv[1]))\nstack.kill('redis')\nstack.start_node('redis', 90)\n"
    )
    before = _record(stack, "redis").process
    subprocess.run([sys.executable, "-c", code, str(stack.folder)], cwd=Path(__file__).parents[2], check=True)
    after = _record(stack, "redis").process
    assert before != after
    # The process that started it has ended and was not this one: still it is known and can be signalled.
    assert processes.is_alive(after)
    stack.kill("redis")


def test_pause_ends_by_itself_after_its_lease(stack: Stack) -> None:
    stack.pause("redis", lease_s=1.0)
    assert _state(stack, "redis") == "paused"
    _wait_running(stack, "redis")


def test_pause_ends_by_itself_although_its_maker_was_killed(stack: Stack) -> None:
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom compose.stack import Stack\n"
        "stack = Stack.attach(Path(sys.argv[1]))\nstack.pause('redis', lease_s=2)\n"
        "print('paused', flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    maker = [sys.executable, "-c", code, str(stack.folder)]
    done = subprocess.run(maker, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"paused\n")
    _wait_running(stack, "redis")


def test_lease_of_an_earlier_pause_does_not_end_a_later_one(stack: Stack) -> None:
    stack.pause("redis", lease_s=0.8)
    stack.resume("redis")
    stack.pause("redis", lease_s=60)
    time.sleep(1.5)  # past the end of the first lease
    assert _state(stack, "redis") == "paused"


def _wait_running(stack: Stack, node: str) -> None:
    deadline = time.monotonic() + READY_S
    while _state(stack, node) != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_dead_node_cannot_be_paused(stack: Stack) -> None:
    stack.kill("redis")
    with pytest.raises(NodeDied, match="start it first"):
        stack.pause("redis")


def test_node_that_ends_while_starting_shows_the_end_of_its_log(stack: Stack) -> None:
    stack.kill("pg0")
    conf = Path(_record(stack, "pg0").folder) / "data" / "postgresql.conf"
    good = conf.read_text()
    conf.write_text("no_such_setting = 1\n")
    try:
        with pytest.raises(NodeDied, match=r"(?s)pg0 ended .*no_such_setting"):
            stack.start_node("pg0", READY_S)
    finally:
        conf.write_text(good)


def test_port_somebody_took_meanwhile_is_named(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "PORT_FREE_TIMEOUT_S", 0.2)
    stack.kill("redis")
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", stack.port("redis")))
        thief.listen()
        with pytest.raises(PortTaken, match=f"pid {os.getpid()} "):
            stack.start_node("redis", READY_S)


def test_wrong_requests_are_answered_in_words(stack: Stack, tmp_path: Path) -> None:
    with pytest.raises(UnknownNode, match="pg0, pg1"):
        stack.kill("pg77")
    with pytest.raises(SpecError, match="lease"):
        stack.pause("redis", lease_s=0)
    with pytest.raises(StackNotFound, match="ledgerproof up"):
        Stack.attach(tmp_path)


def test_logs_are_collected(stack: Stack, tmp_path: Path) -> None:
    copies = {path.name for path in stack.collect_logs(tmp_path / "logs")}
    assert {"pg0.log", "kafka.log", "redis.log", "api0.log", "install.log"} <= copies
    assert stack.logs_tail("redis", 3).count("\n") <= 2
