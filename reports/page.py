"""What the page says: the verdict in plain words, how to repeat the run, its key figures and all its parts."""

import shlex
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from reports import pairs, tables
from reports.folder import RunFolder, Verdict
from reports.forecast_part import ForecastPart, forecast_part
from reports.gaps import Gap
from reports.load_part import LoadPart, load_part
from reports.load_plots import HEAT_BINS
from reports.load_tallies import load_clock
from reports.loads import Knee, Load
from reports.sheets import Plot
from reports.tables import Table, WitnessGroup
from reports.tallies import Clock, answered, under_load, unknown_count
from reports.words import (
    CODES,
    LIMIT_MISSED_STEPS,
    NBSP,
    NO_VERDICT,
    NONE,
    VERDICTS,
    VerdictWords,
    integer,
    number,
    plural,
    seconds,
    sentence,
)

TEMPLATES = Path(__file__).parent / "templates"
MAX_REASONS = 20
Options = tuple[tuple[str, tuple[str, ...]], ...]

PROVE_OPTIONS: Options = (
    ("--duration", ("duration", "duration_s")),
    ("--rate", ("rate", "rate_per_s")),
    ("--servers", ("servers", "server_count")),
    ("--faults", ("faults", "fault_plan")),
)
LOAD_OPTIONS: Options = (
    ("--profiles-file", ("profiles_file",)),
    ("--trace", ("trace",)),
    ("--servers", ("servers",)),
    ("--apis", ("apis",)),
    ("--workers", ("workers",)),
    ("--rate-factor", ("rate_factor",)),
    ("--time-factor", ("time_factor",)),
    ("--lag-limit-ms", ("lag_limit_ms",)),
)
"""Options of the command that repeats a run, and under which names of its configuration their values stand."""


@dataclass(frozen=True)
class KeyFigure:
    """One of the large numbers at the top."""

    label: str
    value: str
    about: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Page:
    """Everything the template prints."""

    run: str
    version: str
    words: VerdictWords
    facts: list[tuple[str, str]]
    reasons: list[str]
    command: list[str]
    """In pieces that a line break must not split."""
    command_note: str
    figures: list[KeyFigure]
    contents: list[tuple[str, str]]
    gaps: list[Gap]
    broken: bool
    load: LoadPart | None
    forecast: ForecastPart | None
    sla: Table | None
    faults: Table | None
    shard_moves: Table | None
    phases: Table | None
    interruptions: Table | None
    anomalies: Table | None
    unchecked: str
    undecided: Table | None
    judges: Table | None
    disagreements: list[str]
    witnesses: list[WitnessGroup]
    fates: Table | None
    no_fates: str
    unresolved_note: str
    sometimes: Table | None
    operations: Table | None
    generator: list[tuple[str, str]]
    usage: Table | None
    machine: list[tuple[str, str]]
    timings: list[tuple[str, str]]
    config: list[tuple[str, str]]
    sizes: list[tuple[str, str]]
    files: Table | None
    css: str
    bin_note: str
    no_history: str = "The run has no history of attempts, so there is nothing to draw here."
    plots: dict[str, Plot] = field(default_factory=dict)


def build(run: RunFolder, clock: Clock | None, plots: dict[str, Plot]) -> Page:
    """Return the contents of the page of a run; `plots` are its figures by name."""
    verdict = run.verdict
    gaps = [*run.gaps, *_contradictions(verdict)]
    broken = any(verdict.anomalies.values()) or bool(verdict.witnesses)
    load = load_part(run, load_clock(run.load, [], HEAT_BINS).bin_s if run.load is not None else None)
    sections = [
        ("missing", "What is missing", bool(gaps)),
        ("anomalies", "Anomalies", broken),
        ("load", "Load", load is not None),
        ("sla", "Service levels", True),
        ("faults", "Faults", True),
        ("throughput", "Throughput", True),
        ("latency", "Latency", True),
        ("availability", "Availability", True),
        ("backlogs", "Backlogs", True),
        ("forecast", "Forecast", run.forecast is not None),
        ("anomalies", "Anomalies", not broken),
        ("unknown", "Unknown outcomes", True),
        ("sometimes", "Sometimes", True),
        ("operations", "Operations", True),
        ("generator", "Load generator", True),
        ("resources", "Resources", True),
        ("setup", "Setup and files", True),
    ]
    command, command_note = _command(verdict)
    return Page(
        run=verdict.run or run.path.resolve().name,
        version=verdict.version or "",
        words=_words(run),
        facts=_facts(verdict),
        reasons=_reasons(verdict),
        command=command,
        command_note=command_note,
        figures=_figures(run),
        contents=[(anchor, title) for anchor, title, there in sections if there],
        gaps=gaps,
        broken=broken,
        load=load,
        forecast=forecast_part(run, drawn=any(name.startswith("forecast-") for name in plots)),
        sla=tables.sla(verdict),
        faults=tables.faults(verdict),
        shard_moves=tables.shard_moves(verdict),
        phases=tables.phases(clock),
        interruptions=tables.interruptions(run),
        anomalies=tables.anomalies(verdict),
        unchecked=_unchecked(verdict),
        undecided=tables.undecided(verdict),
        judges=tables.judges(verdict),
        disagreements=[item.text for item in verdict.disagreements],
        witnesses=tables.witnesses(verdict),
        fates=tables.fates(run),
        no_fates=_no_fates(run),
        unresolved_note=_unresolved_note(verdict),
        sometimes=tables.sometimes(verdict),
        operations=tables.operations(verdict.operations),
        generator=pairs.generator(verdict),
        usage=tables.usage(run),
        machine=pairs.machine(verdict),
        timings=pairs.timings(verdict),
        # What a search found stands in its own part, window by window.
        config=pairs.pairs({name: value for name, value in verdict.config.items() if name != "knee"}),
        sizes=pairs.sizes(verdict),
        files=tables.files(run),
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        bin_note=f" One point is {clock.bin_s}{NBSP}s." if clock and "throughput" in plots else "",
        plots=plots,
    )


