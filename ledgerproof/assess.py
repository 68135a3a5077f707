"""Turns a run folder into its verdict: the checks, the service levels, and what the harness says of itself.

`prove` calls it at the end of a run and `check` on a stored one; both get the same from the same evidence.
`harness.json` holds what only the harness can know (was the service drained, did the generator keep up, was
anything left behind).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import polars as pl

from invariants import history
from invariants.anomalies import CHECKS
from invariants.files import fingerprint, publish
from invariants.history import FINAL_RETRY
from invariants.large import judge_folder
from invariants.run import final_snapshot
from invariants.snapshot import MissingEvidence
from invariants.timeline import load_series, load_timeline
from invariants.verdict import Judged, Judgement, Verdict, worst
from ledgerproof import __version__, sla
from ledgerproof.options import NotARun
from ledgerproof.sla import FaultRecord, Window
from reference.commands import TOPIC_OF

HARNESS_FILE: Final = "harness.json"
VERDICT_FILE: Final = "verdict.json"

MAX_DROPPED_SHARE: Final = 0.001
"""More arrivals dropped than this: the offered load was not the one that was asked for."""
MAX_REFUSED_SHARE: Final = 0.005
"""More requests turned away or unanswered outside the fault windows than this: the service was saturated."""
MAX_LAG_P99_MS: Final = 250.0
"""A generator later than this measures itself."""


class GeneratorFacts(msgspec.Struct):
    """How the generator kept its schedule."""

    lag_p99_ms: float
    late: int
    dropped: int
    scheduled: int
    sent: int
    skipped: int = 0
    gave_up: bool = False
    cpu_s: float | None = None
    """CPU seconds of the harness during the load: generator, probe, sampler and recorder."""


class ReconciliationFacts(msgspec.Struct):
    """What the service's own reconciler said: a second voice that shares no code with the checks."""

    passes: int = 0
    """Passes of the whole run, on all servers, the full one after the drain among them."""
    findings: dict[str, int] = {}
    """Stored findings of all passes, by code."""
    planted: int = 0
    """Findings that follow from the drift which the run itself planted; they are in none of the others."""
    examples: list[str] = []
    problems: list[str] = []
    """Why the full pass after the drain did not see everything."""


class PlanFacts(msgspec.Struct):
    """What a run of a plan is held to, and what it did not do as planned."""

    title: str
    waived: list[str] = []
    """Codes that this plan is not held to: what only a campaign can show."""


class HarnessFacts(msgspec.Struct):
    """What the harness knows and no table of the run folder says."""

    run: str
    seed: int
    commit: str
    version: str
    machine: dict[str, Any]
    started_at: str
    origin_unix: float
    config: dict[str, Any]
    rate: float
    """Bets per second that were asked for."""
    load_start_s: float | None = None
    load_end_s: float | None = None
    generator: GeneratorFacts | None = None
    drained: bool = False
    """Whether the service was at rest before the snapshots; without, an absence proves nothing."""
    parts: list[str] = []
    """Names of the verdicts that the harness itself gives."""
    reasons: list[str] = []
    finished: bool = False
    """False: the harness was killed before it could say how the run ended."""
    shard_moves: list[dict[str, Any]] = []
    """Shards that were moved during the load: `reference.shards.Moved`, and when the move began."""
    sizes: dict[str, int] = {}
    timings: dict[str, float] = {}
    residue: list[str] = []
    search: bool = False
    """The load went beyond what the service holds, on purpose: neither saturation nor service levels are judged."""
    plan: PlanFacts | None = None
    """None: the run offered a load. A plan offers none, so it has no rate to hold and no service level to meet."""
    reconciliation: ReconciliationFacts | None = None
    """None: the reconciler was not asked, because the run ended before."""
    live_audit: dict[str, Any] | None = None
    """What the live auditor said (`ledgerproof.live`); None: it was not asked."""


@dataclass
class Measured:
    """What was measured of a run whose load was recorded."""

    faults: list[FaultRecord]
    attempts: pl.DataFrame
    series: pl.DataFrame
    load: Window
    acknowledged_bets: int


