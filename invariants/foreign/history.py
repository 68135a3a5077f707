"""A history of a foreign harness as calls: what a process asked, what it was told, and between which two moments.

The form is Jepsen's: one map per event, with :type (:invoke, :ok, :fail, :info), :process, :f and :value, in the order
in which they happened. An :info says that nobody knows what became of the call, now or later.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from invariants.foreign.edn import EdnError, Keyword, Tagged, Value, read_all

MAX_FILE_BYTES: Final = 1_000_000_000
"""A larger file would not fit into memory as Python objects."""

OP_TAG: Final = "jepsen.history.Op"
NEVER: Final = 2**63
"""The end of a call that was never answered for certain."""


class HistoryError(Exception):
    """The file is no history of this form; the message says why and names the line."""


class Kind(StrEnum):
    """What became of a call."""

    OK = "ok"
    FAIL = "fail"
    INFO = "info"


@dataclass(frozen=True)
class Call:
    """One call of a client; `begin` and `end` are positions in the history."""

    number: int
    process: int
    f: str
    kind: Kind
    asked: Value
    """:value of the invocation."""
    told: Value
    """:value of the completion; of an :info call that of the invocation."""
    begin: int
    end: int
    """NEVER for an :info call: it may have its effect at any later time."""
    line: int
    """Line of the completion in the file; of the invocation where there is none."""

    @property
    def label(self) -> str:
        """Return how a sentence names it."""
        return f"{self.f} of process {self.process} (line {self.line})"


def read_file(path: Path, show: Callable[[str], None] | None = None) -> list[Call]:
    """Read a history file. Raises HistoryError for one that is damaged or of another form, OSError if unreadable.

    `show` is told now and then how much was read.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise HistoryError(f"the file is larger than {MAX_FILE_BYTES:,} bytes; judge a part of it")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise HistoryError(f"line {line}: the file is not UTF-8 text") from error
    return read_text(text, show)


def read_text(text: str, show: Callable[[str], None] | None = None) -> list[Call]:
    """Return the calls of a history. Raises HistoryError."""

    def so_far(characters: int) -> None:
        if show is not None:
            show(f"{100 * characters / max(1, len(text)):.0f} % read")

    try:
        return calls(read_all(text, so_far))
    except EdnError as error:
        raise HistoryError(str(error)) from error


def calls(events: Iterable[tuple[int, Value]]) -> list[Call]:
    """Pair invocations with completions, by process. Raises HistoryError where that cannot be done."""
    pending: dict[int, tuple[int, int, dict[str, Value]]] = {}
    found: list[Call] = []
    last_index = -1
    for position, (line, form) in enumerate(events):
        event = form.value if isinstance(form, Tagged) and form.tag == OP_TAG else form
        if not isinstance(event, dict):
            raise HistoryError(f"line {line}: an event must be a map, not {event!r}")
        kind, process = event.get("type"), event.get("process")
        index = event.get("index")
        if isinstance(index, int) and index >= 0:
            if index <= last_index:
                raise HistoryError(f"line {line}: :index {index} comes after {last_index}; events are missing or mixed")
            last_index = index
        if process is None or not isinstance(kind, Keyword):
            raise HistoryError(f"line {line}: an event needs :type and :process")
        if isinstance(process, bool) or not isinstance(process, int):
            continue  # The nemesis, or another helper of the harness.
        if kind == "invoke":
            if process in pending:
                raise HistoryError(
                    f"line {line}: process {process} has a call under way since line {pending[process][1]}"
                )
            pending[process] = (position, line, event)
            continue
        if kind not in ("ok", "fail", "info"):
            raise HistoryError(f"line {line}: :type is {kind!r}; it must be :invoke, :ok, :fail or :info")
        if process not in pending:
            raise HistoryError(f"line {line}: process {process} is told {kind!r} without having asked")
        begin, _, asked = pending.pop(process)
        if asked.get("f") != event.get("f"):
            raise HistoryError(
                f"line {line}: process {process} is told of {event.get('f')!r}, it asked {asked.get('f')!r}"
            )
        found.append(_call(asked, event, Kind(kind), span=(begin, position), line=line))
    for begin, line, asked in pending.values():
        found.append(_call(asked, asked, Kind.INFO, span=(begin, NEVER), line=line))
    found.sort(key=lambda call: call.begin)
    return [replace(call, number=number) for number, call in enumerate(found)]


def _call(asked: dict[str, Value], told: dict[str, Value], kind: Kind, *, span: tuple[int, int], line: int) -> Call:
    if not isinstance(asked.get("f"), Keyword):
        raise HistoryError(f"line {line}: an event of a client needs :f, as :read")
    value = asked.get("value")
    return Call(
        number=0,
        process=asked["process"],
        f=str(asked["f"]),
        kind=kind,
        asked=value,
        told=value if kind is Kind.INFO else told.get("value"),
        begin=span[0],
        end=NEVER if kind is Kind.INFO else span[1],
        line=line,
    )