def _words(run: RunFolder) -> VerdictWords:
    verdict = run.verdict
    if verdict.verdict == "SLA_MISSED" and run.load is not None and run.load.told.missed:
        return replace(VERDICTS["SLA_MISSED"], next_steps=LIMIT_MISSED_STEPS)
    if verdict.verdict is None:
        return NO_VERDICT
    known = VERDICTS.get(verdict.verdict)
    if known is not None:
        return known
    return VerdictWords(
        sentence(verdict.verdict).upper(),
        "doubt",
        "This version of the report does not know this verdict; the reasons below are the run's own words.",
        ("Read verdict.json with the version of ledgerproof that wrote it.",),
    )


def _contradictions(verdict: Verdict) -> list[Gap]:
    """Return what in the verdict does not agree with itself; a reader should trust the worse half."""
    count = sum(verdict.anomalies.values())
    found = []
    if verdict.verdict == "PASS" and count:
        found.append(
            Gap("verdict.json", f"says PASS, yet counts {plural(count, 'anomaly', 'anomalies')}: do not trust it")
        )
    if verdict.verdict == "PASS" and verdict.unresolved:
        found.append(Gap("verdict.json", f"says PASS, yet leaves {plural(verdict.unresolved, 'outcome')} unresolved"))
    if verdict.verdict == "PASS" and any(row.met is False for row in verdict.sla):
        found.append(Gap("verdict.json", "says PASS, yet a service level is marked missed"))
    return found


def _started(verdict: Verdict) -> str:
    started = verdict.started_at if verdict.started_at is not None else verdict.origin_unix
    if started is None:
        return NONE
    try:
        moment = datetime.fromisoformat(started) if isinstance(started, str) else datetime.fromtimestamp(started, UTC)
    except (ValueError, OverflowError, OSError):
        return str(started)
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S") + (" UTC" if moment.tzinfo else "")


def _facts(verdict: Verdict) -> list[tuple[str, str]]:
    return [
        ("Exit code", NONE if verdict.exit_code is None else str(verdict.exit_code)),
        ("Started", _started(verdict)),
        ("Load", seconds(verdict.duration_s, 0)),
        ("Seed", NONE if verdict.seed is None else str(verdict.seed)),
        ("Commit", (verdict.commit or NONE)[:12] + ("-dirty" if _dirty(verdict) else "")),
    ]


def _dirty(verdict: Verdict) -> bool:
    return bool(verdict.commit and verdict.commit.endswith("-dirty"))


def _reasons(verdict: Verdict) -> list[str]:
    reasons = [*verdict.reasons, *(f"left behind: {item}" for item in verdict.residue)]
    if len(reasons) > MAX_REASONS:
        reasons = [*reasons[:MAX_REASONS], f"and {len(reasons) - MAX_REASONS} more in verdict.json"]
    return reasons


def _command(verdict: Verdict) -> tuple[list[str], str]:
    """Return the command that repeats the run and what it does and does not repeat."""
    flat = dict(pairs.flatten(verdict.config))
    profile = flat.get("profile")
    if isinstance(profile, str):
        words = [shlex.join(["ledgerproof", "load", profile])]
        names = LOAD_OPTIONS
    else:
        words = ["ledgerproof prove"]
        names = PROVE_OPTIONS
    options = [("--seed", verdict.seed)]
    for option, places in names:
        value = next((flat[place] for place in places if isinstance(flat.get(place), str | int | float)), None)
        options.append((option, value))
    for option, value in options:
        if value is not None:
            words.append(shlex.join([option, _plain(value)]))
    drawn = "every arrival" if isinstance(profile, str) else "the workload and the fault plan"
    note = f"The seed repeats {drawn}. It cannot repeat the timing of processes, disks and threads."
    if verdict.seed is None:
        note = "The seed was not recorded, so another workload will be drawn."
    elif verdict.commit and _dirty(verdict):
        note = f"{note} The tree had changes beyond commit {verdict.commit[:12]}."
    elif verdict.commit:
        note = f"At commit {verdict.commit[:12]}. {note}"
    return words, note


