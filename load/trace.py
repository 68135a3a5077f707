"""Reads a trace, the recorded arrivals of a real day, from CSV or Parquet, in bounded memory and row by row.

    time,user,operation,amount,match,selection,side,odds,stake,key,bet
    0.000,17,deposit,5000,,,,,,d-1,
    0.004,17,bet,,final,HOME,BACK,250,1000,b-1,
    0.009,17,cancel,,,,,,,c-1,b-1

`read_trace` goes through the whole file once before anything is replayed. A bad row is named by its line and its
reason, and never left out silently: the file is refused, or, with `on_bad="report"`, replayed without the rows that
`Trace.problems` lists. `Trace.batches` then reads it a second time and gives the arrivals.

Units: times in the file are seconds (any origin) or ISO 8601 moments, times given are seconds since the first row;
amounts and stakes are minor units, odds hundredths. A line is that of the text file, the header being line 1; in
Parquet it is the row, the first being 1.
"""

import csv
import math
import random
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TextIO, TypeVar

import msgspec

from reference.commands import DEFAULT_OUTCOMES, MAX_AMOUNT_MINOR, MAX_KEY_LENGTH, MAX_ODDS, MAX_USER_ID, MIN_ODDS, Side

BATCH_ROWS: Final = 4_096
"""Arrivals of one batch."""
SLICE_ROWS: Final = 50_000
"""Rows of a Parquet file that are decoded at a time."""
SHOW_ROWS: Final = 4_000
"""Rows between two calls of `show`."""
SHOWN_MAX: Final = 20
"""Bad rows that are kept with their reasons; of the others the line numbers are kept."""
LINE_MAX: Final = 65_536
"""Characters of one line. A longer one is a bad row, and is not read into memory."""
COLUMNS_MAX: Final = 200
NAME_MAX: Final = 64
"""Characters of the name of a match or a selection."""
TIME_MAX: Final = 1e11
"""Seconds: beyond the year 5000, so it is milliseconds or nonsense."""
NUMBER_MAX: Final = 40
"""Characters of a number; what is longer is not read as one."""
SHOWN_TEXT_MAX: Final = 40

COLUMNS: Final = (
    "time", "user", "operation", "amount", "match", "selection", "side", "odds", "stake", "key", "bet"
)  # fmt: skip
ALIASES: Final = {
    "op": "operation",
    "user_id": "user",
    "amount_minor": "amount",
    "stake_minor": "stake",
    "match_id": "match",
    "outcome": "selection",
    "idempotency_key": "key",
}
"""Other names of columns, as the service and the history of a run call them."""
ALWAYS: Final = ("time", "operation")
"""Columns that every trace has; the others are needed by the operations that use them."""
NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "deposit": ("user", "amount"),
    "withdraw": ("user", "amount"),
    "bet": ("user", "match", "selection", "side", "odds", "stake"),
    "cancel": ("user", "bet"),
    "balance": ("user",),
    "entries": ("user",),
    "create_match": ("match",),
    "close_match": ("match",),
    "settle_match": ("match", "selection"),
    "void_match": ("match",),
}
"""The operations there are, and the fields that each must have. `bet` of a cancel is the key of the bet it cancels;
`selection` of a settle_match is the result."""
MAY_HAVE: Final = frozenset({"time", "operation", "user", "key"})
"""Fields that any operation may have. Everything else that it does not need is refused: it would be ignored."""

OnBad = Literal["refuse", "report"]


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One arrival of a trace. Fields that its operation does not have are None."""

    at_s: float
    """Seconds since the first row, divided by the speed."""
    line: int
    operation: str
    """One of `NEEDS`."""
    user: int | None = None
    amount_minor: int | None = None
    match: str | None = None
    selection: str | None = None
    side: str | None = None
    """BACK or LAY."""
    odds: int | None = None
    stake_minor: int | None = None
    key: str | None = None
    """The idempotency key; None: whoever replays it makes one. The same key twice is a retry, and allowed."""
    bet: str | None = None
    """Of a cancel: the key of the bet."""


class Bad(NamedTuple):
    """A row that cannot be replayed."""

    line: int
    reason: str


@dataclass
class Problems:
    """Every bad row of a trace: all line numbers, and the reasons of the first `SHOWN_MAX`."""

    lines: "array[int]" = field(default_factory=lambda: array("q"))
    first: list[Bad] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many rows are bad."""
        return len(self.lines)

    def add(self, line: int, reason: str) -> None:
        """Note one bad row."""
        self.lines.append(line)
        if len(self.first) < SHOWN_MAX:
            self.first.append(Bad(line, reason))

    def text(self) -> str:
        """Return the total and the first of them, one a line."""
        shown = "\n".join(f"  line {bad.line}: {bad.reason}" for bad in self.first)
        more = self.total - len(self.first)
        return shown + (f"\n  … and {more} more" if more else "")


