"""Time of the pure functions that run for every bet, event or row: `make benchmarks`. `make test` runs each once.

One benchmark does a thousand of the thing its name says, unless the name says otherwise.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest
from confluent_kafka import Message as KafkaMessage
from pytest_benchmark.fixture import BenchmarkFixture

from invariants.anomalies import CHECKS
from invariants.run import Run, load_run
from ledgerproof import wire
from ledgerproof.synth.run import write_run
from ledgerproof.synth.shape import Shape
from load.trace import read_trace, write_synthetic
from reference import bus, projector
from reference.answers import BulkAnswer, BulkResult, CommandAnswer
from reference.commands import Bulk, BulkBet, EventType, PlaceBet, Side
from reference.ledger import reserve_of
from reference.orderbook import Book, Order
from reference.proto import ledger_pb2 as pb
from reference.routing import even_routing, shard_of, shard_of_match
from reference.settlement import Ruling, SettlementKind, correction_entries, correction_of, entries_of
from reference.uuid7 import uuid7

MATCH = UUID(int=1)
MANY = 1000
COMMISSION_BPS = 200
RUN_ROWS = 50_000
"""History rows of the run that the folds are timed on."""
FOLDS = ("A01", "A02", "A08", "A09", "A12", "A14", "A21", "A23", "A25", "A28")
"""Codes of each sort: keys, refusals, wallets, sessions, events, settlement."""


def orders() -> list[Order]:
    """A thousand bets of 300 wallets around even odds, the same each time."""
    draw = random.Random(7)
    made = []
    for arrival in range(1, MANY + 1):
        side = draw.choice(list(Side))
        odds, stake = draw.randint(180, 220), draw.randint(100, 10_000)
        reserve = reserve_of(side, odds, stake)
        outcome = draw.choice(("HOME", "DRAW", "AWAY"))
        made.append(Order(UUID(int=arrival), MATCH, draw.randint(1, 300), outcome, side, odds, stake, reserve, arrival))
    return made


def filled_book(placed: list[Order]) -> int:
    book = Book(MATCH)
    return sum(len(book.place(order)) for order in placed)


# -- routing ---------------------------------------------------------------------------------------------


def test_routing_of_wallets(benchmark: BenchmarkFixture) -> None:
    draw, table = random.Random(1), even_routing(4)
    users = [draw.randrange(1, 2**63) for _ in range(MANY)]
    assert set(benchmark(lambda: [table[shard_of(user)] for user in users])) == {0, 1, 2, 3}


def test_routing_of_matches(benchmark: BenchmarkFixture) -> None:
    table = even_routing(4)
    matches = [uuid7(number) for number in range(MANY)]
    assert set(benchmark(lambda: [table[shard_of_match(match)] for match in matches])) == {0, 1, 2, 3}


# -- order book and settlement ---------------------------------------------------------------------------


def test_matching_of_bets(benchmark: BenchmarkFixture) -> None:
    fills = benchmark.pedantic(filled_book, setup=lambda: ((orders(),), {}), rounds=20)  # type: ignore[no-untyped-call]
    assert fills > MANY // 4


def test_cancelling_of_bets(benchmark: BenchmarkFixture) -> None:
    def resting() -> tuple[tuple[Book, list[UUID]], dict[str, Any]]:
        backs = [order for order in orders() if order.side is Side.BACK]
        book = Book(MATCH)
        for order in backs:
            book.place(order)
        return (book, [order.bet_id for order in backs]), {}

    def cancel(book: Book, bets: list[UUID]) -> int:
        return sum(book.cancel(bet) is not None for bet in bets)

    assert benchmark.pedantic(cancel, setup=resting, rounds=20) > MANY // 4  # type: ignore[no-untyped-call]


def test_settlement_of_bets(benchmark: BenchmarkFixture) -> None:
    placed = orders()
    filled_book(placed)

    def settle() -> int:
        return sum(len(entries_of(o, SettlementKind.SETTLE, "HOME", 1, COMMISSION_BPS)) for o in placed)

    assert benchmark(settle) > MANY // 4


def test_correction_of_bets(benchmark: BenchmarkFixture) -> None:
    placed = orders()
    filled_book(placed)
    before, after = Ruling(SettlementKind.SETTLE, "HOME"), Ruling(SettlementKind.SETTLE, "DRAW")

    def correct() -> int:
        changes = (correction_of(order, before, after, 2, COMMISSION_BPS) for order in placed)
        return sum(len(list(correction_entries(change, 0, 0))) for change in changes if change is not None)

    assert benchmark(correct) > MANY // 4


def test_making_of_ids(benchmark: BenchmarkFixture) -> None:
    assert len(set(benchmark(lambda: [uuid7(7) for _ in range(MANY)]))) == MANY


# -- codecs ----------------------------------------------------------------------------------------------

BET = PlaceBet(MATCH, "HOME", Side.BACK, 250, 1000)


def thousand(function: Callable[[Any], object], item: object) -> Callable[[], object]:
    """Return what does it a thousand times and returns the last result."""

    def run() -> object:
        result: object = None
        for _ in range(MANY):
            result = function(item)
        return result

    return run


def test_json_bets_decoded(benchmark: BenchmarkFixture) -> None:
    decode = msgspec.json.Decoder(PlaceBet).decode
    assert benchmark(thousand(decode, msgspec.json.encode(BET))) == BET


def test_json_answers_encoded(benchmark: BenchmarkFixture) -> None:
    answer = CommandAnswer("ACCEPTED", 700_001, 12, 9_600, UUID(int=7))
    assert b"ACCEPTED" in benchmark(thousand(msgspec.json.Encoder().encode, answer))


def test_json_bulk_of_a_thousand_decoded_and_answered(benchmark: BenchmarkFixture) -> None:
    bets = [BulkBet(user, f"k-{user}", MATCH, "HOME", Side.BACK, 250, 1000) for user in range(1, MANY + 1)]
    body = msgspec.json.encode(Bulk(list(bets)))
    decode, encode = msgspec.json.Decoder(Bulk).decode, msgspec.json.Encoder().encode

    def answer() -> bytes:
        commands = decode(body).commands
        return encode(BulkAnswer([BulkResult(202, "ACCEPTED", False, 1, 100) for _ in commands]))

    assert len(benchmark(answer)) > MANY * 20


def test_proto_bets_parsed(benchmark: BenchmarkFixture) -> None:
    raw = pb.PlaceBetRequest(
        user_id=700_001, key="bet-1", match_id=str(MATCH), outcome="HOME", side=pb.BACK, odds=250, stake_minor=1000
    ).SerializeToString()
    assert benchmark(thousand(pb.PlaceBetRequest.FromString, raw)).stake_minor == 1000


def test_proto_replies_serialised(benchmark: BenchmarkFixture) -> None:
    def reply(seq: int) -> bytes:
        return pb.CommandReply(outcome="ACCEPTED", seq=seq, balance_minor=9_600, bet_id=str(MATCH)).SerializeToString()

    assert pb.CommandReply.FromString(benchmark(thousand(reply, 12))).seq == 12


def test_wire_requests_built(benchmark: BenchmarkFixture) -> None:
    body = msgspec.json.encode(BET)
    assert body in benchmark(thousand(lambda b: wire.post("/v1/wallets/700001/bets", "bet-1", b, "t" * 200), body))


def test_wire_answers_read(benchmark: BenchmarkFixture) -> None:
    body = b'{"outcome":"ACCEPTED","user_id":700001,"seq":2,"balance_minor":9600,"replayed":false}'
    raw = b"HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)

    class Waiter:
        """Stands in for the future of the request."""

        reply: wire.Reply | None = None

        def done(self) -> bool:
            return False

        def set_result(self, reply: wire.Reply) -> None:
            self.reply = reply

    waiter, connection = Waiter(), wire._Connection()

    def read(data: bytes) -> wire.Reply | None:
        connection.waiter = cast(Any, waiter)
        connection.data_received(data)
        return waiter.reply

    assert benchmark(thousand(read, raw)) == wire.Reply(202, False, body)


class FakeRecord:
    """A Kafka record as the consumer gets it: the methods that `bus._decode` calls."""

    def __init__(self, number: int) -> None:
        payload = {
            "user_id": 1 + number % 300,
            "seq": 1 + number,
            "amount": -400,
            "balance": 9_600,
            "key": f"k-{number}",
        }
        self._value = msgspec.json.encode(payload)
        self._headers = [
            ("event-id", str(UUID(int=number)).encode()),
            ("event-type", EventType.ENTRY_POSTED.encode()),
            ("timestamp", b"2026-01-01T00:00:00.123456+00:00"),
            ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ]
        self._number = number

    def headers(self) -> list[tuple[str, bytes]]:
        return self._headers

    def value(self) -> bytes:
        return self._value

    def key(self) -> bytes:
        return b"700001"

    def topic(self) -> str:
        return "wallet.posted"

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self._number


def test_event_records_decoded(benchmark: BenchmarkFixture) -> None:
    records = [cast(KafkaMessage, FakeRecord(number)) for number in range(MANY)]
    assert len(benchmark(lambda: [bus._decode(record) for record in records])) == MANY


def test_newest_balances_of_events(benchmark: BenchmarkFixture) -> None:
    messages = [bus._decode(cast(KafkaMessage, FakeRecord(number))) for number in range(MANY)]
    assert len(benchmark(projector.newest, messages)) == 300


def test_event_payloads_encoded(benchmark: BenchmarkFixture) -> None:
    update = projector.BalanceUpdate(700_001, 9_600, 12, 1_767_225_600_000)
    assert b"9600" in benchmark(thousand(msgspec.json.Encoder().encode, update))


def test_trace_rows_read(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "trace.csv", rows=MANY, seed=1)
    assert benchmark(lambda: read_trace(path).rows) == MANY


# -- folds -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 50,000 history rows."""
    folder = tmp_path_factory.mktemp("synth") / "run"
    write_run(Shape(RUN_ROWS, seed=5), folder, lambda _text: None)
    return load_run(folder)


