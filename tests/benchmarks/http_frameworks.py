"""Measures how many JSON commands a second each candidate HTTP server or framework decodes, answers and encodes.

    .venv/bin/python tests/benchmarks/http_frameworks.py [--seconds 3] [--rounds 3] [--rate 4500] [--json FILE]

Every candidate runs one worker and does the same work: a bet is decoded into a msgspec struct and a 202 answer
is encoded. All but the service's own server run on Granian. Candidates take turns, so that a busy neighbour
hurts all of them alike, and the table shows ratios to the first one within the same round. The load is a closed
loop of keep-alive connections from `wrk`, or from a generator in this file where `wrk` is missing; with --rate it is
an open one by the bench's generator, which shows what a request costs a server that is not saturated. CPU time per
request, taken from the server's own process tree, is the steadier of the figures on a shared machine; the switches
are those of all its threads, asked for or not.

Frameworks that the project does not depend on are installed, pinned, into a throw-away environment.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import msgspec
from measuring import described, machine, python_with, ratios, spread

with contextlib.suppress(ImportError):
    import psutil  # not in the throw-away environment, where this file only serves

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
WARM_UP_S = 0.5
PATH = "/v1/wallets/7/bets"
TOKEN_CHARACTERS = 200
BODY = (
    b'{"match_id":"019a0000-0000-7000-8000-000000000001","outcome":"HOME","side":"BACK","odds":250,"stake_minor":1000}'
)
HEADERS = [("content-type", "application/json")]

ROOT = Path(__file__).parents[2]
SHARED_PACKAGES = ("granian", "httptools", "msgspec", "uvloop")
"""Taken into the throw-away environment in the versions of this one."""
PINNED = {"starlette": "1.10.0", "falcon": "4.4.0", "litestar": "2.25.0"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


# --- the work that every candidate does ------------------------------------------------------------------


class Bet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request."""

    match_id: UUID
    outcome: str
    side: str
    odds: int
    stake_minor: int


class Accepted(msgspec.Struct, frozen=True):
    """The body of an answer."""

    outcome: str
    replayed: bool
    user_id: int
    seq: int
    balance_minor: int
    bet_id: UUID


decode = msgspec.json.Decoder(Bet).decode
encode = msgspec.json.Encoder().encode


def answer(body: bytes) -> bytes:
    """Decode a bet and encode what the service would answer."""
    bet = decode(body)
    return encode(Accepted("ACCEPTED", False, 7, bet.odds, bet.stake_minor, bet.match_id))


# --- candidates -------------------------------------------------------------------------------------------


async def rsgi_app(scope: Any, protocol: Any) -> None:
    """Answer over RSGI, Granian's own interface, whose words our server uses too, without a framework."""
    protocol.response_bytes(202, HEADERS, answer(await protocol()))


async def asgi_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer over ASGI without a framework."""
    if scope["type"] != "http":
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [(name.encode(), value.encode()) for name, value in HEADERS]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": answer(body)})


def starlette_app() -> Any:
    """Build the same answer with Starlette."""
    applications, responses, routing = (
        import_module(f"starlette.{name}") for name in ("applications", "responses", "routing")
    )

    async def bets(request: Any) -> Any:
        return responses.Response(answer(await request.body()), 202, media_type="application/json")

    route = "/v1/wallets/{user_id:int}/bets"
    return applications.Starlette(routes=[routing.Route(route, bets, methods=["POST"])])


def falcon_app() -> Any:
    """Build the same answer with Falcon's ASGI application."""
    falcon_asgi = import_module("falcon.asgi")

    class Bets:
        async def on_post(self, request: Any, response: Any, user_id: int) -> None:
            response.data = answer(await request.stream.read())
            response.status = 202
            response.content_type = "application/json"

    app = falcon_asgi.App()
    app.add_route("/v1/wallets/{user_id:int}/bets", Bets())
    return app


def litestar_app() -> Any:
    """Build the same answer with Litestar, which decodes and encodes msgspec structs by itself."""
    litestar = import_module("litestar")

    async def bets(user_id: int, data: Bet) -> Accepted:
        return Accepted("ACCEPTED", False, user_id, data.odds, data.stake_minor, data.match_id)

    handler = litestar.post("/v1/wallets/{user_id:int}/bets", status_code=202)(bets)
    return litestar.Litestar(route_handlers=[handler], openapi_config=None)


@dataclass(frozen=True)
class Candidate:
    """One way to serve: `target` is an application or, for frameworks, the function that builds it.

    Without an interface it is served by `reference.http_server`.
    """

    title: str
    interface: str
    target: str
    factory: bool = False
    embedded: bool = False
    package: str | None = None