class TraceError(Exception):
    """The file is not a trace that can be replayed; the message says why and what to do."""


class BadRows(TraceError):
    """Rows of the file cannot be replayed; the message lists the first of them."""

    def __init__(self, path: Path, problems: Problems) -> None:
        rows = "1 row" if problems.total == 1 else f"{problems.total} rows"
        super().__init__(
            f"{path}: {rows} cannot be replayed:\n{problems.text()}\n"
            'repair them, or leave them out knowingly with on_bad="report"'
        )
        self.problems = problems


@dataclass(frozen=True)
class Trace:
    """A trace that was read through once: what is in it, and what is wrong with it."""

    path: Path
    speed: float
    rows: int
    """Rows that will be given."""
    span_s: float
    """Seconds from the first arrival to the last, divided by the speed."""
    operations: Mapping[str, int]
    """Rows of each operation."""
    ignored: Sequence[str]
    """Columns of the file that mean nothing here."""
    problems: Problems
    """The rows that are left out; none unless `on_bad="report"` was asked for."""
    stamp: tuple[int, int]
    """Size and time of change of the file when it was read."""

    def batches(self, rows: int = BATCH_ROWS) -> Iterator[list[Arrival]]:
        """Yield the arrivals in their order, at most `rows` at a time.

        Raises TraceError if the file is not the one that was read any more.
        """
        if _stamp(self.path) != self.stamp:
            raise TraceError(f"{self.path} has changed since it was checked: read it again")
        batch: list[Arrival] = []
        for arrival in _arrivals(self.path, self.speed, Problems(), []):
            batch.append(arrival)
            if len(batch) == rows:
                yield batch
                batch = []
        if batch:
            yield batch


