"""Judges a run folder of any size: a small one whole, a large one in slices that fit in memory, to the same result."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

import polars as pl

from invariants import sometimes
from invariants.anomalies import CHECKS, Check, Found
from invariants.anomalies.common import NOTHING, Part, Scope, Summed
from invariants.anomalies.event_screen import suspicious
from invariants.anomalies.parts import parts_of
from invariants.judges import COLUMNS, JUDGES
from invariants.run import Run, load_run
from invariants.slices import CannotSlice, Slices, rows_recorded, sliced
from invariants.verdict import Failure, Judged, Judgement, ask_others, attempted, conclude, judge, unresolved_keys

_log = logging.getLogger(__name__)

T = TypeVar("T")

SLICED_FROM_ROWS: Final = 400_000
"""Runs with fewer history records are judged whole."""
WORKERS: Final = 2
"""Slices judged at a time: while one waits for Python the other computes."""


_REPEATED: Final = ("repeated", 0)
"""Where `_Findings.sums` keeps the records that were sent again."""


@dataclass
class Costs:
    """Seconds that each step took, by name; with several workers they overlap."""

    seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, name: str, fold: Callable[[], T]) -> T:
        """Return what the fold returns, and add its time."""
        began = time.perf_counter()
        try:
            return fold()
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + took


@dataclass
class _Findings:
    """What the slices said so far, by what they were asked."""

    found: dict[str, Found] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a step → why it failed in the first slice in which it did."""
    sums: dict[tuple[str, int], list[pl.DataFrame]] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)
    unresolved: tuple[int, int] = (0, 0)
    duplicates: int = 0
    too_old: set[str] = field(default_factory=set)
    """Of `failed`: what failed because the run is older than what it needs."""

    def fail(self, name: str, failure: Failure) -> None:
        """Note that a step could not look; that the run is too old excuses only what failed for nothing else."""
        if name not in self.failed:
            self.failed[name] = failure.why
            if failure.too_old:
                self.too_old.add(name)
        elif name in self.too_old and not failure.too_old:
            self.failed[name] = failure.why
            self.too_old.discard(name)

    def add(self, other: "_Findings") -> None:
        for code, findings in other.found.items():
            self.found[code] = self.found.get(code, NOTHING) + findings
        for name, why in other.failed.items():
            self.fail(name, Failure(why, too_old=name in other.too_old))
        for place, frames in other.sums.items():
            self.sums.setdefault(place, []).extend(frames)
        for name, count in other.shown.items():
            self.shown[name] = self.shown.get(name, 0) + count
        self.unresolved = (self.unresolved[0] + other.unresolved[0], self.unresolved[1] + other.unresolved[1])
        self.duplicates += other.duplicates


def judge_folder(
    folder: Path,
    slices: int | None = None,
    checks: dict[str, Check] | None = None,
    costs: Costs | None = None,
    judges: Sequence[str] | None = None,
) -> Judgement:
    """Judge the run in `folder`; `slices` cuts it into so many whatever its size.

    `checks` and `judges` are those of `verdict.judge`. A check without parts (`anomalies.parts`) cannot be done in a
    run that is cut, which is then INVALID.

    Raises what `load_run` raises where there is nothing to judge, OSError where the slices cannot be written, and for a
    run that must be cut also MissingEvidence and polars errors where a table cannot be read.
    """
    if judges is None:
        judges = list(JUDGES) if checks is None else []
    checks = CHECKS if checks is None else checks
    costs = costs or Costs()
    if slices is None and rows_recorded(folder) < SLICED_FROM_ROWS:
        return _judge_whole(folder, checks, costs, judges)
    try:
        place, cut = costs.of("cut", lambda: sliced(folder, slices))
    except CannotSlice as error:
        _log.warning("the run is judged whole, which takes the memory for it: %s", error)
        return _judge_whole(folder, checks, costs, judges)
    with place:
        return _judge_slices(cut, checks, costs, judges)


