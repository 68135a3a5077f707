"""The client: what an answer or its absence says, and that the history holds what happened."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import polars as pl
import pytest
from aiohttp import web

from invariants import history
from ledgerproof import workload
from ledgerproof.client import NotSeeded, Player, classify, identity_of, monotonic_clock
from ledgerproof.wire import Lost, NotSent, Wire, get, post
from ledgerproof.workload import Kind, draw

pytestmark = pytest.mark.unit

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.mark.parametrize(
    ("status", "not_admitted", "expected"),
    [
        (200, False, "ok"),
        (202, False, "ok"),
        (400, False, "fail"),
        (404, False, "fail"),
        (409, False, "fail"),
        (422, False, "fail"),
        (429, False, "fail"),
        (503, True, "fail"),
        (503, False, "info"),
        (500, False, "info"),
        (500, True, "info"),
        (502, False, "info"),
        (504, False, "info"),
        (504, True, "info"),
        (408, False, "info"),
        (302, False, "info"),
        (100, False, "info"),
    ],
)
def test_classification(status: int, not_admitted: bool, expected: str) -> None:
    assert classify(status, not_admitted) == expected


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


class Script(asyncio.Protocol):
    """Answers each request with the next raw answer in `chunk_bytes` pieces; None closes the connection instead."""

    def __init__(self, answers: list[bytes | None], seen: list[bytes], chunk_bytes: int) -> None:
        self.answers, self.seen, self.chunk_bytes = answers, seen, chunk_bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.seen.append(data)
        answer = self.answers.pop(0)
        if answer is None:
            self.transport.close()
        else:
            self._write(answer)

    def _write(self, rest: bytes) -> None:
        self.transport.write(rest[: self.chunk_bytes])
        if len(rest) > self.chunk_bytes:
            asyncio.get_running_loop().call_later(0.001, self._write, rest[self.chunk_bytes :])


@asynccontextmanager
async def scripted(*answers: bytes | None, chunk_bytes: int = 100_000) -> AsyncIterator[tuple[int, list[bytes]]]:
    seen: list[bytes] = []
    script = list(answers)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Script(script, seen, chunk_bytes), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], seen
    finally:
        server.close()


def raw(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{extra}\r\n".encode() + body


async def test_wire_reads_status_and_body_and_keeps_the_connection() -> None:
    async with scripted(raw(b"one"), raw(b"two", "503 x", "x-admitted: 0\r\n")) as (port, seen):
        wire = Wire("127.0.0.1", port, timeout_s=1)
        first = await wire.exchange(get("/a"))
        second = await wire.exchange(post("/b", "key", b"{}"))
        assert (first.status, first.body, first.not_admitted) == (200, b"one", False)
        assert (second.status, second.body, second.not_admitted) == (503, b"two", True)
        assert b"Idempotency-Key: key" in seen[1]
        assert len(wire._all) == 1
        wire.close()


async def test_wire_puts_an_answer_in_pieces_together() -> None:
    async with scripted(raw(b"x" * 5000), chunk_bytes=700) as (port, _):
        wire = Wire("127.0.0.1", port, timeout_s=1)
        assert (await wire.exchange(get("/"))).body == b"x" * 5000
        wire.close()


async def test_wire_says_not_sent_when_nobody_listens(unused_port: int) -> None:
    wire = Wire("127.0.0.1", unused_port, timeout_s=1)
    with pytest.raises(NotSent):
        await wire.exchange(get("/"))


async def test_wire_says_lost_when_the_connection_breaks_after_sending() -> None:
    async with scripted(None) as (port, _):
        wire = Wire("127.0.0.1", port, timeout_s=1)
        with pytest.raises(Lost, match="reset"):
            await wire.exchange(get("/"))
        assert not wire._all


async def test_wire_says_lost_after_the_timeout_and_never_uses_that_connection_again() -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.3 if request.path == "/slow" else 0)
        return web.Response(text=request.path)

    async with serving(slow) as port:
        wire = Wire("127.0.0.1", port, timeout_s=0.1)
        with pytest.raises(Lost, match="timeout"):
            await wire.exchange(get("/slow"))
        await asyncio.sleep(0.35)
        assert (await wire.exchange(get("/fast"))).body == b"/fast"
        wire.close()


async def test_wire_sends_a_lost_request_only_once() -> None:
    async with scripted(raw(b"ok"), None, raw(b"never")) as (port, seen):
        wire = Wire("127.0.0.1", port, timeout_s=0.5)
        await wire.exchange(get("/one"))
        with pytest.raises(Lost):
            await wire.exchange(get("/two"))
        assert len(seen) == 2
        wire.close()


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ROLLED_BACK: dict[str, Any] = {"outcome": "ROLLED_BACK", "replayed": True}


class FakeLedger:
    """Answers like the service, from a dictionary; `rule` may answer first."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], tuple[bytes, dict[str, Any]]] = {}
        self.seqs: dict[str, int] = {}
        self.rule: Callable[[web.Request], Awaitable[web.Response | None]] | None = None
        self.requests = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        if self.rule is not None and (answer := await self.rule(request)) is not None:
            return answer
        path = request.path
        if request.method == "GET":
            if "/matches/" in path:
                return web.json_response({"state": "OPEN", "settled": False})
            user = path.split("/")[3]
            seq = self.seqs.get(user, 0)
            if path.endswith("/entries"):
                after = int(request.query["after_seq"])
                page = [{"seq": number, "balance_minor": 10} for number in range(after + 1, min(seq, after + 20) + 1)]
                more = "next" if page and page[-1]["seq"] < seq else None
                return web.json_response({"entries": page, "next_cursor": more})
            return web.json_response(
                {"user_id": int(user), "balance_minor": 5, "seq": seq, "source": "redis", "stale": False}
            )
        body = await request.read()
        if path == "/v1/commands":
            results = []
            items = msgspec.json.decode(body)["commands"]
            self.requests += len(items) - 1
            for item in items:
                op, user, key = item.pop("op"), str(item.pop("user_id")), item.pop("key")
                status, said = self.post(user, key, msgspec.json.encode(item), bet=op == "bet")
                results.append({"status": status} | said)
            return web.json_response({"results": results})
        user = path.split("/")[3] if "/wallets/" in path else "match"
        if path.endswith("/rollbacks"):
            key = msgspec.json.decode(body)["key"]
            known = self.answers.setdefault((user, key), (b"", ROLLED_BACK))
            bet_id = known[1].get("bet_id")
            return web.json_response({"outcome": "ACCEPTED", "replayed": False, "bet_id": bet_id}, status=202)
        status, answer = self.post(user, request.headers["Idempotency-Key"], body, bet=path.endswith("/bets"))
        return web.json_response(answer, status=status)

    def post(self, user: str, key: str, body: bytes, *, bet: bool) -> tuple[int, dict[str, Any]]:
        known = self.answers.get((user, key))
        if known is not None and known[1] is ROLLED_BACK:
            return 422, ROLLED_BACK
        if known is not None:
            if msgspec.json.decode(known[0]) != msgspec.json.decode(body):
                return 409, {"title": "differs", "outcome": "REPLAYED_DIFFERENTLY"}
            return 202, {**known[1], "replayed": True}
        self.seqs[user] = self.seqs.get(user, 0) + 1
        answer: dict[str, Any] = {"outcome": "ACCEPTED", "replayed": False, "seq": self.seqs[user], "balance_minor": 10}
        if bet:
            answer["bet_id"] = f"bet-{key}"
        self.answers[user, key] = (body, answer)
        return 202, answer