def fresh(run: Run) -> tuple[tuple[Run], dict[str, Any]]:
    """The same evidence, with nothing derived from it yet."""
    again = Run(
        config=run.config,
        recording=run.recording,
        timeline_rows=run.timeline,
        series_rows=run.series,
        first=run.first,
        second=run.second,
        folder=run.folder,
    )
    return (again,), {}


def test_fates_and_resolution_of_a_run(benchmark: BenchmarkFixture, run: Run) -> None:
    """What every fold over keys shares."""
    resolve = benchmark.pedantic
    assert resolve(lambda again: again.resolution, setup=lambda: fresh(run), rounds=12, warmup_rounds=1).height


def test_replay_of_the_entries_of_a_run(benchmark: BenchmarkFixture, run: Run) -> None:
    """What every fold over wallets shares: order by wallet and seq, neighbours, sums."""
    replay = benchmark.pedantic
    assert replay(lambda again: again.entries, setup=lambda: fresh(run), rounds=12, warmup_rounds=1).height


@pytest.mark.parametrize("code", FOLDS)
def test_fold_over_a_run(benchmark: BenchmarkFixture, run: Run, code: str) -> None:
    """The fold alone: what it shares with others is there after its first call, and timed above."""
    find = CHECKS[code].find
    assert find(run).count == 0
    found = benchmark.pedantic(find, args=(run,), rounds=12, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert found.count == 0