def _judge_whole(folder: Path, checks: dict[str, Check], costs: Costs, judges: Sequence[str]) -> Judgement:
    def timed(check: Check) -> Check:
        @functools.wraps(check.find)
        def find(run: Run) -> Found:
            return costs.of(check.code, lambda: check.find(run))

        return replace(check, find=find)

    run = costs.of("load", lambda: load_run(folder))
    return judge(run, {code: timed(check) for code, check in checks.items()}, judges)


def _judge_slices(cut: Slices, checks: dict[str, Check], costs: Costs, judges: Sequence[str]) -> Judgement:
    started = time.monotonic()
    findings = _Findings()
    for code, check in checks.items():
        if not parts_of(check):
            findings.failed[code] = "the run is too large to be seen whole, and nobody said how to check this in slices"
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="judge") as workers:
        for part in workers.map(lambda number: _of_wallets(cut, number, checks, costs), range(cut.count)):
            findings.add(part)
        for part in workers.map(lambda number: _of_matches(cut, number, checks, costs), range(cut.count)):
            findings.add(part)
    if repeated := findings.sums.get(_REPEATED):
        cut.whole.scratch[sometimes.REPEATED] = pl.concat(repeated)
    _count(cut.whole, sometimes.OF_THE_RUN, findings, costs)
    shown = _outcome("sometimes", {name: findings.shown.get(name, 0) for name in sometimes.COUNTERS}, findings)
    if not isinstance(shown, Failure):
        cut.whole.shown = shown
    _events(cut, checks, findings, costs)
    _whole(cut.whole, checks, findings, costs)
    failed = {code: findings.failed[code] for code in checks if code in findings.failed}
    undecided = {code: why for code, why in failed.items() if code in findings.too_old}
    found = {code: findings.found.get(code, NOTHING) for code in checks if code not in failed}
    for code in found:
        if lacking := [name for name in checks[code].older if name in cut.whole.lacking]:
            undecided[code] = f"in part: the run is older than {', '.join(lacking)}"
    subjects = {code: findings_of.subjects for code, findings_of in found.items()}
    columns = Judged(COLUMNS, sorted(subjects), time.monotonic() - started)
    return conclude(
        checks=checks,
        counts={code: findings_of.count for code, findings_of in found.items()},
        unchecked={code: why for code, why in failed.items() if code not in findings.too_old},
        undecided=undecided,
        witnesses=[witness for findings_of in found.values() for witness in findings_of.witnesses],
        asked=costs.of("other judges", lambda: ask_others(cut.whole, judges, columns, subjects, None)),
        left_open=_outcome("unresolved", findings.unresolved, findings),
        shown=shown,
        duplicates=_outcome("duplicates", findings.duplicates, findings),
    )


def _outcome(name: str, value: T, findings: _Findings) -> T | Failure:
    return Failure(findings.failed[name]) if name in findings.failed else value


def _of_wallets(cut: Slices, number: int, checks: dict[str, Check], costs: Costs) -> _Findings:
    findings = _Findings()
    run = _slice(lambda: cut.wallet_slice(number), checks, Scope.WALLET, findings, costs)
    if run is None:
        return findings
    _fold(run, checks, Scope.WALLET, findings, costs)
    _count(run, frozenset(sometimes.COUNTERS) - sometimes.OF_THE_RUN - sometimes.OF_MATCHES, findings, costs)
    repeated = costs.of("duplicates", lambda: attempted(sometimes.repeated_records, run))
    if isinstance(repeated, Failure):
        findings.failed["sometimes"] = repeated.why
    else:
        findings.sums[_REPEATED] = [repeated]
    unresolved = costs.of("unresolved", lambda: attempted(unresolved_keys, run))
    duplicates = costs.of("duplicates", lambda: attempted(sometimes.raw_duplicates, run))
    if isinstance(unresolved, Failure):
        findings.failed["unresolved"] = unresolved.why
    else:
        findings.unresolved = unresolved
    if isinstance(duplicates, Failure):
        findings.failed["duplicates"] = duplicates.why
    else:
        findings.duplicates = duplicates
    _screen(lambda: cut.screen.take_wallets(run), findings, costs)
    return findings