def write_facts(folder: Path, facts: HarnessFacts) -> None:
    """Write harness.json. Raises OSError."""
    _write(folder / HARNESS_FILE, msgspec.json.encode(facts))


def write_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Write verdict.json, whole or not at all. Raises OSError."""
    _write(folder / VERDICT_FILE, msgspec.json.encode(verdict))


def _write(path: Path, text: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(msgspec.json.format(text, indent=2) + b"\n")
    publish(temporary, path)


def read_facts(folder: Path) -> HarnessFacts:
    """Read harness.json. Raises NotARun if it is missing or does not fit."""
    path = folder / HARNESS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=HarnessFacts)
    except OSError as error:
        raise NotARun(f"{folder} is not a run folder: cannot read {path.name} ({error.strerror})") from error
    except msgspec.DecodeError as error:
        raise NotARun(f"{path} is not of this version: {error}") from error


def measure(folder: Path, facts: HarnessFacts) -> Measured | None:
    """Read recording and timeline and measure faults and recoveries; None if the load never began."""
    if facts.load_start_s is None or facts.load_end_s is None:
        return None
    load = Window(facts.load_start_s, facts.load_end_s)
    attempts = history.attempts(history.load(folder).frame)
    series = load_series(folder)
    prepared = sla.prepared(attempts, load)
    faults = sla.faults_of(load_timeline(folder))
    sla.measure_recovery(faults, prepared, series, load.end_s)
    accepted = attempts.filter(
        (pl.col("op") == "bet")
        & (pl.col("cls") == "ok")
        & pl.col("intended").is_between(load.start_s, load.end_s)
        & pl.col("tag").ne_missing(FINAL_RETRY)
    )
    return Measured(
        faults=faults,
        attempts=sla.phases_of(prepared, faults, load),
        series=series,
        load=load,
        acknowledged_bets=accepted.select("user", "key").n_unique() if accepted.height else 0,
    )


def saturation(measured: Measured, facts: HarnessFacts) -> str | None:
    """Return why the load cannot be believed, with what was held, or None if generator and service kept up."""
    generator = facts.generator
    calm = measured.attempts.filter(pl.col("phase").is_in(["before", "after"]))
    turned_away = int(calm.select(pl.col("bad").sum()).item() or 0)
    duration_s = measured.load.end_s - measured.load.start_s
    held = f"saturated: held {measured.acknowledged_bets / duration_s:.0f} of {facts.rate:g} bets/s"
    if generator is not None:
        if generator.gave_up:
            return f"{held}; the generator fell too far behind its schedule and stopped"
        if generator.dropped > MAX_DROPPED_SHARE * generator.scheduled:
            return f"{held}; {generator.dropped} of {generator.scheduled} arrivals found too many requests in flight"
        if generator.lag_p99_ms > MAX_LAG_P99_MS:
            return (
                f"{held}; the generator ran {generator.lag_p99_ms:.0f} ms behind its schedule (99th percentile), "
                f"{MAX_LAG_P99_MS:.0f} ms are allowed"
            )
    if calm.height and turned_away > MAX_REFUSED_SHARE * calm.height:
        return f"{held}; {turned_away} of {calm.height} requests outside the faults were turned away or lost"
    return None


def assess(folder: Path, facts: HarnessFacts, judges: Sequence[str] | None = None) -> dict[str, Any]:
    """Judge a run folder and return its verdict in the form of verdict.json.

    `judges` are those asked besides the columns (names of `invariants.judges.JUDGES`); None: all.
    Damaged evidence makes the run INVALID, with the reason; NotARun if the facts name a verdict there is not.
    """
    reasons = list(facts.reasons)
    try:
        parts = [Verdict[name] for name in facts.parts]
    except KeyError as error:
        raise NotARun(f"{folder / HARNESS_FILE} names the verdict {error}, which there is not") from error
    measured: Measured | None = None
    try:
        measured = measure(folder, facts)
    except (pl.exceptions.PolarsError, OSError) as error:
        parts.append(Verdict.INVALID)
        reasons.append(f"the recording of the run cannot be read: {error}")
    if not facts.finished:
        parts.append(Verdict.ABORTED)
        reasons.append("the harness ended before the run did: killed, or the machine went down")
    judgement: Judgement | None = None
    if measured is not None and Verdict.ABORTED not in parts:
        try:
            waived = facts.plan.waived if facts.plan is not None else []
            checks = {code: check for code, check in CHECKS.items() if code not in waived} if waived else None
            judgement = judge_folder(folder, checks=checks, judges=judges)
        except (MissingEvidence, pl.exceptions.PolarsError) as error:
            parts.append(Verdict.INVALID)
            reasons.append(f"the run cannot be judged: {error}")
        else:
            _add_judgement(judgement, facts, parts, reasons)
        if facts.plan is None and not facts.search and (problem := saturation(measured, facts)):
            parts.append(Verdict.INVALID)
            reasons.append(problem)
    if facts.reconciliation is not None:
        _add_reconciliation(facts.reconciliation, judgement, parts, reasons)
    if facts.live_audit is not None:
        _add_live_audit(facts.live_audit, judgement, parts, reasons)
    # Service levels of a run that was cut short say nothing about the service.
    levels = measured is not None and facts.plan is None and not facts.search and Verdict.ABORTED not in parts
    table = _service_levels(measured, judgement, folder, facts) if measured and levels else []
    missed = [row["metric"] for row in table if row["met"] is False]
    if missed:
        parts.append(Verdict.SLA_MISSED)
        reasons.append(f"service level missed: {', '.join(missed)}")
    if facts.residue:
        parts.append(Verdict.RESIDUE)
        reasons.append(f"left behind: {'; '.join(facts.residue)}")
    if judgement is None and not parts:
        parts.append(Verdict.INVALID)
        reasons.append("there was no load, so nothing is proved")
    verdict = worst(parts)
    duration_s = None if measured is None else measured.load.end_s - measured.load.start_s
    return {
        "verdict": verdict.name,
        "exit_code": int(verdict),
        "run": facts.run,
        "seed": facts.seed,
        "commit": facts.commit,
        "version": facts.version,
        "judged_by": __version__,
        "checker": fingerprint(),
        "machine": facts.machine,
        "started_at": facts.started_at,
        "origin_unix": facts.origin_unix,
        "duration_s": duration_s,
        "config": facts.config,
        "acknowledged_bets": 0 if measured is None else measured.acknowledged_bets,
        "bets_per_s": round(measured.acknowledged_bets / duration_s, 1) if measured and duration_s else None,
        "reasons": reasons,
        "anomalies": judgement.anomalies if judgement else {},
        "unchecked": judgement.unchecked if judgement else {},
        "undecided": judgement.undecided if judgement else {},
        "witnesses": msgspec.to_builtins(judgement.witnesses) if judgement else [],
        "unresolved": judgement.unresolved if judgement else None,
        "sometimes": judgement.sometimes if judgement else {},
        "raw_duplicates": judgement.raw_duplicates if judgement else None,
        "judges": [_judged(judged) for judged in judgement.judges] if judgement else [],
        "disagreements": msgspec.to_builtins(judgement.disagreements) if judgement else [],
        "faults": [_fault(fault) for fault in measured.faults] if measured else [],
        "shard_moves": facts.shard_moves,
        "sla": table,
        "operations": sla.operations(measured.attempts) if measured else [],
        "plan": msgspec.to_builtins(facts.plan),
        "generator": msgspec.to_builtins(facts.generator),
        "reconciliation": msgspec.to_builtins(facts.reconciliation),
        "live_audit": facts.live_audit,
        "sizes": facts.sizes,
        "timings": {name: round(value, 2) for name, value in facts.timings.items()},
        "residue": facts.residue,
    }


def _add_judgement(judgement: Judgement, facts: HarnessFacts, parts: list[Verdict], reasons: list[str]) -> None:
    """Add what the checks say; of a service that was not at rest, only what is there counts, not what is not."""
    if facts.drained:
        parts.extend(judgement.parts)
        reasons.extend(judgement.reasons)
        return
    solid = [
        code
        for code, count in judgement.anomalies.items()
        if count and not code.startswith("V") and not CHECKS[code].rests_on_absence
    ]
    if solid:
        parts.append(Verdict.INVARIANT_VIOLATED)
    if judgement.reasons:
        parts.append(Verdict.INVALID)
        reasons.extend(f"{reason} (the service was not at rest)" for reason in judgement.reasons)


def _add_reconciliation(
    said: ReconciliationFacts, judgement: Judgement | None, parts: list[Verdict], reasons: list[str]
) -> None:
    """Add what the reconciler says. What it alone finds is a fault of it or of the checks, and as red."""
    if said.findings:
        parts.append(Verdict.INVARIANT_VIOLATED)
        agrees = judgement is not None and Verdict.INVARIANT_VIOLATED in judgement.parts
        codes = ", ".join(f"{code} {count} times" for code, count in sorted(said.findings.items()))
        reasons.append(f"the reconciler found {codes}" + ("" if agrees else ", and no check agrees with it"))
        reasons.extend(f"reconciler: {example}" for example in said.examples)
    if said.problems:
        parts.append(Verdict.INVALID)
        reasons.append(f"the reconciler could not see everything: {'; '.join(said.problems)}")


def _add_live_audit(
    said: dict[str, Any], judgement: Judgement | None, parts: list[Verdict], reasons: list[str]
) -> None:
    """Add what the live auditor says; what it alone finds may have been gone by the end, and is as red."""
    if said["findings"]:
        parts.append(Verdict.INVARIANT_VIOLATED)
        agrees = judgement is not None and any(judgement.anomalies.get(code) for code in said["findings"])
        codes = ", ".join(f"{code} {count} times" for code, count in sorted(said["findings"].items()))
        reasons.append(f"the live auditor found {codes}" + ("" if agrees else ", and no check agrees with it"))
        reasons.extend(f"live: {witness['code']}: {witness['text']}" for witness in said["witnesses"][:5])
    blind = [*said["missed"], *(f"{store}: {why}" for store, why in said["unseen"].items())]
    if blind:
        parts.append(Verdict.INVALID)
        reasons.append(f"the live auditor could not see everything: {'; '.join(blind)}")


def _service_levels(
    measured: Measured, judgement: Judgement | None, folder: Path, facts: HarnessFacts
) -> list[dict[str, Any]]:
    reconciled, events = (0, 0), 0
    if judgement is not None:
        try:
            final = final_snapshot(folder)
            entries = final.scan("ledger").select("user_id", "seq", "amount").collect()
            reconciled = sla.reconciliation(entries, final.table("projection"))
            sent = final.scan("kafka").filter(pl.col("topic").is_in(sorted(set(TOPIC_OF.values()))))
            events = int(sent.select(pl.len()).collect().item())
        except (MissingEvidence, pl.exceptions.PolarsError):
            # The checks have reported it; the row then has no number.
            reconciled = (0, 0)
    return sla.rows(
        measured.attempts,
        measured.faults,
        measured.series,
        measured.load,
        rate=facts.rate,
        acknowledged_bets=measured.acknowledged_bets,
        anomalies=judgement.anomalies if judgement else {},
        reconciled=reconciled,
        events=events,
    )


def _judged(judged: Judged) -> dict[str, Any]:
    return {
        "name": judged.name,
        "codes": judged.codes,
        "seconds": None if judged.seconds is None else round(judged.seconds, 2),
        "skipped": judged.skipped,
    }


def _fault(fault: FaultRecord) -> dict[str, Any]:
    return {
        "id": fault.id,
        "kind": fault.kind,
        "target": fault.target,
        "requested_at": _rounded(fault.requested_at),
        "measured_start": _rounded(fault.measured_start),
        "measured_end": _rounded(fault.measured_end),
        "healed_at": _rounded(fault.healed_at),
        "recovered_at": _rounded(fault.recovered_at),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