@asynccontextmanager
async def playing(
    folder: Path, *, rate: float = 60, duration_s: float = 3.0, timeout_s: float = 1.0
) -> AsyncIterator[tuple[Player, FakeLedger]]:
    ledger = FakeLedger()
    async with serving(ledger.answer) as port:
        recorder = history.Recorder(folder, "test")
        clock = monotonic_clock(time.monotonic())
        wires = [Wire("127.0.0.1", port, timeout_s=timeout_s) for _ in range(2)]
        schedule = draw(4, rate, duration_s, wallets=50, slots=4)
        player = Player(schedule, wires, recorder, clock, origin_unix_s=1e9)
        try:
            yield player, ledger
        finally:
            await player.stop()
            for wire in wires:
                wire.close()
            recorder.close()


async def test_a_whole_schedule_is_played_and_recorded(tmp_path: Path) -> None:
    async with playing(tmp_path) as (player, ledger):
        await player.seed()
        await player.run(player.clock() + 0.1)
    rows = history.load(tmp_path)
    assert rows.problems() == []
    attempts = history.attempts(rows.frame)
    assert attempts.height == player.sent == ledger.requests - len(player.schedule.matches[:4])
    assert attempts["cls"].is_in(["ok", "fail"]).all()
    assert player.dropped == 0
    assert (
        player.acknowledged_bets
        == attempts.filter((pl.col("op") == "bet") & (pl.col("cls") == "ok") & ~pl.col("replayed"))["key"].n_unique()
    )
    assert set(attempts["op"].unique()) >= {"bet", "deposit", "withdraw", "balance", "create_match", "entries"}
    pages = attempts.filter(pl.col("op") == "entries")
    full = pages.filter(pl.col("page_rows") > 0)
    assert pages["page_rows"].null_count() == pages["after_seq"].null_count() == 0
    assert (full["seq"] - full["after_seq"]).to_list() == full["page_rows"].to_list()
    reads = attempts.filter(pl.col("op") == "balance")
    assert set(reads["strong"].unique()) == {True, False}


