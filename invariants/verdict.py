"""From evidence to one verdict: nothing unproven is green."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeVar

import polars as pl

from invariants import fates, sometimes
from invariants.anomalies import CHECKS, Check, Found, Witness
from invariants.fates import Resolution
from invariants.history import FINAL_RETRY
from invariants.run import Run
from invariants.snapshot import MissingEvidence

_log = logging.getLogger(__name__)

T = TypeVar("T")

DAMAGED_EVIDENCE: Final = ("V05", "V06")
"""Codes that say the evidence has holes: then what rests on absence proves nothing."""


class Verdict(IntEnum):
    """What became of a run; the value is the exit code."""

    PASS = 0
    SLA_MISSED = 10
    INVARIANT_VIOLATED = 20
    INVALID = 30
    ABORTED = 40
    RESIDUE = 50


_SEVERITY: Final = (
    Verdict.PASS,
    Verdict.SLA_MISSED,
    Verdict.RESIDUE,
    Verdict.INVALID,
    Verdict.ABORTED,
    Verdict.INVARIANT_VIOLATED,
)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict to report for a run that earned all of `verdicts`; PASS if there are none.

    From mild to severe: PASS, SLA_MISSED, RESIDUE, INVALID, ABORTED, INVARIANT_VIOLATED. This is not the
    order of the exit codes. A witnessed violation is a fact, and nothing that went wrong besides can take
    it back, so it is the worst. ABORTED is above INVALID because a run that was stopped is incomplete as a
    consequence, and the cause says more than the consequence. Residue leaves the proof intact but the
    machine dirty, which is worse than slow. Everything except PASS is red.
    """
    return max(verdicts, key=_SEVERITY.index, default=Verdict.PASS)


@dataclass(frozen=True)
class Judgement:
    """What the checks say of a run."""

    anomalies: dict[str, int]
    """Code → count, for every code that was checked."""
    unchecked: dict[str, str]
    """Code → why it could not be checked. Not empty: the run is INVALID."""
    witnesses: list[Witness]
    sometimes: dict[str, int]
    unresolved: int
    """Keys whose effect nobody can tell, at the end."""
    raw_duplicates: int
    """Kafka records that repeat an event id: expected of at-least-once delivery, only reported."""
    parts: list[Verdict] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why the run is not PASS, one sentence each."""

    @property
    def verdict(self) -> Verdict:
        """The verdict of the checks alone; the run's own is `worst` of this and its SLA, abort and residue."""
        return worst(self.parts)


def judge(run: Run, checks: dict[str, Check] | None = None) -> Judgement:
    """Run every check and the resolution of unknown keys. Never raises: what raises makes the run INVALID."""
    checks = CHECKS if checks is None else checks
    counts: dict[str, int] = {}
    unchecked: dict[str, str] = {}
    witnesses: list[Witness] = []
    for code, check in checks.items():
        result = attempted(check.find, run)
        if isinstance(result, Found):
            counts[code] = result.count
            witnesses += result.witnesses
        else:
            unchecked[code] = result.why
    return conclude(
        checks=checks,
        counts=counts,
        unchecked=unchecked,
        witnesses=witnesses,
        left_open=attempted(unresolved_keys, run),
        shown=attempted(sometimes.count, run),
        duplicates=attempted(sometimes.raw_duplicates, run),
    )


def conclude(
    *,
    checks: dict[str, Check],
    counts: dict[str, int],
    unchecked: dict[str, str],
    witnesses: list[Witness],
    left_open: "tuple[int, int] | Failure",
    shown: "dict[str, int] | Failure",
    duplicates: "int | Failure",
) -> Judgement:
    """Return the judgement that follows from what every check found, or why it could not look."""
    defects = [f"{code} could not be checked: {why}" for code, why in unchecked.items()]
    for outcome, what in ((left_open, "unknown keys"), (shown, "sometimes"), (duplicates, "raw duplicates")):
        if isinstance(outcome, Failure):
            defects.append(f"the {what} could not be counted: {outcome.why}")
    last, late = (0, 0) if isinstance(left_open, Failure) else left_open
    if last:
        defects.append(f"{last} keys are unresolved: their final state says neither yes nor no")
    if late:
        defects.append(f"{late} keys changed between the snapshots although nobody sent them again")

    parts, reasons = _violations(counts, checks)
    if defects:
        parts.append(Verdict.INVALID)
    return Judgement(
        anomalies=counts,
        unchecked=unchecked,
        witnesses=witnesses,
        sometimes={} if isinstance(shown, Failure) else shown,
        unresolved=last + late,
        raw_duplicates=0 if isinstance(duplicates, Failure) else duplicates,
        parts=parts or [Verdict.PASS],
        reasons=reasons + defects,
    )


def _violations(counts: dict[str, int], checks: dict[str, Check]) -> tuple[list[Verdict], list[str]]:
    parts: list[Verdict] = []
    reasons: list[str] = []
    damaged = any(counts.get(code, 0) for code in DAMAGED_EVIDENCE)
    for code, count in counts.items():
        if not count:
            continue
        times = f"{count} time{'s' if count > 1 else ''}"
        if code.startswith("V"):
            parts.append(Verdict.INVALID)
            reasons.append(f"{code} {checks[code].name}: {times}; the run proves nothing")
        elif damaged and checks[code].rests_on_absence:
            parts.append(Verdict.INVALID)
            reasons.append(
                f"{code} {checks[code].name}: {times}, but the evidence has holes, so this may be one of them"
            )
        else:
            parts.append(Verdict.INVARIANT_VIOLATED)
            reasons.append(f"{code} {checks[code].name}: {times}")
    return parts, reasons


@dataclass(frozen=True)
class Failure:
    """Why something could not be found out."""

    why: str


def attempted(fold: Callable[[Run], T], run: Run) -> T | Failure:
    """Return what a fold finds in a run, or why it could not. Never raises."""
    try:
        return fold(run)
    except MissingEvidence as error:
        return Failure(str(error))
    except Exception as error:  # noqa: BLE001 - whatever a checker raises, it must end as INVALID, never as a pass
        _log.exception("%s raised", fold.__name__)
        return Failure(f"{fold.__name__} raised {type(error).__name__}: {error}")


def unresolved_keys(run: Run) -> tuple[int, int]:
    """Return how many keys nobody can tell the effect of, and of how many it changed by itself between snapshots."""
    last = run.resolution.filter(pl.col("resolution") == Resolution.UNRESOLVED.value).height
    late = 0
    if run.second is not None:
        retried = run.attempts.filter(pl.col("tag") == FINAL_RETRY)
        late = fates.late_effects(run.first_resolution, run.resolution, retried).height
    return last, late
