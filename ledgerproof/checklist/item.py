"""An item of the checklist: what it asks, the check that looks, and what the check says."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

if TYPE_CHECKING:
    from ledgerproof.checklist.site import Site

OK: Final = "ok"
FAILED: Final = "failed"
CANNOT: Final = "cannot be run here"


class Failed(Exception):
    """The item is not as it must be; the message is the evidence."""


class CannotRun(Exception):
    """The item cannot be checked here; the message says why, and the nearest that was looked at."""


class Seen(NamedTuple):
    """The evidence of an ok, with what was measured for it."""

    evidence: str
    figures: dict[str, float]


@dataclass(frozen=True)
class Item:
    """One item. `check` returns the evidence of an ok, or raises Failed or CannotRun."""

    id: str
    section: str
    title: str
    """The words of the architecture's checklist, or ours for what it asks elsewhere."""
    check: "Callable[[Site], Awaitable[str | Seen]]"


class Answer(msgspec.Struct, frozen=True):
    """What became of an item."""

    id: str
    section: str
    title: str
    result: str
    """ok, failed, or cannot be run here."""
    evidence: str
    took_s: float
    figures: dict[str, float] = {}
    """What was measured, by name; the unit is in the name."""


def require(condition: object, otherwise: str) -> None:
    """Raise Failed unless the condition holds."""
    if not condition:
        raise Failed(otherwise)