def test_a_bet_and_the_rollback_of_its_key_are_two_commands() -> None:
    bet, back = draw(1, 50, 5).command, workload.rollback(7, "w1-1")
    first = next(bet(number) for number, kind in enumerate(draw(1, 50, 5).kind.tolist()) if kind == Kind.BET)
    assert identity_of(back) == ("rollback", 7, "w1-1")
    assert identity_of(first) == ("ledger", first.user, first.key)
    assert identity_of(workload.withdraw(7, 5, "w1-1")) == ("ledger", 7, "w1-1")


async def test_latency_counts_from_the_intended_time(tmp_path: Path) -> None:
    async with playing(tmp_path, rate=20, duration_s=2.0) as (player, _):
        start = player.clock() + 0.05
        await player.run(start)
    attempts = history.attempts(history.load(tmp_path).frame)
    load = attempts.filter(pl.col("tag").is_null() & (pl.col("op") == "bet"))
    assert (load["t_invoke"] >= load["intended"]).all()
    assert set((load["intended"] - start).round(6).to_list()) <= set(player.schedule.t.round(6).tolist())


async def test_a_race_sends_one_key_to_both_processes(tmp_path: Path) -> None:
    async with playing(tmp_path, rate=200, duration_s=2.0) as (player, _):
        await player.run(player.clock() + 0.05)
    races = history.attempts(history.load(tmp_path).frame).filter(pl.col("tag") == "race")
    assert races.height > 0
    for _, pair in races.group_by("key"):
        assert sorted(pair["api"]) == ["api0", "api1"]
        assert sorted(pair["replayed"]) == [False, True]


async def test_an_unknown_key_is_never_sent_again(tmp_path: Path) -> None:
    async with playing(tmp_path, rate=150, duration_s=3.0, timeout_s=0.2) as (player, ledger):

        async def every_third_bet_hangs(request: web.Request) -> web.Response | None:
            key = request.headers.get("Idempotency-Key", "")
            if request.path.endswith("/bets") and key.rsplit("-", 1)[-1][-1:] in "147":
                await asyncio.sleep(10)
            return None

        ledger.rule = every_third_bet_hangs
        await player.run(player.clock() + 0.05)
        assert player.unknown
        assert player.last_unknown_sent_s > 0
    attempts = history.attempts(history.load(tmp_path).frame)
    # A read has no key to send again; on a busy machine some of them stay without an answer too.
    keyed = pl.col("key").is_not_null()
    infos = attempts.filter((pl.col("cls") == "info") & (pl.col("tag").ne_missing("race")) & keyed)
    for key, at in infos.select("key", "t_return").iter_rows():
        assert attempts.filter((pl.col("key") == key) & (pl.col("t_invoke") > at)).is_empty()
    clients = infos["client"].to_list()
    later = attempts.filter(pl.col("client").is_in(clients)).group_by("client").agg(pl.col("cls").last())
    assert later["cls"].to_list() == ["info"] * len(set(clients)), "a client without an answer retires"


async def test_unknown_keys_can_be_resolved_by_sending_them_again(tmp_path: Path) -> None:
    async with playing(tmp_path, rate=100, duration_s=2.0, timeout_s=0.2) as (player, ledger):

        async def lose_answers_of_deposits(request: web.Request) -> web.Response | None:
            if request.path.endswith("/deposits") and ledger.rule is not None:
                ledger_rule, ledger.rule = ledger.rule, None
                await ledger.answer(request)
                ledger.rule = ledger_rule
                return web.json_response({"title": "unknown"}, status=504)
            return None

        ledger.rule = lose_answers_of_deposits
        await player.run(player.clock() + 0.05)
        ledger.rule = None
        assert player.unknown
        results = await player.retry_unknown(sorted(player.unknown))
        assert results
        assert all(result.record == "ok" and result.answer.replayed for _, result in results)
    attempts = history.attempts(history.load(tmp_path).frame)
    assert attempts.filter(pl.col("tag") == "final_retry").height == len(results)


async def test_arrivals_beyond_the_bound_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledgerproof.client.MAX_IN_FLIGHT", 5)
    async with playing(tmp_path, rate=100, duration_s=1.5, timeout_s=0.5) as (player, ledger):

        async def hang(request: web.Request) -> web.Response | None:
            await asyncio.sleep(10)
            return None

        ledger.rule = hang
        monkeypatch.setattr("ledgerproof.client.LIFECYCLE_TRIES", 1)
        await player.run(player.clock() + 0.05)
        assert player.dropped > 50
        assert player.in_flight == 0