def read_trace(
    path: Path, *, on_bad: OnBad = "refuse", speed: float = 1.0, show: Callable[[str], None] | None = None
) -> Trace:
    """Check a CSV (`.csv`) or Parquet (`.parquet`) file and return it as a trace.

    `speed` 10 plays it in a tenth of its time. `show` is told how far it is, every 4,000 rows.

    Raises BadRows for rows that cannot be replayed, unless `on_bad` is "report", and TraceError for a file that is no
    trace at all: missing columns, nothing in it, not UTF-8, not readable; ValueError for an impossible speed.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(f"the speed must be a number above 0, not {speed}")
    stamp = _stamp(path)
    problems, ignored = Problems(), list[str]()
    operations: dict[str, int] = {}
    last_s, rows = 0.0, 0
    for arrival in _arrivals(path, speed, problems, ignored):
        rows += 1
        last_s = arrival.at_s
        operations[arrival.operation] = operations.get(arrival.operation, 0) + 1
        if show is not None and rows % SHOW_ROWS == 0:
            show(f"{rows:,} rows, {problems.total} bad")
    if problems.total and (on_bad == "refuse" or not rows):
        raise BadRows(path, problems)
    if not rows:
        raise TraceError(f"{path} has no rows: there is nothing to replay")
    return Trace(path, speed, rows, last_s, operations, ignored, problems, stamp)


# -- rows ------------------------------------------------------------------------------------------------


class _BadField(Exception):
    """A field is not what it must be."""


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
        if not path.is_file():
            raise TraceError(f"{path} is not a file: name a .csv or .parquet file")
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _arrivals(path: Path, speed: float, problems: Problems, ignored: list[str]) -> Iterator[Arrival]:
    """Yield the good rows of the file and note the bad ones."""
    suffix = path.suffix.lower()
    places: dict[str, int] = {}
    if suffix == ".csv":
        rows: Iterator[tuple[int, Sequence[Any]]] = _rows_of_csv(path, problems, ignored, places)
    elif suffix in (".parquet", ".pq"):
        rows = _rows_of_parquet(path, ignored, places)
    else:
        raise TraceError(f"{path}: a trace is a .csv or a .parquet file, by its name")
    plans: dict[str, _Plan] = {}
    first: float | None = None
    before, before_line = -math.inf, 0
    for line, row in rows:
        try:
            time = _time(row[places["time"]], before, before_line)
            operation = row[places["operation"]]
            plan = plans.get(operation) if isinstance(operation, str) else None
            if plan is None:
                plan = plans[operation] = _Plan(operation, places)
            fields = plan.read(row)
        except _BadField as error:
            problems.add(line, str(error))
            continue
        first = time if first is None else first
        before, before_line = time, line
        yield Arrival((time - first) / speed, line, operation, **fields)


class _Plan:
    """How the rows of one operation are read, worked out once: which columns it reads, and which must be empty."""

    def __init__(self, operation: Any, places: Mapping[str, int]) -> None:
        """`places` says where in a row each column is. Raises _BadField for an operation there is not."""
        if operation in (None, ""):
            raise _BadField("operation is missing")
        needs = NEEDS.get(operation) if isinstance(operation, str) else None
        if needs is None:
            raise _BadField(f"unknown operation {_shown(operation)}; there are {', '.join(NEEDS)}")
        self._operation = operation
        self._absent = [name for name in needs if name not in places]
        self._reads = [
            (place, name, _FIELD.get(name, name), _READ[name], name in needs)
            for name, place in places.items()
            if name in _READ and (name in needs or name in MAY_HAVE)
        ]
        self._empty = [(place, name) for name, place in places.items() if name not in needs and name not in MAY_HAVE]

    def read(self, row: Sequence[Any]) -> dict[str, Any]:
        """Return the fields of an arrival. Raises _BadField."""
        fields: dict[str, Any] = {}
        for place, name, field_name, read, needed in self._reads:
            value = row[place]
            if value is not None and value != "":
                fields[field_name] = read(value)
            elif needed:
                raise _BadField(f"{self._operation} needs {name}")
        for place, name in self._empty:
            value = row[place]
            if value is not None and value != "":
                raise _BadField(f"{self._operation} has no {name}, but the row gives {_shown(value)}")
        if self._absent:
            raise _BadField(f"{self._operation} needs {', '.join(self._absent)}, which the file has no column for")
        return fields


def _time(value: Any, before: float, before_line: int) -> float:
    """Return seconds; of a moment, those since 1970. `before` is the time of the last good row."""
    if value is None or value == "":
        raise _BadField("time is missing")
    if isinstance(value, datetime):
        seconds = value.timestamp()
    elif isinstance(value, str):
        try:
            seconds = float(value) if len(value) <= NUMBER_MAX and "_" not in value else math.nan
        except ValueError:
            seconds = _moment(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise _BadField(f"time {_shown(value)} is not a number of seconds")
    if not math.isfinite(seconds):
        raise _BadField(f"time {_shown(value)} is not a finite number of seconds")
    if seconds < 0:
        raise _BadField(f"time {_shown(value)} is negative")
    if seconds > TIME_MAX:
        raise _BadField(f"time {_shown(value)} is too large: it must be in seconds, at most {TIME_MAX:g}")
    if seconds < before:
        raise _BadField(f"time {_shown(value)} is before that of line {before_line}: rows must be in order of time")
    return seconds


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise _BadField(f"time {_shown(text)} is neither a number of seconds nor an ISO 8601 moment") from None
    if moment.tzinfo is None:
        raise _BadField(f"time {_shown(text)} does not say its UTC offset, as 2026-01-01T12:00:00+00:00 does")
    return moment.timestamp()


_WHOLE: Final = re.compile(r"[+-]?[0-9]+")
_DIGITS_SURE: Final = 18
"""A number of so many digits needs no second look at its form or its length."""


def _whole(name: str, least: int, most: int) -> Callable[[Any], int]:
    """Return what reads a whole number of a column."""

    def read(value: Any) -> int:
        if isinstance(value, str):
            plain = len(value) <= _DIGITS_SURE and value.isdigit() and value.isascii()
            if not plain and not _WHOLE.fullmatch(value):
                raise _BadField(f"{name} {_shown(value)} is not a whole number")
            # Python refuses to read thousands of digits; so do we, as what it is: too large.
            number = int(value) if len(value) <= NUMBER_MAX else most + 1
        elif isinstance(value, float) and value.is_integer():
            number = int(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            number = value
        else:
            raise _BadField(f"{name} {_shown(value)} is not a whole number")
        if not least <= number <= most:
            raise _BadField(f"{name} {_shown(value)} is not from {least} to {most}")
        return number

    return read


def _word(name: str, most: int) -> Callable[[Any], str]:
    """Return what reads a text of a column."""

    def read(value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            # Ids of matches are numbers in many files, and Parquet keeps them as such.
            value = str(value)
        if not isinstance(value, str):
            raise _BadField(f"{name} {_shown(value)} is not a text")
        if len(value) > most:
            raise _BadField(f"{name} {_shown(value)} has {len(value)} characters; {most} are allowed")
        if not value.isprintable():
            raise _BadField(f"{name} {_shown(value)} holds a character that cannot be printed")
        return value

    return read


def _side(value: Any) -> str:
    side = str(value).upper()
    if side not in Side.__members__:
        raise _BadField(f"side {_shown(value)} is neither BACK nor LAY")
    return side


_READ: Final[dict[str, Callable[[Any], Any]]] = {
    "user": _whole("user", 1, MAX_USER_ID),
    "amount": _whole("amount", 1, MAX_AMOUNT_MINOR),
    "match": _word("match", NAME_MAX),
    "selection": _word("selection", NAME_MAX),
    "side": _side,
    "odds": _whole("odds", MIN_ODDS, MAX_ODDS),
    "stake": _whole("stake", 1, MAX_AMOUNT_MINOR),
    "key": _word("key", MAX_KEY_LENGTH),
    "bet": _word("bet", MAX_KEY_LENGTH),
}
_FIELD: Final = {"amount": "amount_minor", "stake": "stake_minor"}


def _shown(value: Any) -> str:
    """Return a value for a message: quoted, printable and short."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= SHOWN_TEXT_MAX else f"{text[: SHOWN_TEXT_MAX - 1]}…"