def _of_matches(cut: Slices, number: int, checks: dict[str, Check], costs: Costs) -> _Findings:
    findings = _Findings()
    run = _slice(lambda: cut.match_slice(number), checks, Scope.MATCH, findings, costs)
    if run is None:
        return findings
    _fold(run, checks, Scope.MATCH, findings, costs)
    _count(run, sometimes.OF_MATCHES, findings, costs)
    _screen(lambda: cut.screen.take_matches(run), findings, costs)
    return findings


def _slice(
    read: Callable[[], Run], checks: dict[str, Check], scope: Scope, findings: _Findings, costs: Costs
) -> Run | None:
    """Return a slice; without it nothing that needed it was checked."""
    result = costs.of("read slices", lambda: attempted(lambda _: read(), None))  # type: ignore[arg-type]
    if not isinstance(result, Failure):
        return result
    findings.failed |= {check.code: result.why for check in checks.values() if _needs(check, scope)}
    findings.failed |= dict.fromkeys(("sometimes", "unresolved", "duplicates", "screen"), result.why)
    return None


def _needs(check: Check, scope: Scope) -> bool:
    return any(part.scope is scope for part in parts_of(check))


def _fold(run: Run, checks: dict[str, Check], scope: Scope, findings: _Findings, costs: Costs) -> None:
    """Do every part of every check that sees enough in this slice."""
    for code, check in checks.items():
        for place, part in enumerate(parts_of(check)):
            if part.scope is not scope:
                continue
            fold = part.find if isinstance(part, Part) else part.summary
            result = costs.of(code, lambda fold=fold: attempted(fold, run))  # type: ignore[misc]
            if isinstance(result, Failure):
                findings.fail(code, result)
            elif isinstance(result, Found):
                findings.found[code] = findings.found.get(code, NOTHING) + result
            else:
                findings.sums[code, place] = [result]


def _count(run: Run, names: frozenset[str], findings: _Findings, costs: Costs) -> None:
    for name in names:
        counted = costs.of("sometimes", lambda name=name: attempted(sometimes.COUNTERS[name], run))  # type: ignore[misc]
        if isinstance(counted, Failure):
            findings.failed.setdefault("sometimes", counted.why)
        else:
            findings.shown[name] = findings.shown.get(name, 0) + counted


def _screen(look: Callable[[], None], findings: _Findings, costs: Costs) -> None:
    result = costs.of("event screen", lambda: attempted(lambda _: look(), None))  # type: ignore[arg-type]
    if isinstance(result, Failure):
        findings.failed.setdefault("screen", result.why)


def _events(cut: Slices, checks: dict[str, Check], findings: _Findings, costs: Costs) -> None:
    """Let the event checks read whatever the screen suspects."""
    if "screen" not in findings.failed:
        suspects = costs.of("event screen", lambda: attempted(lambda run: suspicious(run, cut.screen), cut.whole))
        if suspects is None:
            return
        if not isinstance(suspects, Failure):
            _fold(suspects, checks, Scope.EVENTS, findings, costs)
            return
        findings.failed["screen"] = suspects.why
    for check in checks.values():
        if _needs(check, Scope.EVENTS):
            findings.fail(check.code, Failure(findings.failed["screen"]))


def _whole(whole: Run, checks: dict[str, Check], findings: _Findings, costs: Costs) -> None:
    """Do what must see the whole run, and judge the sums."""
    _fold(whole, checks, Scope.WHOLE, findings, costs)
    for code, check in checks.items():
        for place, part in enumerate(parts_of(check)):
            if not isinstance(part, Summed) or code in findings.failed:
                continue
            sums = pl.concat(findings.sums[code, place])
            result = costs.of(code, lambda part=part, sums=sums: attempted(lambda run: part.find(run, sums), whole))  # type: ignore[misc]
            if isinstance(result, Failure):
                findings.fail(code, result)
            else:
                findings.found[code] = findings.found.get(code, NOTHING) + result
