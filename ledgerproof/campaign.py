"""Runs many short, different `prove` plans one after the other, and counts what they found; resumable after a kill.

    draw plan → prove → keep the row, remove the folder → … → stop at the first red one and keep its folder

Plans are drawn from one seed: rate, length, servers, faults and the seed of each run. A plan is *silent* when it
found no anomaly; a service level it missed is counted apart, for a busy machine misses many of them. A plan that
proved nothing (INVALID: saturated, not drained in time, …) is tried once more and then counted apart too; several of
them in a row stop the campaign, and a resumed one runs them again. Everything else is red and stops it at once.
"""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from compose.stack import Stack, find_stacks
from compose.state import stacks_folder
from invariants.files import publish
from invariants.verdict import Verdict
from ledgerproof.options import EnvironmentProblem, Options
from ledgerproof.progress import Progress

RATES: Final = (30.0, 45.0, 60.0, 90.0, 130.0)
"""Bets per second: low enough for a machine that does other work as well."""
DURATIONS_S: Final = (18.0, 20.0, 22.0, 25.0)
SERVERS: Final = (1, 2, 3, 4)
FAULTY_SHARE: Final = 0.6
TRIES_MAX: Final = 2
"""A plan that proves nothing is run no more often than this."""
UNPROVEN_IN_A_ROW_MAX: Final = 3
"""After so many the campaign stops: either the machine is too slow for it, or the service hangs."""

Prove = Callable[[Options, Progress], tuple[Path, dict[str, Any]]]


class Plan(msgspec.Struct, frozen=True):
    """One run to come; the same for the same campaign seed and number."""

    number: int
    seed: int
    rate: float
    duration_s: float
    servers: int
    faults: str


class Row(msgspec.Struct):
    """What became of one plan."""

    plan: Plan
    verdict: str
    kind: str
    """silent, unproven or red."""
    reasons: list[str]
    anomalies: dict[str, int]
    """Counts by code, those above zero only."""
    witnesses: list[dict[str, Any]]
    live: dict[str, int]
    """Findings of the live auditor beside the load by code, where it ran."""
    acknowledged_bets: int
    tries: int
    seconds: float
    at: str
    folder: str | None = None
    """Where the run is, if it was kept."""


class Campaign(msgspec.Struct):
    """The whole campaign as its file holds it."""

    seed: int
    plans: int
    commit: str
    version: str
    machine: dict[str, Any]
    rows: list[Row] = []

    def count(self, kind: str) -> int:
        """Return how many plans ended so."""
        return sum(row.kind == kind for row in self.rows)


def draw_plan(seed: int, number: int) -> Plan:
    """Return plan `number` (from 1) of a campaign."""
    rng = random.Random(f"{seed}:{number}")  # noqa: S311 - a plan, not a secret
    return Plan(
        number=number,
        seed=rng.randrange(2**31),
        rate=rng.choice(RATES),
        duration_s=rng.choice(DURATIONS_S),
        servers=rng.choice(SERVERS),
        faults="standard" if rng.random() < FAULTY_SHARE else "none",
    )


def kind_of(verdict: dict[str, Any]) -> str:
    """Return what a verdict means for the campaign: silent, unproven or red."""
    if verdict["exit_code"] in (Verdict.PASS, Verdict.SLA_MISSED):
        return "silent"
    return "unproven" if verdict["exit_code"] == Verdict.INVALID else "red"


def load(path: Path, fresh: Campaign) -> Campaign:
    """Return the campaign that `path` holds, to be gone on with, or `fresh` where there is none.

    Raises EnvironmentProblem for a file of another seed or commit: their rows must not be counted together.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Campaign)
    except FileNotFoundError:
        return fresh
    except (OSError, msgspec.DecodeError) as error:
        raise EnvironmentProblem(f"{path} cannot be read: {error}; choose another file with --out") from error
    if (found.seed, found.commit) != (fresh.seed, fresh.commit):
        raise EnvironmentProblem(
            f"{path} holds the campaign of seed {found.seed} and commit {found.commit}, this is seed {fresh.seed} and "
            f"commit {fresh.commit}: choose another file with --out, or begin anew with --fresh"
        )
    found.plans = fresh.plans
    found.rows = [row for row in found.rows if row.kind != "unproven"]
    return found


def save(path: Path, campaign: Campaign) -> None:
    """Write the campaign, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(campaign), indent=2) + b"\n")
    publish(temporary, path)


