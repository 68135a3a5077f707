"""The whole service in this process, on the real servers of a running stack, with a client that records.

Every part is the service's own: its HTTP door, writers, relay, matcher, settler and projector, each started by its
`run`. A part can be ended in order, started again, or run as a process of its own that can be killed. Each run has
fresh databases and topics and an empty cache.
"""

import asyncio
import contextlib
import importlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
import msgspec
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from redis import Redis

from compose import service, wire
from compose.stack import Stack
from ledgerproof import ending, workload
from ledgerproof.client import REQUEST_TIMEOUT_S, Client, Result
from ledgerproof.collect import NotCollected
from ledgerproof.mutants.tunnel import Tunnel
from ledgerproof.progress import Progress
from ledgerproof.recording import Recording, open_recording, write_config
from ledgerproof.wire import Wire
from ledgerproof.workload import Command
from reference.bus import create_topics, read_to_end, topics
from reference.cache import KEY_PREFIX
from reference.commands import DEFAULT_OUTCOMES, Side
from reference.config import CONFIG_VARIABLE, ServerConfig
from reference.failpoints import Action, Arm, Failpoints, activate
from reference.install import install_server
from reference.routing import shard_of_match
from reference.uuid7 import uuid7

ROLES: Final = ("api0", "api1", "relay0", "matcher0", "settler0", "projector0")
PREFIX: Final = "planted_"
"""Names of the databases begin so."""
WITHIN_S: Final = 40.0
"""What a scenario waits for comes within this time, or the scenario fails."""
POLL_S: Final = 0.01
STOP_S: Final = 8.0
RECOVER_S: Final = 5.0
"""After a fault is healed the service is back within this time."""
RECONCILE_EVERY_S: Final = 1.0
SETTINGS: Final[dict[str, Any]] = {
    "command_deadline_ms": 600,
    "statement_timeout_ms": 1500,
    "reconcile_full_at": "",
    "reconcile_every_s": 0.0,
    "relay_poll_ms": 40,
    "relay_gather_ms": 20,
    "trust_every_caller": True,
    "drain_notice_ms": 0,
    "trace_sample": 0.0,
    "trace_folder": None,
    "default_partitions": 4,
}
"""Short times, so that what must be waited for is soon over; the rules are those of any stack."""

log = logging.getLogger("ledgerproof.mutants")


class ScenarioFailed(Exception):
    """The scenario could not be played to its end: that says nothing about the planted bug."""


@dataclass
class _Part:
    """One running part of the service."""

    port: int
    task: asyncio.Task[None] | None
    stopping: asyncio.Event
    process: subprocess.Popen[bytes] | None = None