async def test_an_answer_that_is_not_json_leaves_the_outcome_unknown(tmp_path: Path) -> None:
    async with playing(tmp_path) as (player, ledger):

        async def garbage(request: web.Request) -> web.Response | None:
            return web.Response(status=202, text="<html>")

        ledger.rule = garbage
        result = await player.attempt(workload.deposit(1, 5, "k"), 0, player.clock())
        assert result.record == "info"


async def test_seeding_that_is_refused_says_which_wallet_and_why(tmp_path: Path) -> None:
    async with playing(tmp_path) as (player, ledger):

        async def refuse(request: web.Request) -> web.Response | None:
            return web.json_response({"title": "refused", "outcome": "LIMIT_EXCEEDED"}, status=422)

        ledger.rule = refuse
        with pytest.raises(NotSeeded, match="LIMIT_EXCEEDED"):
            await player.seed()


async def test_matches_left_open_are_closed_and_settled_at_the_end(tmp_path: Path) -> None:
    async with playing(tmp_path, duration_s=1.0) as (player, ledger):
        states: dict[str, str] = {}
        versions: dict[str, int] = {}

        async def matches(request: web.Request) -> web.Response | None:
            if "/v1/matches/" not in request.path:
                return None
            match_id = request.path.split("/")[3]
            step = request.path.split("/")[-1]
            if request.method == "GET":
                state = states.get(match_id, "OPEN")
                settled, version = state in {"SETTLED", "VOID"}, versions.get(match_id, 0)
                return web.json_response({"state": state, "settled": settled, "settlement_version": version})
            if step == "resettle":
                body = await request.json()
                assert body["corrects_version"] == versions[match_id]
                states[match_id] = "VOID" if body["result"] is None else "SETTLED"
            else:
                states[match_id] = {"close": "CLOSED", "settle": "SETTLED", "void": "VOID"}[step]
            if states[match_id] != "CLOSED":
                versions[match_id] = versions.get(match_id, 0) + 1
            return web.json_response({"outcome": "ACCEPTED", "replayed": False}, status=202)

        ledger.rule = matches
        assert await player.finish_matches(player.clock() + 10) == []
        assert len(states) == len(player.schedule.matches)
        assert set(states.values()) <= {"SETTLED", "VOID"}
        planned = {str(plan.match_id): 1 + len(plan.corrections) for plan in player.schedule.matches}
        assert versions == planned
        assert max(versions.values()) > 1


async def test_a_broken_harness_task_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(tmp_path, duration_s=1.0) as (player, _):

        def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug of the harness")

        monkeypatch.setattr(player, "_learn", broken)
        with pytest.raises(ZeroDivisionError):
            await player.run(player.clock() + 0.05)


def test_answers_ignore_fields_the_client_does_not_need() -> None:
    from ledgerproof.client import Answer

    answer = msgspec.json.decode(b'{"entries":[{"a":1}],"next_cursor":null,"seq":3}', type=Answer)
    assert answer.seq == 3


async def test_each_command_of_a_bulk_has_a_result_of_its_own_in_the_history(tmp_path: Path) -> None:
    async with playing(tmp_path, rate=200, duration_s=4.0) as (player, ledger):
        arrival = next(i for i, kind in enumerate(player.schedule.kind.tolist()) if kind == Kind.BULK)
        commands = player.schedule.bulk(arrival)
        ledger.answers[str(commands[1].user), commands[1].key or ""] = (b"{}", {})
        ledger.answers[str(commands[2].user), commands[2].key or ""] = (b"{}", ROLLED_BACK)
        results = await player.attempt_bulk(commands, 0, player.clock())
        records = [result.record for result in results]
        assert records == ["ok", "fail", "fail"] + ["ok"] * (len(commands) - 3)
        assert (results[1].status, results[2].status) == (409, 422)
        assert results[-1].answer.replayed

        async def break_off(request: web.Request) -> web.Response | None:
            return web.json_response({"results": []})

        ledger.rule = break_off
        lost = await player.attempt_bulk(commands, 0, player.clock())
        assert {result.record for result in lost} == {"info"}
        assert player.unknown.keys() == {("ledger", command.user, command.key) for command in commands}
    attempts = history.attempts(history.load(tmp_path).frame)
    assert attempts["cls"].to_list() == records + ["info"] * len(commands)


async def test_a_bulk_that_was_never_sent_certainly_failed(tmp_path: Path, unused_port: int) -> None:
    async with playing(tmp_path, rate=200, duration_s=4.0) as (player, _):
        arrival = next(i for i, kind in enumerate(player.schedule.kind.tolist()) if kind == Kind.BULK)
        player.wires = [Wire("127.0.0.1", unused_port, timeout_s=1)]
        results = await player.attempt_bulk(player.schedule.bulk(arrival), 0, player.clock())
        assert {result.record for result in results} == {"fail"}