def _columns(names: Sequence[str], path: Path, ignored: list[str], places: dict[str, int]) -> None:
    """Note where in a row each column is, and the names that mean nothing here. Raises TraceError."""
    meant: list[str | None] = []
    for name in names:
        plain = name.strip().lower()
        plain = ALIASES.get(plain, plain)
        if plain in COLUMNS and plain in meant:
            raise TraceError(f"{path} has two columns for {plain}: remove one")
        meant.append(plain if plain in COLUMNS else None)
    missing = [name for name in ALWAYS if name not in meant]
    if missing:
        seen = ", ".join(_shown(name) for name in names[:12])
        raise TraceError(
            f"{path} has no column {' and no column '.join(missing)}; its first line must name the columns, "
            f"of {', '.join(COLUMNS)}; it begins with {seen}"
        )
    ignored[:] = [name for name, known in zip(names, meant, strict=True) if known is None]
    places.update({name: place for place, name in enumerate(meant) if name is not None})


# -- CSV -------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a text file, none of them longer than `LINE_MAX`: a longer one comes out empty and is noted."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.number = 0
        self.too_long = 0
        """The last line that was too long."""

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(LINE_MAX):
            self.number += 1
            if len(line) < LINE_MAX or line[-1] in "\r\n":
                yield line
                continue
            self.too_long = self.number
            while (rest := self._file.readline(LINE_MAX)) and rest[-1] not in "\r\n":
                pass
            yield "\n"


def _rows_of_csv(
    path: Path, problems: Problems, ignored: list[str], places: dict[str, int]
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, row) of a CSV file; what cannot be split into the header's columns is noted as bad."""
    with path.open("rb") as raw:
        head = raw.read(4)
    if not head:
        raise TraceError(f"{path} is empty: its first line must name the columns, of {', '.join(COLUMNS)}")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise TraceError(f"{path} is UTF-16: save it as UTF-8")
    if head == b"PAR1":
        raise TraceError(f"{path} is a Parquet file: name it .parquet")
    # What is no UTF-8 becomes a mark in the text, so that the row can be named instead of the whole file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        names = _header(path, reader)
        _columns(names, path, ignored, places)
        blank: tuple[int, int] | None = None
        while True:
            begins = lines.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                problems.add(begins, _quoting(str(error), begins, lines.number))
                continue
            if cells is None:
                return
            if begins <= lines.too_long <= lines.number:
                problems.add(begins, f"line {lines.too_long} is longer than {LINE_MAX} characters")
            elif not cells:
                # At the end of a file a blank line is only how the file ends; between rows something is missing.
                blank = (begins if blank is None else blank[0], begins)
            else:
                if blank is not None:
                    where = "blank" if blank[0] == blank[1] else f"blank, and so are those up to line {blank[1]}"
                    problems.add(blank[0], f"the line is {where}")
                    blank = None
                row = _row(cells, len(names), begins, problems)
                if row is not None:
                    yield begins, row


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise TraceError(f"{path} is not CSV: its first line cannot be read ({error})") from error
    if not names:
        raise TraceError(f"{path}: the first line is blank; it must name the columns, of {', '.join(COLUMNS)}")
    if any(map(_is_foreign, names)):
        raise TraceError(f"{path} is not UTF-8: its first line holds other bytes; save it as UTF-8")
    if len(names) > COLUMNS_MAX:
        raise TraceError(f"{path} has {len(names)} columns; {COLUMNS_MAX} are allowed")
    return names