class Floor:
    """A service, and somebody who uses it."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        """Use the servers of `stack` and write everything below `folder`."""
        self.stack = stack
        self.folder = folder
        self._parts: dict[str, _Part] = {}
        self._ports: dict[str, int] = {}
        database = f"{PREFIX}{secrets.token_hex(4)}"
        base = stack.config
        servers = [msgspec.structs.replace(server, database=database) for server in base.servers]
        self.config = msgspec.structs.replace(base, servers=servers, token_key=None, **SETTINGS)
        self.tunnels = [Tunnel(server.host, server.port) for server in servers]
        """The API's ways to the servers; all other parts go straight."""
        self._api_config = self.config
        self._keys = 0
        self.points: Failpoints
        """The failpoints of all parts that run in this process."""
        self.recording: Recording
        self.client: Client
        self._scene: ending.Scene
        self._beside: set[asyncio.Task[None]] = set()

    # -- begin and end

    async def open(self) -> None:
        """Make databases and topics, start every part and wait until the API is ready."""
        await asyncio.to_thread(self._wipe)
        superuser, password = self.stack.superuser
        await asyncio.gather(
            *(install_server(self.config, index, superuser, password) for index in range(len(self.config.servers))),
            asyncio.to_thread(create_topics, self.config),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.points = Failpoints(self.folder)
        activate(self.points)
        ports = [await tunnel.start() for tunnel in self.tunnels]
        ways = [
            ServerConfig(server.name, "127.0.0.1", port, server.database)
            for server, port in zip(self.config.servers, ports, strict=True)
        ]
        self._api_config = msgspec.structs.replace(self.config, servers=ways)
        for role in ROLES:
            self.start(role)
        self._open_recording()
        await asyncio.gather(*(self.ready(role) for role in ROLES))

    def _open_recording(self) -> None:
        self.recording = recording = open_recording(
            self.folder,
            seed=1,
            rate=1.0,
            config={"request_timeout_s": REQUEST_TIMEOUT_S, "recover_within_s": RECOVER_S},
        )
        # A scenario does what it needs and not everything there is; V01 judges what it did.
        write_config(recording, self.config, [])
        wires = [Wire("127.0.0.1", self._ports[name], timeout_s=REQUEST_TIMEOUT_S) for name in ("api0", "api1")]
        self.client = Client(wires, recording.recorder, recording.clock)
        progress = Progress(quiet=True)
        self._scene = ending.Scene(self.config, recording, progress, self.client, ending.whole(self.config))
        recording.timeline.phase("seed")
        recording.facts.load_start_s = recording.clock()

    async def rest(self) -> None:
        """End the load as every run does: drain, copy, resolve what is unknown, copy again, ask the reconciler."""
        recording = self.recording
        self.points.disarm()
        for tunnel in self.tunnels:
            tunnel.open.set()
        recording.facts.load_end_s = recording.clock()
        recording.timeline.phase("drain")
        try:
            recording.facts.drained = await ending.drained(self._scene, ending.DRAIN_TIMEOUT_S)
            await ending.collect(self._scene)
        except NotCollected as error:
            recording.invalid(str(error))

    def planted_drift(self, user: int) -> None:
        """Say whose read balance the scenario made wrong: what the reconciler says of it is the checker's to judge."""
        self._scene.planted = user

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Let work go on that the end of the load does not wait for."""
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def arm(
        self, name: str, action: Action, *, times: int | None = 1, skip: int = 0, delay_ms: int | None = None
    ) -> None:
        """Arm a failpoint of the parts that run in this process."""
        self.points.arm(Arm(name, action, times, skip, delay_ms))

    def fired(self, name: str) -> int:
        """Return how often a failpoint has done something."""
        return next(state.fired for state in self.points.states() if state.name == name)

    async def until_fired(self, name: str, times: int = 1) -> None:
        """Wait until a failpoint has done something so often."""

        async def enough() -> bool:
            return self.fired(name) >= times

        await self.until(enough, f"the failpoint {name} was reached")

    async def close(self) -> None:
        """End every part; the databases go with their servers."""
        for task in list(self._beside):
            task.cancel()
        for wire_ in self.client.wires if hasattr(self, "client") else ():
            wire_.close()
        await asyncio.gather(*(self.stop(name) for name in list(self._parts)), return_exceptions=True)
        await asyncio.gather(*(tunnel.stop() for tunnel in self.tunnels))

    def _wipe(self) -> None:
        """Remove what an earlier run left in the servers."""
        client = self._redis()
        client.flushall()
        client.close()
        admin = AdminClient({"bootstrap.servers": self.config.kafka_bootstrap, "log_level": 2})
        old = sorted(set(admin.list_topics(timeout=WITHIN_S).topics) & set(topics()))
        if old:
            for deletion in admin.delete_topics(old, request_timeout=WITHIN_S).values():
                deletion.result()
        deadline = time.monotonic() + WITHIN_S
        while set(admin.list_topics(timeout=WITHIN_S).topics) & set(topics()):
            if time.monotonic() > deadline:
                raise ScenarioFailed("the topics of the run before do not go away")
            time.sleep(POLL_S)

    async def owner(self, server: int, database: str | None = None) -> asyncpg.Connection:
        """Return a superuser's connection to one server; the caller closes it."""
        at = self.config.servers[server]
        user, password = self.stack.superuser
        return await asyncpg.connect(
            host=at.host, port=at.port, user=user, password=password, database=database or at.database
        )

    async def sql(self, server: int, query: str, *args: object) -> list[asyncpg.Record]:
        """Run one statement as the superuser and return its rows."""
        connection = await self.owner(server)
        try:
            return await connection.fetch(query, *args)
        finally:
            await connection.close()

    # -- parts

    def start(self, name: str, *, apart: bool = False) -> None:
        """Start a part, in this process or (`apart`) as one of its own that can be killed."""
        port = self._ports.setdefault(name, free_port())
        role = service.role_of(name)
        config = self._api_config if role == "api" else self.config
        if role == "reconciler":
            config = msgspec.structs.replace(config, reconcile_every_s=RECONCILE_EVERY_S)
        stopping = asyncio.Event()
        if apart:
            path = self.folder / f"{name}.json"
            service.write_configuration(path, config)
            environment = service.environment(path)
            with (self.folder / f"{name}.log").open("ab") as output:
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    [sys.executable, "-m", "reference", role, "--name", name, "--port", str(port)],
                    env={**_inherited(), **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            self._parts[name] = _Part(port, None, stopping, process)
            return
        run = importlib.import_module(f"reference.{role}").run
        task = asyncio.create_task(run(config, name, port, stopping), name=f"part {name}")
        self._parts[name] = _Part(port, task, stopping)

    async def ready(self, name: str) -> None:
        """Wait until a part says that it can work."""
        part = self._parts[name]

        async def answered() -> bool:
            if part.task is not None and part.task.done():
                raise ScenarioFailed(f"{name} ended: {part.task.exception()!r}")
            if part.process is not None and part.process.poll() is not None:
                raise ScenarioFailed(f"{name} ended with {part.process.returncode}")
            try:
                return await asyncio.to_thread(wire.http_status, part.port, "/readyz", 1.0) == 200
            except wire.NoAnswer:
                return False

        await self.until(answered, f"{name} is ready")

    async def stop(self, name: str) -> None:
        """End a part in order."""
        part = self._parts.pop(name)
        if part.process is not None:
            part.process.kill()
            await asyncio.to_thread(part.process.wait)
            return
        assert part.task is not None, "a part is a task or a process"
        part.stopping.set()
        done, _ = await asyncio.wait([part.task], timeout=STOP_S)
        if not done:
            part.task.cancel()
            await asyncio.wait([part.task], timeout=STOP_S)

    async def kill(self, name: str) -> None:
        """SIGKILL a part that runs apart."""
        part = self._parts.pop(name)
        assert part.process is not None, f"{name} does not run apart"
        part.process.kill()
        await asyncio.to_thread(part.process.wait)

    async def restart(self, name: str) -> None:
        """End a part in order and start it again."""
        await self.stop(name)
        self.start(name)
        await self.ready(name)

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str, within_s: float = WITHIN_S) -> None:
        """Wait until a condition holds. Raises ScenarioFailed if it does not in time."""
        deadline = time.monotonic() + within_s
        while not await condition():
            if time.monotonic() > deadline:
                raise ScenarioFailed(f"waited {within_s:.0f} s in vain until {what}")
            await asyncio.sleep(POLL_S)

    async def until_sql(self, server: int, query: str, *args: object, what: str, within_s: float = WITHIN_S) -> None:
        """Wait until a statement returns a true value."""
        connection = await self.owner(server)
        try:

            async def holds() -> bool:
                return bool(await connection.fetchval(query, *args))

            await self.until(holds, what, within_s)
        finally:
            await connection.close()

    async def arrived(self, match_id: str, orders: int, within_s: float = WITHIN_S) -> None:
        """Wait until a match has so many orders."""
        query = "SELECT count(*) >= $2 FROM orders WHERE match_id = $1::text::uuid"
        await self.until_sql(
            self.home(match_id), query, match_id, orders, what=f"{orders} orders arrived", within_s=within_s
        )

    async def arrived_unless_kept(self, match_id: str, orders: int) -> None:
        """Wait until a match has so many orders; a planted bug may keep them from it, and then the drain says so."""
        with contextlib.suppress(ScenarioFailed):
            await self.arrived(match_id, orders, within_s=6.0)

    def home(self, match_id: str) -> int:
        """Return the server that holds a match."""
        return self.config.routing[shard_of_match(UUID(match_id))]

    def server_of(self, user: int) -> int:
        """Return the server on which a wallet began."""
        return self.config.routing[user % 100]

    @contextlib.asynccontextmanager
    async def locked(self, server: int, statement: str) -> AsyncIterator[None]:
        """Hold what a statement locks while the block runs."""
        connection = await self.owner(server)
        try:
            async with connection.transaction():
                await connection.execute(statement)
                yield
        finally:
            await connection.close()

    # -- the client

    def key(self, word: str = "key") -> str:
        """Return a new key."""
        self._keys += 1
        return f"{word}-{self._keys}"

    async def send(self, command: Command, api: int = 0, tag: str | None = None) -> Result:
        """Send a command once and record it."""
        return await self.client.attempt(command, api, self.client.clock(), tag)

    async def sure(self, command: Command, api: int = 0, tag: str | None = None) -> Result:
        """Send a command that a healthy service accepts, again under the same key while it certainly did not happen."""
        result = await self.send(command, api, tag)
        for _ in range(20):
            if result.record != "fail" or result.stored or result.status == 409:
                break
            await asyncio.sleep(0.1)
            result = await self.send(command, api, "retry")
        return result

    async def deposit(self, user: int, amount: int, key: str | None = None, api: int = 0) -> Result:
        """Deposit."""
        return await self.sure(workload.deposit(user, amount, key or self.key("in")), api)

    async def withdraw(self, user: int, amount: int, key: str | None = None, api: int = 0) -> Result:
        """Withdraw."""
        return await self.sure(workload.withdraw(user, amount, key or self.key("out")), api)

    async def bet(  # noqa: PLR0917 - in the order in which one says it
        self,
        user: int,
        match_id: str,
        selection: str,
        side: str,
        odds: int,
        stake: int,
        key: str | None = None,
        api: int = 0,
    ) -> Result:
        """Place a bet; `side` is BACK or LAY."""
        command = workload.bet(
            user=user,
            match_id=match_id,
            selection=selection,
            side=Side(side),
            odds=odds,
            stake_minor=stake,
            key=key or self.key("bet"),
        )
        return await self.sure(command, api)

    async def read(self, user: int, *, strong: bool = False, min_seq: int | None = None, api: int = 0) -> Result:
        """Read a balance."""
        return await self.send(workload.balance(user, strong=strong, min_seq=min_seq), api)

    async def match(self, shard: int | None = None) -> str:
        """Create a match, whose home is that of a logical shard if one is named, and return its id."""
        number = uuid7().int
        if shard is not None:
            number += shard - shard_of_match(UUID(int=number))
        match_id = str(UUID(int=number))
        body = {
            "match_id": match_id,
            "closes_at_ms": int((time.time() + 86_400) * 1000),
            "outcomes": list(DEFAULT_OUTCOMES),
        }
        key = self.key("create")
        await self.sure(Command("create_match", "/v1/matches", key, msgspec.json.encode(body), match_id=match_id))
        return match_id

    async def close_match(self, match_id: str, api: int = 0) -> Result:
        """Close a match."""
        path = f"/v1/matches/{match_id}/close"
        return await self.sure(Command("close_match", path, self.key("close"), b"{}", match_id=match_id), api)

    async def settle(self, match_id: str, result: str, *, wait: bool = True) -> Result:
        """Settle a match and wait until every bet is paid."""
        body = msgspec.json.encode({"result": result})
        path = f"/v1/matches/{match_id}/settle"
        done = await self.sure(
            Command("settle_match", path, self.key("settle"), body, match_id=match_id, selection=result)
        )
        if wait:
            await self.settled(match_id)
        return done

    async def void(self, match_id: str, *, wait: bool = True) -> Result:
        """Void a match and wait until every bet is refunded."""
        path = f"/v1/matches/{match_id}/void"
        done = await self.sure(Command("void_match", path, self.key("void"), b"{}", match_id=match_id))
        if wait:
            await self.settled(match_id)
        return done

    async def resettle(self, match_id: str, result: str | None, *, wait: bool = True, key: str | None = None) -> Result:
        """Settle a match again and wait until every bet is corrected."""
        body = msgspec.json.encode({"result": result, "corrects_version": None})
        path = f"/v1/matches/{match_id}/resettle"
        done = await self.sure(
            Command("resettle_match", path, key or self.key("resettle"), body, match_id=match_id, selection=result)
        )
        if wait:
            await self.settled(match_id)
        return done

    async def settled(self, match_id: str) -> None:
        """Wait until no settlement of a match runs; a planted bug may keep it from that, so it is not an error."""
        query = "SELECT NOT EXISTS (SELECT FROM settlements WHERE match_id = $1::text::uuid AND state = 'RUNNING')"
        with contextlib.suppress(ScenarioFailed):
            await self.until_sql(self.home(match_id), query, match_id, what="a match is settled", within_s=6.0)

    async def cancel(self, user: int, match_id: str, bet_id: str, key: str | None = None, api: int = 0) -> Result:
        """Cancel the rest of a bet."""
        return await self.sure(workload.cancel(user, match_id, bet_id, key or self.key("cancel")), api)

    async def roll_back(self, user: int, key: str, api: int = 0) -> Result:
        """Take back the bet under a key."""
        return await self.sure(workload.rollback(user, key), api)

    async def projected(self, user: int, seq: int, within_s: float = WITHIN_S) -> None:
        """Wait until the projection of a wallet has reached an entry."""
        query = "SELECT EXISTS (SELECT FROM wallet_balance_projection WHERE user_id = $1 AND seq >= $2)"
        await self.until_sql(self.server_of(user), query, user, seq, what="a projection caught up", within_s=within_s)

    def _redis(self) -> Redis:
        return Redis(
            host=self.config.redis_host,
            port=self.config.redis_port,
            password=self.config.redis_password,
            decode_responses=True,
        )

    def forget_cached(self, user: int) -> None:
        """Remove a wallet's balance from the cache."""
        client = self._redis()
        client.delete(f"{KEY_PREFIX}{user}")
        client.close()

    async def until_cached(self, user: int, seq: int) -> None:
        """Wait until the cache has an entry of a wallet; the scenario goes on without it after two seconds."""
        client = self._redis()

        async def there() -> bool:
            value = await asyncio.to_thread(client.get, f"{KEY_PREFIX}{user}")
            return value is not None and int(str(value).split(" ")[0]) >= seq

        try:
            with contextlib.suppress(ScenarioFailed):
                await self.until(there, "a balance is cached", within_s=2.0)
        finally:
            client.close()

    async def send_again(self, topic: str, user: int | None = None) -> int:
        """Send every record of a topic (or of one key) once more, as a relay that died may; return how many."""

        def again() -> int:
            producer = Producer({"bootstrap.servers": self.config.kafka_bootstrap, "acks": "all", "log_level": 2})
            records = list(read_to_end(self.config, topic))
            chosen = [record for record in records if user is None or record.key() == str(user).encode()]
            for record in chosen:
                producer.produce(topic, record.value(), record.key(), headers=record.headers())
            producer.flush(WITHIN_S)
            return len(chosen)

        return await asyncio.to_thread(again)


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != CONFIG_VARIABLE}


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
