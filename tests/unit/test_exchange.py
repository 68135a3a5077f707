"""What an API process remembers of matches, and when it must ask again."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

from reference.commands import Outcome
from reference.exchange import Matches
from reference.store import Store

MATCH = UUID(int=(7 << 76) | 1)
ROW = {"state": "OPEN", "outcomes": ["HOME", "AWAY"], "closes_at_ms": 2**53}


class Home:
    """The home server of a match; each question waits until it is answered."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[dict[str, Any] | None]] = []

    async def fetchrow(self, *_: object) -> dict[str, Any] | None:
        answer: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self.asked.append(answer)
        return await answer

    async def question(self, number: int) -> asyncio.Future[dict[str, Any] | None]:
        for _ in range(100):
            if len(self.asked) >= number:
                return self.asked[number - 1]
            await asyncio.sleep(0)
        raise AssertionError(f"question {number} was never asked")


def matches_of(home: Home) -> Matches:
    return Matches(cast("Store", SimpleNamespace(home_of=lambda _: 0, fetchrow=home.fetchrow)))


async def test_a_bet_that_joins_an_older_look_up_of_an_unknown_match_asks_again() -> None:
    home = Home()
    matches = matches_of(home)
    early = asyncio.create_task(matches.refusal(MATCH, "HOME"))
    first = await home.question(1)
    # Only now the match is created, and a bet on it comes while the older question is under way.
    late = asyncio.create_task(matches.refusal(MATCH, "HOME"))
    await asyncio.sleep(0)
    first.set_result(None)
    (await home.question(2)).set_result(ROW)
    assert await early is Outcome.UNKNOWN_MATCH
    assert await late is None


async def test_a_match_that_is_known_nowhere_is_asked_for_once_by_each_bet() -> None:
    home = Home()
    asked = asyncio.create_task(matches_of(home).refusal(MATCH, "HOME"))
    (await home.question(1)).set_result(None)
    assert await asked is Outcome.UNKNOWN_MATCH
    assert len(home.asked) == 1
