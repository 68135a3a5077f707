"""A32, A34, A35: who wrote when they should not, whether the service came back, and whether it saw its own drift."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from invariants.history import FINAL_RETRY, HUNG_UP
from invariants.judges.replay.case import Attempt, Case, Finding, Row
from invariants.judges.replay.events import WALLET_EVENTS
from reference.routing import SHARDS

ERRORS_BOUND: Final = 0.1
"""Share of a second's requests that may be errors when the service counts as back."""
BACKLOG_BOUND: Final = 1_000.0
"""Events or records that may wait when it counts as back."""
BASELINE_FACTOR: Final = 2.0
"""Where it was worse before the first fault, this many times that is the bound."""
BACKLOGS: Final = ("kafka_consumer_lag", "outbox_unpublished")


def a32_zombie_write(case: Case) -> Iterator[Finding]:
    """A32: a server wrote of a shard that it had given up, or a member of it under a term that was over."""
    given_up: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in case.table("routes"):
        if not row["here"] and row["epoch"] > 0 and row["changed_at"] is not None:
            given_up[row["server"], row["shard"]].append(row["changed_at"])
    for what, row, at in _writes(case):
        for changed_at in given_up[row["server"], row["user_id"] % SHARDS]:
            if at is not None and at > changed_at:
                yield Finding(
                    "A32",
                    f"{row['server']} wrote {what} of user {row['user_id']} {at - changed_at:.3f} s after it had given"
                    " the shard up",
                    {"server": row["server"], "user": row["user_id"], "seq": row.get("seq")},
                )
    rows = [(row, json.loads(row["detail"])) for row in _of_kind(case, "primary", "primary_write")]
    primaries = [(row, said) for row, said in rows if row["kind"] == "primary"]
    for row, said in rows:
        if row["kind"] == "primary_write":
            yield from _deposed(row, said, primaries)
    members: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row, said in primaries:
        members[row["node"], said["term"]].add(said["member"])
    for (node, term), names in members.items():
        if len(names) > 1:
            text = f"{' and '.join(sorted(names))} were both primary of {node} under term {term}"
            yield Finding("A32", text, {"node": node, "term": term})


def _writes(case: Case) -> Iterator[tuple[str, Row, float | None]]:
    for row in case.table("ledger"):
        yield "an entry", row, row["created_at"]
    for row in case.table("bets"):
        yield "a bet", row, row["placed_at"]
    for row in case.table("refusals"):
        yield "a refusal", row, row["created_at"]
    for row in case.table("outbox"):
        if row["event_type"] in WALLET_EVENTS and row["user_id"] is not None:
            yield "an event", row, row["created_at"]


def _deposed(write: Row, said: Row, primaries: list[tuple[Row, Row]]) -> Iterator[Finding]:
    for row, newer in primaries:
        if row["node"] == write["node"] and row["t"] < write["t"] and newer["term"] > said["term"]:
            yield Finding(
                "A32",
                f"{said['member']} of {write['node']} committed under term {said['term']} at {write['t']:.3f} s;"
                f" {newer['member']} was primary under {newer['term']} since {row['t']:.3f} s",
                {"node": write["node"], "term": said["term"]},
            )
            return


def _of_kind(case: Case, *kinds: str) -> list[Row]:
    return [row for row in case.timeline if row["kind"] in kinds]


@dataclass
class Storm:
    """Faults that came before the time to recover from the ones before was over; seconds of the run."""

    fault_id: int
    """The last of them."""
    began: float
    healed: float
    deadline: float


def a34_no_recovery(case: Case) -> Iterator[Finding]:
    """A34: after a storm of measured faults, errors or a backlog are not back under their bound in time."""
    first_fault = min((row["t"] for row in _of_kind(case, "fault_requested")), default=None)
    if first_fault is None:
        return
    recover_s = case.run.config.recover_within_s
    own = [a for a in case.attempts if a.tag not in (HUNG_UP, FINAL_RETRY)]
    bound = max(ERRORS_BOUND, BASELINE_FACTOR * _share([a for a in own if a.t_invoke < first_fault]))
    for storm in _storms(case, recover_s):
        seconds: dict[int, list[Attempt]] = defaultdict(list)
        for attempt in own:
            if storm.healed <= attempt.t_invoke < storm.deadline + 1:
                seconds[int(attempt.t_invoke - storm.healed)].append(attempt)
        # Where the requests end before the time is over, nothing is said.
        if seconds and max(seconds) >= recover_s and all(_share(each) > bound for each in seconds.values()):
            text = (
                f"no second from {storm.healed:.3f} s to {storm.deadline:.3f} s had a share of errors under {bound:.0%}"
            )
            yield Finding("A34", text, {"fault_id": storm.fault_id})
        yield from _backlogs(case, storm, first_fault)


def _share(attempts: list[Attempt]) -> float:
    """Return the share of errors among attempts; 0 where there are none."""
    bad = [a for a in attempts if a.cls == "info" or (a.status or 0) >= 500 or (a.cls == "fail" and a.status is None)]
    return len(bad) / len(attempts) if attempts else 0.0