@dataclass(frozen=True)
class Workshop:
    """With what and where plans are run."""

    prove: Prove
    progress: Progress
    runs: Path
    """Gets the folder of each run while it lasts."""
    root: Path
    """State folder of the stacks."""
    audit: bool
    """Whether the live auditor runs beside every load."""


def run(campaign: Campaign, path: Path, shop: Workshop) -> Verdict:
    """Run the plans that have no row yet, in order; return the worst verdict, ABORTED when it was interrupted.

    The file at `path` is written after every plan.
    """
    progress = shop.progress
    if campaign.count("red"):
        return verdict_of(campaign)
    done = {row.plan.number for row in campaign.rows}
    for number in range(1, campaign.plans + 1):
        if number in done:
            continue
        clean_up(shop.root, progress)
        row = _one(draw_plan(campaign.seed, number), shop)
        if row.verdict == Verdict.ABORTED.name:
            # Stopped by the user or by a full disk: the plan has no result and is run again next time.
            progress.warn(f"plan {number} was stopped ({'; '.join(row.reasons)}); the same command goes on with it")
            return Verdict.ABORTED
        campaign.rows.append(row)
        save(path, campaign)
        progress.say(line(row))
        if row.kind == "red":
            progress.warn(f"stopped at the first red plan; its run is kept in {row.folder}")
            return Verdict[row.verdict]
        last = campaign.rows[-UNPROVEN_IN_A_ROW_MAX:]
        if len(last) == UNPROVEN_IN_A_ROW_MAX and all(row.kind == "unproven" for row in last):
            progress.warn(f"stopped: the last {UNPROVEN_IN_A_ROW_MAX} plans proved nothing ({'; '.join(row.reasons)})")
            break
    return verdict_of(campaign)


def verdict_of(campaign: Campaign) -> Verdict:
    """Return what the rows so far amount to; a plan that proved nothing makes all of it INVALID."""
    for row in campaign.rows:
        if row.kind == "red":
            return Verdict[row.verdict]
    if campaign.count("unproven") or len(campaign.rows) < campaign.plans:
        return Verdict.INVALID
    return Verdict.PASS


def _one(plan: Plan, shop: Workshop) -> Row:
    began = time.monotonic()
    tries = 0
    while True:
        tries += 1
        options = Options(
            seed=plan.seed,
            duration_s=plan.duration_s,
            rate=plan.rate,
            servers=plan.servers,
            faults=plan.faults,
            out=shop.runs,
            root=shop.root,
            audit=shop.audit,
        )
        try:
            folder, verdict = shop.prove(options, shop.progress)
        except EnvironmentProblem as error:
            # A stack that did not come up left nothing behind; on a busy machine it may the next time.
            if tries >= TRIES_MAX:
                raise
            shop.progress.warn(f"plan {plan.number} could not begin: {error}")
            continue
        kind = kind_of(verdict)
        if kind == "unproven" and tries < TRIES_MAX:
            shutil.rmtree(folder)
            continue
        kept = kind == "red"
        if not kept:
            shutil.rmtree(folder)
        live = verdict.get("live_audit") or {}
        return Row(
            plan=plan,
            verdict=verdict["verdict"],
            kind=kind,
            reasons=verdict["reasons"],
            anomalies={code: count for code, count in verdict["anomalies"].items() if count},
            witnesses=verdict["witnesses"][:20],
            live={code: count for code, count in live.get("findings", {}).items() if count},
            acknowledged_bets=verdict["acknowledged_bets"],
            tries=tries,
            seconds=round(time.monotonic() - began, 1),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            folder=str(folder) if kept else None,
        )


def clean_up(root: Path, progress: Progress) -> None:
    """Take down what a killed campaign left behind: stacks whose owner is gone and that nobody asked to keep."""
    for state in find_stacks(root):
        if state.place == "here" and not state.owner_is_alive and not state.spec.keep:
            progress.say(f"taking down the stack {state.name} that a killed run left behind")
            Stack.attach(stacks_folder(root) / state.name, progress.show).down()


def line(row: Row) -> str:
    """Return one line about a plan, for people."""
    plan = row.plan
    what = f"{plan.rate:g}/s for {plan.duration_s:g} s on {plan.servers} servers, faults {plan.faults}"
    found = ", ".join(f"{code} {count}" for code, count in (row.anomalies | row.live).items()) or "no anomaly"
    if row.kind == "unproven":
        found = "; ".join(row.reasons)
    return f"plan {plan.number}: {row.verdict} ({row.kind}) {what}: {row.acknowledged_bets} bets, {found}"