CANDIDATES = {
    "own": Candidate("httptools in the event loop", "", "rsgi_app"),
    "rsgi-embedded": Candidate("Granian RSGI, in the asyncio process", "rsgi", "rsgi_app", embedded=True),
    "rsgi-worker": Candidate("Granian RSGI, its own worker process", "rsgi", "rsgi_app"),
    "asgi-bare": Candidate("Granian ASGI, no framework", "asgi", "asgi_app"),
    "starlette": Candidate("Starlette", "asgi", "starlette_app", factory=True, package="starlette"),
    "falcon": Candidate("Falcon (ASGI)", "asgi", "falcon_app", factory=True, package="falcon"),
    "litestar": Candidate("Litestar", "asgi", "litestar_app", factory=True, package="litestar"),
}


def serve(name: str, port: int) -> None:
    """Serve one candidate until SIGTERM. Runs in a process of its own."""
    candidate = CANDIDATES[name]
    if not candidate.interface:
        http_server = import_module("reference.http_server")

        async def until_sigterm() -> None:
            stopping = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
            server = http_server.HttpServer(rsgi_app)
            await server.listen(port)
            await stopping.wait()
            await server.stop(STOP_TIMEOUT_S / 2)

        import_module("uvloop").run(until_sigterm())
        return
    if candidate.embedded:
        embed = import_module("granian.server.embed")

        async def main() -> None:
            server = embed.Server(rsgi_app, port=port, log_enabled=False)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
            await server.serve()

        import_module("uvloop").run(main())
        return
    granian = import_module("granian")
    constants = import_module("granian.constants")
    granian.Granian(
        f"{Path(__file__).stem}:{candidate.target}",
        port=port,
        interface=constants.Interfaces(candidate.interface),
        workers=1,
        loop=constants.Loops.uvloop,
        log_enabled=False,
        factory=candidate.factory,
        working_dir=Path(__file__).parent,
    ).serve()


# --- load -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What a generator saw: a closed loop of `connections` for `seconds`."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float


