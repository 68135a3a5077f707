"""Traces: arrivals that were seen somewhere, read from a file and played as they are.

A trace is CSV with a header. `time_s` (seconds from the start, ascending) and `op` are needed; `phase`, `user`,
`match`, `selection`, `side`, `odds` and `amount_minor` may be there. `user` is added to `--first-wallet`, so with 0 the
ids are those of the file; a `match` that is a UUID is used as it is, any other name stands for one of the run's own.
"""

import csv
import zlib
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from load.schedule import ALL_OPERATIONS, Schedule, match_ids
from reference.commands import DEFAULT_OUTCOMES, MAX_AMOUNT_MINOR, MAX_ODDS, MAX_USER_ID, MIN_ODDS

NEEDED: Final = ("time_s", "op")
DEFAULTS: Final = {
    "phase": "trace",
    "user": "0",
    "match": "",
    "selection": DEFAULT_OUTCOMES[0],
    "side": "BACK",
    "odds": "200",
    "amount_minor": "100",
}
SIDES: Final = ("BACK", "LAY")
MAX_PHASES: Final = 100

_Row = tuple[float, int, int, int, int, int, int, int, int]
"""Time, phase, operation, user, match, selection, side, odds, amount."""


class TraceError(ValueError):
    """A trace that cannot be played; the message names the file and the line."""


def read_trace(path: Path, world: str, *, time_factor: float = 1.0) -> tuple[Schedule, list[str]]:
    """Return the arrivals of a trace, its times multiplied, and the ids of the matches they name.

    Raises TraceError, or OSError.
    """
    phases: dict[str, int] = {}
    matches: dict[str, int] = {}
    rows: list[_Row] = []
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        names = lines.fieldnames or []
        wrong = [name for name in names if name not in DEFAULTS and name not in NEEDED]
        lacking = [name for name in NEEDED if name not in names]
        if wrong or lacking:
            raise TraceError(f"{path}: unknown columns {wrong}, missing columns {lacking}")
        for line in lines:
            try:
                row = _row(DEFAULTS | {name: text for name, text in line.items() if text}, phases, matches)
            except (ValueError, TypeError) as error:
                raise TraceError(f"{path}, line {lines.line_num}: {error}") from error
            if row[0] < (rows[-1][0] if rows else 0.0):
                raise TraceError(f"{path}, line {lines.line_num}: times ascend from zero")
            rows.append(row)
    if not rows or len(phases) > MAX_PHASES:
        raise TraceError(f"{path}: no arrival, or more than {MAX_PHASES} phases")
    own = match_ids(world, len(matches))
    ids = [name if _is_uuid(name) else own[place] for place, name in enumerate(matches)]
    t, phase, op, user, match, selection, side, odds, amount = (np.array(column) for column in zip(*rows, strict=True))
    number = np.arange(len(rows), dtype=np.int64)
    schedule = Schedule(
        phases=tuple(phases),
        number=number,
        t=t * time_factor,
        phase=phase.astype(np.int8),
        op=op.astype(np.int8),
        wallet=user.astype(np.int64),
        match=match.astype(np.int32),
        selection=selection.astype(np.int8),
        side=side.astype(np.int8),
        odds=odds.astype(np.int32),
        amount=amount.astype(np.int64),
        # What only the run knows (which API process, which bet to cancel) follows from the place in the trace.
        target=np.array([zlib.crc32(b"%d" % place) >> 1 for place in range(len(rows))], dtype=np.int32),
    )
    return schedule, ids


def spans_of(schedule: Schedule) -> list[tuple[str, float, float]]:
    """Return (phase, start_s, end_s) of the phases of a trace: from the first to the last arrival of each."""
    spans = []
    for number, phase in enumerate(schedule.phases):
        times = schedule.t[schedule.phase == number]
        spans.append((phase, float(times[0]), float(times[-1])))
    return spans


def _row(line: dict[str, str], phases: dict[str, int], matches: dict[str, int]) -> _Row:
    """Return the values of a line; phases and matches are numbered as they come. Raises ValueError."""
    amount, odds, user, time_s = int(line["amount_minor"]), int(line["odds"]), int(line["user"]), float(line["time_s"])
    if not (0 <= user <= MAX_USER_ID and 0 < amount <= MAX_AMOUNT_MINOR and MIN_ODDS <= odds <= MAX_ODDS):
        raise ValueError("user, amount_minor or odds are outside of what the service takes")
    if not np.isfinite(time_s):
        raise ValueError("time_s is not a number")
    return (
        time_s,
        phases.setdefault(line["phase"], len(phases)),
        ALL_OPERATIONS.index(line["op"]),
        user,
        matches.setdefault(line["match"], len(matches)),
        DEFAULT_OUTCOMES.index(line["selection"]),
        SIDES.index(line["side"]),
        odds,
        amount,
    )


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text.lower()
    except ValueError:
        return False