def _row(cells: list[str], columns: int, line: int, problems: Problems) -> list[str] | None:
    if len(cells) != columns:
        problems.add(line, f"the row has {len(cells)} fields, the header {columns}")
        return None
    if not "".join(cells).isascii():
        foreign = next((cell for cell in cells if _is_foreign(cell)), None)
        if foreign is not None:
            problems.add(line, f"{_shown(foreign)} is not UTF-8")
            return None
    return cells


def _is_foreign(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text)


def _quoting(said: str, begins: int, ends: int) -> str:
    where = "" if begins >= ends else f" (the row goes on to line {ends})"
    if "unexpected end of data" in said or "field limit" in said:
        return f'a quotation mark is opened and not closed{where}: write " inside a field as ""'
    return f"the fields cannot be told apart: {said}{where}"


# -- Parquet ---------------------------------------------------------------------------------------------


def _rows_of_parquet(path: Path, ignored: list[str], places: dict[str, int]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield (row, values) of a Parquet file, a chunk at a time."""
    import polars as pl  # noqa: PLC0415 - a generator that reads no Parquet is not to start its threads

    if path.stat().st_size == 0:
        raise TraceError(f"{path} is empty: it is not a Parquet file")
    try:
        frame = pl.scan_parquet(path)
        names = frame.collect_schema().names()
        _columns(names, path, ignored, places)
        wanted = [names[place] for place in places.values()]
        for place, name in enumerate(list(places)):
            places[name] = place
        rows = frame.select(pl.len()).collect().item()
        chosen = frame.select(wanted)
        for first in range(0, rows, SLICE_ROWS):
            # One slice after another: Polars' own batches hold 100 MB of row groups that it reads ahead.
            yield from enumerate(chosen.slice(first, SLICE_ROWS).collect().iter_rows(), first + 1)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise TraceError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- synthetic traces ------------------------------------------------------------------------------------

_Item = TypeVar("_Item")


def write_synthetic(path: Path, *, rows: int, seed: int, rate: float = 1_000.0, users: int = 2_000) -> Path:
    """Write a trace of `rows` rows to a CSV or Parquet file, always the same for the same arguments; return `path`.

    Matches are created first and wallets filled while the bets go on; arrivals are a Poisson process of `rate` a
    second. Memory does not grow with `rows`. Raises ValueError for impossible arguments and OSError.
    """
    if rows < 1 or users < 1 or not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rows, users and rate must be above 0, not {rows}, {users} and {rate}")
    if path.suffix.lower() == ".csv":
        _write_csv(path, rows, seed, rate, users)
        return path
    if path.suffix.lower() not in (".parquet", ".pq"):
        raise ValueError(f"a trace is a .csv or a .parquet file, not {path.name}")
    import polars as pl  # noqa: PLC0415 - a generator that reads no Parquet is not to start its threads

    text = path.with_name(path.name + ".csv")
    try:
        _write_csv(text, rows, seed, rate, users)
        kinds = {"time": pl.Float64} | dict.fromkeys(("user", "amount", "odds", "stake"), pl.Int64)
        schema = {name: kinds.get(name, pl.String) for name in COLUMNS}
        pl.scan_csv(text, schema=schema).sink_parquet(path, row_group_size=50_000)
    finally:
        text.unlink(missing_ok=True)
    return path


def _write_csv(path: Path, rows: int, seed: int, rate: float, users: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - a workload, no secret
    matches = [f"match-{number}" for number in range(8)]
    odds = range(MIN_ODDS + 9, 600)
    at_s = 0.0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number in range(rows):
            time, user, key = f"{at_s:.6f}", draw.randint(1, users), f"k{number}"
            kind = draw.random()
            if number < len(matches):
                fields: tuple[object, ...] = ("", "create_match", "", matches[number], "", "", "", "", key, "")
            elif kind < 0.70:
                selection, side = _one(draw, DEFAULT_OUTCOMES), _one(draw, tuple(Side)).value
                stake = draw.randint(100, 10_000)
                fields = (
                    user, "bet", "", _one(draw, matches), selection, side, _one(draw, odds), stake, key, ""
                )  # fmt: skip
            elif kind < 0.80:
                fields = (user, "deposit", draw.randint(1_000, 100_000), "", "", "", "", "", key, "")
            else:
                fields = (user, "balance", "", "", "", "", "", "", "", "")
            writer.writerow((time, *fields))
            at_s += draw.expovariate(rate)


def _one(draw: random.Random, items: Sequence[_Item]) -> _Item:
    return items[draw.randrange(len(items))]
