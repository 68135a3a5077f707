"""From evidence to one verdict: nothing unproven is green."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeVar

import polars as pl

from invariants import fates, sometimes
from invariants.anomalies import CHECKS, Check, Found, Witness
from invariants.fates import Resolution
from invariants.history import FINAL_RETRY
from invariants.judges import COLUMNS, JUDGES, Disagreement, Opinion, disagreements
from invariants.run import Run
from invariants.snapshot import MissingEvidence, NotRecorded

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
class Judged:
    """That a judge was asked, or why not."""

    name: str
    codes: list[str] = field(default_factory=list)
    """What it decided."""
    seconds: float | None = None
    skipped: str | None = None
    """Why it was not asked; None: it was."""


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
    judges: list[Judged] = field(default_factory=list)
    """Who judged, the columns first."""
    disagreements: list[Disagreement] = field(default_factory=list)
    """Codes of which two judges say different things. Not empty: the run is INVALID."""
    parts: list[Verdict] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why the run is not PASS, one sentence each."""
    undecided: dict[str, str] = field(default_factory=dict)
    """Code → what of it could not be decided because the run is older than the evidence for it. Such a run is judged
    by what it holds: this alone makes it not INVALID."""

    @property
    def verdict(self) -> Verdict:
        """The verdict of the checks alone; the run's own is `worst` of this and its SLA, abort and residue."""
        return worst(self.parts)


def judge(run: Run, checks: dict[str, Check] | None = None, judges: Sequence[str] | None = None) -> Judgement:
    """Run every check and the resolution of unknown keys, and ask the other judges whether they agree.

    Never raises: what raises makes the run INVALID. `judges` are names of `JUDGES` that are asked besides the
    columns; None: all of them, or none where other `checks` than the catalogue's are given.
    """
    if judges is None:
        judges = list(JUDGES) if checks is None else []
    checks = CHECKS if checks is None else checks
    counts: dict[str, int] = {}
    unchecked: dict[str, str] = {}
    undecided: dict[str, str] = {}
    witnesses: list[Witness] = []
    subjects: dict[str, frozenset[str]] = {}
    started = time.monotonic()
    for code, check in checks.items():
        result = attempted(check.find, run)
        if isinstance(result, Found):
            counts[code] = result.count
            witnesses += result.witnesses
            subjects[code] = result.subjects
            if lacking := [name for name in check.older if name in run.lacking]:
                undecided[code] = f"in part: the run is older than {', '.join(lacking)}"
        elif result.too_old:
            undecided[code] = result.why
        else:
            unchecked[code] = result.why
    subjects_found = Judged(COLUMNS, sorted(subjects), time.monotonic() - started)
    return conclude(
        checks=checks,
        counts=counts,
        unchecked=unchecked,
        undecided=undecided,
        witnesses=witnesses,
        asked=ask_others(run, judges, subjects_found, subjects, run.recording.frame.height),
        left_open=attempted(unresolved_keys, run),
        shown=attempted(sometimes.count, run),
        duplicates=attempted(sometimes.raw_duplicates, run),
    )


@dataclass(frozen=True)
class Asked:
    """What the judges said."""

    judges: list[Judged]
    opinions: dict[str, Opinion]
    problems: list[str]
    """Why what one of them said proves nothing."""


def ask_others(
    run: Run, judges: Sequence[str], columns: Judged, subjects: dict[str, frozenset[str]], records: int | None
) -> Asked:
    """Ask the other judges of a run of so many history records; `columns` and `subjects` are the first one's.

    `records` None: the run is cut, and only judges that read the files themselves can be asked, those without a bound.
    """
    asked = Asked([columns], {COLUMNS: Opinion(subjects)}, [])
    for name in judges:
        judged, opinion, problems = _asked(name, run, records)
        asked.judges.append(judged)
        asked.problems.extend(problems)
        if opinion is not None:
            asked.opinions[name] = opinion
    return asked


def conclude(
    *,
    checks: dict[str, Check],
    counts: dict[str, int],
    unchecked: dict[str, str],
    undecided: dict[str, str],
    witnesses: list[Witness],
    asked: Asked,
    left_open: "tuple[int, int] | Failure",
    shown: "dict[str, int] | Failure",
    duplicates: "int | Failure",
) -> Judgement:
    """Return the judgement that follows from what every check found, or why it could not look."""
    defects = [f"{code} could not be checked: {why}" for code, why in unchecked.items()] + asked.problems
    differences = disagreements(asked.opinions, only=DAMAGED_EVIDENCE if _damaged(counts) else None)
    defects += [difference.text for difference in differences]
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
        judges=asked.judges,
        disagreements=differences,
        parts=parts or [Verdict.PASS],
        reasons=reasons + defects,
        undecided=undecided,
    )


def _damaged(counts: dict[str, int]) -> bool:
    """Return whether the evidence has holes. What lies in a hole each judge may take for something else."""
    return any(counts.get(code, 0) for code in DAMAGED_EVIDENCE)


def _asked(name: str, run: Run, records: int | None) -> tuple[Judged, Opinion | None, list[str]]:
    """Ask one judge; return what it decided, its opinion if it has one, and why that proves nothing, if so."""
    asked = JUDGES[name]
    if asked.max_records is not None and records is None:
        why = f"the run is judged in slices; this judge reads whole runs of up to {asked.max_records} records"
        return Judged(name, skipped=why), None, []
    if asked.max_records is not None and records is not None and records > asked.max_records:
        why = f"the history has {records} records; this judge reads up to {asked.max_records}"
        return Judged(name, skipped=why), None, []
    started = time.monotonic()
    opinion = attempted(asked.judge, run)
    seconds = time.monotonic() - started
    if isinstance(opinion, Failure):
        return Judged(name, seconds=seconds), None, [f"the judge {name} could not judge: {opinion.why}"]
    undecided: dict[str, list[str]] = defaultdict(list)
    for code, why in opinion.undecided.items():
        undecided[why].append(code)
    problems = [f"the judge {name} could not decide {', '.join(codes)}: {why}" for why, codes in undecided.items()]
    return Judged(name, sorted(opinion.found), seconds), opinion, problems


def _violations(counts: dict[str, int], checks: dict[str, Check]) -> tuple[list[Verdict], list[str]]:
    parts: list[Verdict] = []
    reasons: list[str] = []
    damaged = _damaged(counts)
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
    too_old: bool = False


def attempted(fold: Callable[[Run], T], run: Run) -> T | Failure:
    """Return what a fold finds in a run, or why it could not. Never raises."""
    try:
        return fold(run)
    except NotRecorded as error:
        return Failure(str(error), too_old=True)
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
