"""Time of the functions that run once for every bet. `make bench` measures; `make test` only runs them once."""

import random
from uuid import UUID

import msgspec
from pytest_benchmark.fixture import BenchmarkFixture

from reference.commands import PlaceBet, Side
from reference.ledger import reserve_of
from reference.orderbook import Book, Order
from reference.settlement import SettlementKind, entries_of
from reference.uuid7 import uuid7

MATCH = UUID(int=1)
ORDERS = 1000
COMMISSION_BPS = 200


def orders() -> list[Order]:
    """A thousand bets of 300 wallets around even odds, the same each time."""
    draw = random.Random(7)
    made = []
    for arrival in range(1, ORDERS + 1):
        side = draw.choice(list(Side))
        odds, stake = draw.randint(180, 220), draw.randint(100, 10_000)
        reserve = reserve_of(side, odds, stake)
        outcome = draw.choice(("HOME", "DRAW", "AWAY"))
        made.append(Order(UUID(int=arrival), MATCH, draw.randint(1, 300), outcome, side, odds, stake, reserve, arrival))
    return made


def filled_book(placed: list[Order]) -> int:
    book = Book(MATCH)
    return sum(len(book.place(order)) for order in placed)


def test_matching_of_a_thousand_bets(benchmark: BenchmarkFixture) -> None:
    fills = benchmark.pedantic(filled_book, setup=lambda: ((orders(),), {}), rounds=20)  # type: ignore[no-untyped-call]
    assert fills > ORDERS // 4


def test_settlement_of_a_thousand_bets(benchmark: BenchmarkFixture) -> None:
    placed = orders()
    filled_book(placed)

    def settle() -> int:
        return sum(len(entries_of(o, SettlementKind.SETTLE, "HOME", 1, COMMISSION_BPS)) for o in placed)

    assert benchmark(settle) > ORDERS // 4


def test_decoding_of_a_bet(benchmark: BenchmarkFixture) -> None:
    decode = msgspec.json.Decoder(PlaceBet).decode
    body = msgspec.json.encode(PlaceBet(MATCH, "HOME", Side.BACK, 250, 1000))
    assert benchmark(decode, body).stake_minor == 1000


def test_making_of_an_id(benchmark: BenchmarkFixture) -> None:
    assert benchmark(uuid7).version == 7