class Connection(asyncio.Protocol):
    """One keep-alive connection that sends the next request when the answer to the last has arrived."""

    REQUEST = (
        f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(BODY)}\r\n\r\n"
    ).encode() + BODY

    def __init__(self, latencies_s: list[float], failures: list[str]) -> None:
        self.latencies_s = latencies_s
        self.failures = failures
        self.buffer = b""
        self.sent_at = 0.0
        self.stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the loop."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        """Send one request."""
        self.sent_at = time.perf_counter()
        self.transport.write(self.REQUEST)

    def data_received(self, data: bytes) -> None:
        """Count the answer when it is whole, and go on."""
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if length is None or b" 202 " not in head.split(b"\r\n", 1)[0]:
            self.failures.append(head[:80].decode(errors="replace"))
            self.transport.close()
        elif len(body) >= int(length[1]):
            self.latencies_s.append(time.perf_counter() - self.sent_at)
            self.buffer = b""
            if self.stopping:
                self.transport.close()
            else:
                self.send()


async def own_load(port: int, connections: int, seconds: float) -> Load:
    """Load the server from this process. Raises RuntimeError on an answer other than 202."""
    latencies_s: list[float] = []
    failures: list[str] = []
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: Connection(latencies_s, failures), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    latencies_s.clear()
    await asyncio.sleep(seconds)
    measured = sorted(latencies_s)
    for client in clients:
        client.stopping = True
    if failures or not measured:
        raise RuntimeError(f"the server answered {failures[:1] or 'nothing'}")
    return Load(
        len(measured) / seconds,
        1000 * measured[len(measured) // 2],
        1000 * measured[len(measured) * 99 // 100],
    )


def wrk_load(port: int, connections: int, seconds: float) -> Load:
    """Load the server with wrk in one thread. Raises RuntimeError on an answer other than 202."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        body = BODY.decode().replace('"', '\\"')
        script.write(f'wrk.method="POST"\nwrk.body="{body}"\nwrk.headers["content-type"]="application/json"\n')
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency"]
        command += ["-s", script.name, f"http://127.0.0.1:{port}{PATH}"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    if rate is None or "Non-2xx" in printed:
        raise RuntimeError(f"wrk reported:\n{printed}")
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    found = {name: float(n) * scale[unit] for name, n, unit in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", printed)}
    return Load(float(rate[1]), found["50"], found["99"])


# --- measurement ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One candidate in one round."""

    candidate: str
    round_no: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_request: float
    switches_per_request: float


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tree_cpu_s(pid: int) -> float:
    """Return user plus system seconds of a process and its descendants so far."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def tree_switches(pid: int) -> int:
    """Return how often the threads of a process and its descendants were switched so far."""
    root = psutil.Process(pid)
    folders = [Path(f"/proc/{process.pid}/task") for process in (root, *root.children(recursive=True))]
    texts = [status.read_text() for folder in folders for status in folder.glob("*/status")]
    return sum(int(count) for text in texts for count in re.findall(r"ctxt_switches:\s+(\d+)", text))


@contextlib.contextmanager
def served(python: Path, name: str) -> Iterator[tuple[int, int]]:
    """Run a candidate's server; yield its pid and port when it accepts connections.

    What it prints is shown only if it does not start: Granian's own threads may complain while they stop.
    """
    port = free_port()
    with tempfile.TemporaryFile("w+") as output:
        command = [str(python), __file__, "--serve", name, "--port", str(port)]
        server = psutil.Popen(command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": str(ROOT)})
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{name} did not start:\n{output.read()}")
                time.sleep(0.05)
            yield server.pid, port
        finally:
            tree = [server, *server.children(recursive=True)] if server.poll() is None else []
            server.terminate()
            for survivor in psutil.wait_procs(tree, STOP_TIMEOUT_S)[1]:
                survivor.kill()


def closed_load(port: int, connections: int, seconds: float) -> Load:
    """Load the server as fast as it answers."""
    if shutil.which("wrk"):
        return wrk_load(port, connections, seconds)
    return asyncio.run(own_load(port, connections, seconds))


def measure(
    python: Path, name: str, round_no: int, connections: int, seconds: float, load: Callable[[int, int, float], Load]
) -> Sample:
    """Start the candidate, warm it up, load it and stop it."""
    with served(python, name) as (pid, port):
        asyncio.run(own_load(port, connections, WARM_UP_S))
        cpu_before_s, switches_before = tree_cpu_s(pid), tree_switches(pid)
        seen = load(port, connections, seconds)
        cpu_s, switches = tree_cpu_s(pid) - cpu_before_s, tree_switches(pid) - switches_before
    requests = seen.requests_per_s * seconds
    return Sample(
        name, round_no, seen.requests_per_s, seen.p50_ms, seen.p99_ms, 1e6 * cpu_s / requests, switches / requests
    )


def open_load(rate: float) -> Callable[[int, int, float], Load]:
    """Return a load of `rate` requests a second on average, whatever the answers do."""
    sys.path.insert(0, str(ROOT))
    plan, play = import_module("ledgerproof.bench.plan"), import_module("ledgerproof.bench.drive").play

    def load(port: int, connections: int, seconds: float) -> Load:
        asked = plan.Plan(
            ports=[port],
            kind="bets",
            loop="open",
            duration_s=seconds,
            rate=rate,
            connections=connections,
            matches=[json.loads(BODY)["match_id"]],
            token="t" * TOKEN_CHARACTERS,
        )
        seen = play(asked)
        if seen.accepted != seen.due:
            raise RuntimeError(f"{seen.accepted} of {seen.due} were accepted: {seen.first_problem}")
        return Load(seen.accepted / seen.duration_s, seen.p50_ms, seen.p99_ms)

    return load


def table(samples: list[Sample], names: list[str]) -> str:
    """Return a Markdown table: medians over rounds, ratios to the first candidate of the same round."""
    rates = {name: [s.requests_per_s for s in samples if s.candidate == name] for name in names}
    cpu_us = {name: [s.cpu_us_per_request for s in samples if s.candidate == name] for name in names}
    lines = [
        "| candidate | requests/s: ratio (range) | median | p99 ms | CPU µs/request: ratio (range) | median | switches "
        "|",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        lines.append(
            f"| {CANDIDATES[name].title} | {spread(ratios(rates[name], rates[names[0]]))} | {median(rates[name]):,.0f} "
            f"| {median(s.p99_ms for s in samples if s.candidate == name):.1f} "
            f"| {spread(ratios(cpu_us[name], cpu_us[names[0]]))} | {median(cpu_us[name]):.0f} "
            f"| {median(s.switches_per_request for s in samples if s.candidate == name):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the chosen candidates in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="load per candidate and round")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rate", type=float, help="requests per second of an open loop instead of a closed one")
    parser.add_argument("--json", type=Path, help="also write machine, samples and versions to this file")
    parser.add_argument("--serve", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.port)
        return
    load = open_load(args.rate) if args.rate else closed_load
    samples = []
    packages = [CANDIDATES[name].package for name in args.candidates]
    extra = [f"{package}=={PINNED[package]}" for package in packages if package is not None]
    with python_with(extra, SHARED_PACKAGES) as python:
        for round_no in range(args.rounds):
            for name in args.candidates:
                sample = measure(python, name, round_no, args.connections, args.seconds, load)
                samples.append(sample)
                print(f"round {round_no + 1}  {name:14} {sample.requests_per_s:9,.0f}/s", file=sys.stderr, flush=True)
    closed = "wrk -t1" if shutil.which("wrk") else "built in"
    where = machine() | {"generator": f"bench, open, {args.rate:g}/s" if args.rate else f"{closed}, closed"}
    print(described(where))
    print(table(samples, args.candidates))
    if args.json:
        versions = {package: version(package) for package in SHARED_PACKAGES} | PINNED
        found = {"machine": where, "versions": versions, "samples": [asdict(s) for s in samples]}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