def _storms(case: Case, recover_s: float) -> list[Storm]:
    edges: dict[str, dict[int, float]] = {kind: {} for kind in ("fault_requested", "fault_start", "fault_end")}
    for row in _of_kind(case, *edges):
        if row["fault_id"] is not None:
            known = edges[row["kind"]]
            known[row["fault_id"]] = min(row["t"], known.get(row["fault_id"], row["t"]))
    asked, started, ended = edges.values()
    storms: list[Storm] = []
    for requested, fault_id in sorted((t, fault_id) for fault_id, t in asked.items()):
        if fault_id not in started or fault_id not in ended:
            continue
        end = ended[fault_id]
        if storms and requested <= max(storm.deadline for storm in storms):
            last = storms[-1]
            healed = max(last.healed, end)
            storms[-1] = Storm(fault_id, last.began, healed, healed + recover_s)
        else:
            storms.append(Storm(fault_id, requested, end, end + recover_s))
    return storms


def _backlogs(case: Case, storm: Storm, first_fault: float) -> Iterator[Finding]:
    end = max((row["t"] for row in case.series), default=0.0)
    samples: dict[tuple[str, str | None], list[tuple[float, float]]] = defaultdict(list)
    for row in case.series:
        if row["name"] in BACKLOGS:
            samples[row["name"], row["node"]].append((row["t"], row["value"]))
    for (name, node), mine in samples.items():
        within = [value for t, value in mine if storm.healed <= t <= storm.deadline]
        if storm.deadline > end or not (within or any(t < storm.began for t, _ in mine)):
            continue  # Samples that end before the time is over, or begin later, say nothing.
        bound = max([BACKLOG_BOUND, *(BASELINE_FACTOR * value for t, value in mine if t < first_fault)])
        if not within or min(within) > bound:
            least = f"fell to {min(within):.0f} at best" if within else "was not reported any more"
            text = f"{name} of {node} {least} from {storm.healed:.3f} s to {storm.deadline:.3f} s; bound {bound:.0f}"
            yield Finding("A34", text, {"fault_id": storm.fault_id, "name": name, "node": node})


def a35_blind_reconciliation(case: Case) -> Iterator[Finding]:
    """A35: a pass that had to see a planted drift did not report it, or none had when its time was over."""
    for drift in case.drifts:
        if drift["within_s"] is None:
            continue
        passes: dict[str, list[Row]] = defaultdict(list)
        for row in case.table("reconciliations"):
            if row["server"] == drift["node"]:
                passes[row["run_id"]].append(row)
        missed = [name for name, rows in passes.items() if _was_due(case, drift, rows[0]) and not _reports(drift, rows)]
        seen = any(_in_time(case, drift, rows[0]) and _reports(drift, rows) for rows in passes.values())
        time_was_over = drift["repaired"] is None or drift["repaired"] >= drift["planted"] + drift["within_s"]
        if missed or (time_was_over and not seen):
            why = f"the pass {missed[0]} saw everything" if missed else f"{drift['within_s']:.0f} s went by"
            yield Finding(
                "A35",
                f"the balance of user {drift['user']} on {drift['node']} was made wrong at {drift['planted']:.3f} s;"
                f" {why} and {drift['code']} was not reported",
                {"node": drift["node"], "user": drift["user"]},
            )


def _reports(drift: Row, rows: list[Row]) -> bool:
    """Return whether a pass, given by its rows, reported a drift under its name."""
    return drift["code"] is not None and any(
        (row["user_id"], row["code"]) == (drift["user"], drift["code"]) for row in rows
    )


def _counts(drift: Row, row: Row) -> bool:
    return drift["requested_by"] is None or row["requested_by"] == drift["requested_by"]


def _in_time(case: Case, drift: Row, row: Row) -> bool:
    """Return whether a pass ended between the planting and the end of the drift's time."""
    origin = case.run.config.origin_unix
    if not _counts(drift, row) or origin is None:
        return _counts(drift, row)
    if row["finished_at"] is None:
        return False
    finished = row["finished_at"] - origin
    latest = drift["planted"] + drift["within_s"] + case.clock_slack_s
    return bool(drift["planted"] - case.clock_slack_s <= finished <= latest)


def _was_due(case: Case, drift: Row, row: Row) -> bool:
    """Return whether a pass saw everything, began after the drift was measured and ended before it was repaired."""
    origin = case.run.config.origin_unix
    if origin is None or None in (drift["measured"], row["started_at"], row["state"]) or not _counts(drift, row):
        return False
    if row["state"] == "INCOMPLETE" or row["started_at"] - origin <= drift["measured"] + case.clock_slack_s:
        return False
    if drift["repaired"] is None:
        return True
    ended = row["finished_at"]
    return ended is not None and ended - origin < drift["repaired"] - case.clock_slack_s
