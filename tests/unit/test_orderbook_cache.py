"""The matcher's cache of order books is bounded, and holds nothing that somebody is changing."""

from uuid import UUID

from reference.commands import Side
from reference.matcher import BookCache
from reference.orderbook import Book, Order


def book(number: int, orders: int = 0) -> Book:
    match_id = UUID(int=number)
    waiting = [
        Order(UUID(int=1000 * number + arrival), match_id, 1, "HOME", Side.BACK, 200, 10, 10, arrival)
        for arrival in range(orders)
    ]
    return Book(match_id, 0, waiting)


def test_a_book_that_is_taken_is_gone_until_it_is_put_back() -> None:
    cache = BookCache()
    kept = book(1)
    cache.put(7, kept)
    assert cache.take(UUID(int=1)) == (7, kept)
    assert cache.take(UUID(int=1)) is None
    assert len(cache) == 0


def test_the_least_recently_used_book_goes_first() -> None:
    cache = BookCache(books_max=2)
    for number in (1, 2):
        cache.put(1, book(number))
    cache.put(2, book(1))
    cache.put(1, book(3))
    assert [cache.take(UUID(int=number)) is not None for number in (1, 2, 3)] == [True, False, True]


def test_the_orders_of_all_books_together_are_bounded() -> None:
    cache = BookCache(orders_max=10)
    cache.put(1, book(1, orders=6))
    cache.put(1, book(2, orders=4))
    assert len(cache) == 2
    cache.put(2, book(2, orders=5))
    assert cache.take(UUID(int=1)) is None
    cache.put(1, book(3, orders=11))
    assert len(cache) == 0