def _plain(value: float | str) -> str:
    """Return the value of an option as briefly as it can be read back."""
    if not isinstance(value, float):
        return str(value)
    return short if float(short := f"{value:g}") == value else repr(value)


def _figures(run: RunFolder) -> list[KeyFigure]:
    verdict = run.verdict
    attempts, about_attempts = NONE, "not recorded"
    if run.attempts is not None:
        load = under_load(run.attempts)
        done = load.filter(pl.col("result") == "ok").height
        got = load.filter(answered()).height
        attempts = integer(load.height)
        about_attempts = f"{integer(done)} done, {integer(got - done)} refused by a rule"
    elif verdict.operations:
        attempts = integer(sum(row.count or 0 for row in verdict.operations))
        about_attempts = "of all operations and phases"
    unknown = _unknown(run)
    if verdict.unresolved:
        unknown_about, unknown_tone = f"{integer(verdict.unresolved)} could not be resolved", "bad"
    elif verdict.unresolved == 0:
        unknown_about, unknown_tone = ("all resolved" if unknown else "nothing to resolve"), ""
    else:
        unknown_about, unknown_tone = "whether they were resolved is not recorded", ""
    measured = sum(fault.measured_start is not None for fault in verdict.faults)
    faults = f"all {integer(measured)} measured" if measured > 1 else "measured"
    if measured < len(verdict.faults):
        faults = f"only {integer(measured)} measured"
    # V codes say that a check meant nothing; they make a run INVALID but are no fault of the ledger.
    vacuous = sum(count for code, count in verdict.anomalies.items() if code.startswith("V"))
    count = sum(verdict.anomalies.values()) - vacuous
    checked = plural(len(verdict.anomalies), "rule") + " checked" if verdict.anomalies else "nothing was checked"
    if vacuous:
        checked = f"{checked}, {integer(vacuous)} vacuous"
    missed = sum(row.met is False for row in verdict.sla)
    judged = sum(row.met is not None for row in verdict.sla)
    total = verdict.timings.get("total_s")
    return [
        KeyFigure("Acknowledged bets", integer(verdict.acknowledged_bets), "answered as accepted"),
        KeyFigure("Bets per second", number(verdict.bets_per_s, 0), "mean under load, faults included"),
        KeyFigure("Attempts", attempts, about_attempts),
        KeyFigure("Unknown outcomes", integer(unknown), unknown_about, unknown_tone),
        KeyFigure(
            "Anomalies",
            integer(count) if verdict.anomalies else NONE,
            checked,
            # A zero is good news only where the run proves something.
            "bad" if count else "doubt" if vacuous else "good" if verdict.verdict in ("PASS", "SLA_MISSED") else "",
        ),
        _knee(run.knee)
        if run.knee is not None
        else _limits(run.load)
        if run.load is not None and not verdict.faults
        else KeyFigure(
            "Faults",
            integer(len(verdict.faults)),
            faults if verdict.faults else "none injected or none recorded",
            "bad" if measured < len(verdict.faults) else "",
        ),
        KeyFigure(
            "Service levels",
            f"{judged - missed} of {judged}" if judged else NONE,
            "met" if judged else "none judged",
            "warn" if missed else "",
        ),
        KeyFigure(
            "Whole run",
            seconds(total, 0) if isinstance(total, int | float) else NONE,
            "from start to verdict",
        ),
    ]


def _limits(load: Load) -> KeyFigure:
    missed = len(load.told.missed)
    return KeyFigure(
        "Limits of the profile",
        f"{integer(missed)} missed" if missed else "none missed",
        "see Load",
        # Of a load that proves nothing, a limit is neither kept nor missed.
        "warn" if missed and load.told.invalid == [] else "",
    )


def _knee(knee: Knee) -> KeyFigure:
    if knee.knee is None:
        return KeyFigure("Knee", "not found", "see Load", "doubt")
    return KeyFigure(
        "Knee", f"{integer(knee.knee)}/s", f"{integer(knee.holds)}/s held, {integer(knee.fails)}/s did not"
    )


def _unknown(run: RunFolder) -> int | None:
    if run.attempts is not None:
        return unknown_count(run.attempts)
    if run.verdict.operations:
        return sum(row.info or 0 for row in run.verdict.operations)
    return None


def _unchecked(verdict: Verdict) -> str:
    left = [code for code in CODES if code not in verdict.anomalies and code not in verdict.unchecked]
    if not verdict.anomalies or not left:
        return ""
    return f"Not checked in this run, so nothing is claimed about them: {', '.join(left)}."


def _no_fates(run: RunFolder) -> str:
    if run.attempts is None:
        return "Without a history of attempts nothing can be said about unknown outcomes."
    return "Every attempt got an answer: there was nothing to resolve."


def _unresolved_note(verdict: Verdict) -> str:
    if verdict.unresolved is None:
        return "The verdict does not say whether the checker resolved them all."
    if verdict.unresolved:
        return f"The checker could not resolve {plural(verdict.unresolved, 'key')}, which makes the run INVALID."
    return ""
