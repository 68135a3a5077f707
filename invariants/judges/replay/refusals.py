"""A08: each refusal held against every position at which it may have been decided."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from invariants.judges.replay.case import NEVER, REFUSED, Attempt, Case, Finding, Row, Story
from invariants.judges.replay.plain import up

CLOSED: Final = {"CLOSED", "SETTLING", "SETTLED", "VOID"}

TRUE_IN: Final[dict[tuple[str, str], set[str]]] = {
    ("bet", "MATCH_CLOSED"): CLOSED,
    ("cancel", "MATCH_CLOSED"): CLOSED,
    ("close_match", "ILLEGAL_TRANSITION"): {"VOID"},
    ("settle_match", "ILLEGAL_TRANSITION"): {"OPEN", "VOID"},
    ("void_match", "ILLEGAL_TRANSITION"): {"SETTLING", "SETTLED"},
    **{
        (op, "UNKNOWN_MATCH"): {"ABSENT"}
        for op in ("bet", "cancel", "close_match", "settle_match", "void_match", "resettle_match")
    },
}
"""(operation, reason) → the states of the match in which the reason holds; ABSENT: before it was created."""

LEADS_TO: Final = {
    "create_match": "OPEN",
    "close_match": "CLOSED",
    "settle_match": "SETTLING",
    "void_match": "VOID",
    "resettle_match": "SETTLING",
}
"""Match command → the state it leads to."""


@dataclass(frozen=True)
class Refusal:
    """A refusal and the window, in seconds of the run, in which it was decided."""

    attempt: Attempt
    begin: float
    until: float


@dataclass(frozen=True)
class Stage:
    """A state of a match, when it was first asked for and when that was first answered; ±infinity if never."""

    number: int
    state: str
    asked: float
    done: float


def a08_wrong_refusal(case: Case) -> Iterator[Finding]:
    """A08: at no position in the window of a refusal its reason was true."""
    for refusal in _refusals(case):
        why = _wrong(case, refusal)
        if why is not None:
            attempt, key = refusal.attempt, refusal.attempt.said["key"]
            yield Finding(
                "A08",
                f"{attempt.op} (attempt {attempt.number}, key {key}, user {attempt.user}) was refused as"
                f" {attempt.outcome} between {refusal.begin:.3f} s and {refusal.until:.3f} s: {why}",
                {"attempt": attempt.number, "user": attempt.user, "key": key},
            )


def _refusals(case: Case) -> Iterator[Refusal]:
    """Yield each stored refusal once for each reason it was answered with, and every refusal of a match command."""
    applied = {("ledger", entry.user, entry.key) for entry in case.client_entries}
    for story in case.stories.values():
        if story.name not in applied:
            yield from _stored(story)
    for attempt in case.attempts:
        if attempt.family == "match" and attempt.cls == "fail" and attempt.status == REFUSED:
            yield Refusal(attempt, attempt.t_invoke, attempt.t_return)


def _stored(story: Story) -> Iterator[Refusal]:
    told: set[str | None] = set()
    for attempt in sorted(story.refusals, key=lambda a: a.t_return):
        if attempt.outcome not in told:
            told.add(attempt.outcome)
            yield Refusal(attempt, story.begin_s, attempt.t_return)


def _wrong(case: Case, refusal: Refusal) -> str | None:
    """Return why a refusal is wrong, or None where it may be right."""
    attempt = refusal.attempt
    if attempt.outcome == "INSUFFICIENT_FUNDS" and attempt.family == "ledger":
        return _funds_were_there(case, refusal)
    if (attempt.op, attempt.outcome) in TRUE_IN and attempt.match_id is not None:
        return _never_in_such_a_state(case, refusal)
    if attempt.outcome == "UNKNOWN_OUTCOME":
        match = next((m for m in case.table("matches") if m["match_id"] == attempt.match_id), None)
        has = (match["outcomes"] or "").split(",") if match is not None else []
        return f"its match has the outcome {attempt.selection}" if attempt.selection in has else None
    if attempt.outcome == "LIMIT_EXCEEDED" and attempt.op == "bet":
        cost, limit = _cost(attempt), case.run.config.max_amount_minor
        return f"it reserves {cost}, the limit is {limit}" if cost is not None and cost <= limit else None
    if attempt.outcome == "ROLLED_BACK" and attempt.family == "ledger":
        rollback = case.stories.get(("rollback", attempt.user, attempt.said["key"]))
        sent = rollback is not None and rollback.begin_s < refusal.until
        return None if sent else "nobody had sent a rollback of its key"
    if attempt.outcome == "NOTHING_TO_CANCEL" and attempt.family == "cancel":
        return _cancelled_later(case, refusal)
    return None


def _cost(attempt: Attempt) -> int | None:
    """Return what a command takes from its wallet; below zero for a deposit, None if the attempt does not say."""
    amount: int | None = attempt.amount
    if amount is None or attempt.op == "withdraw":
        return amount
    if attempt.op == "deposit":
        return -amount
    if attempt.side == "BACK":
        return amount
    return None if attempt.odds is None else up(amount * (attempt.odds - 100), 100)


def _funds_were_there(case: Case, refusal: Refusal) -> str | None:
    attempt = refusal.attempt
    cost = _cost(attempt)
    if cost is None:
        return None
    wallet = case.wallets.get(attempt.user, [])
    # What the wallet holds after each of its entries, and before the first.
    positions = [(0, 0), *((entry.seq, entry.replayed) for entry in wallet)]
    after = [entry.seq for ack_s, entry in case.acknowledged.get(attempt.user, []) if ack_s < refusal.begin]
    after += [
        read.seq
        for read in case.attempts
        if read.family == "read" and read.cls == "ok" and read.user == attempt.user
        if read.seq is not None and read.t_return < refusal.begin
    ]
    before = [
        entry.seq
        for entry in wallet
        if not entry.system and (story := case.stories.get(("ledger", entry.user, entry.key))) is not None
        if story.begin_s > refusal.until
    ]
    low, high = max(after, default=0), min(before) - 1 if before else positions[-1][0]
    seqs = [seq for seq, _ in positions]
    # A bound that is no seq of the wallet (A10, A19) bounds nothing.
    first = _last_index(seqs, low) if low in seqs else 0
    last = _last_index(seqs, high) if high in seqs else len(seqs) - 1
    balances = [balance for _, balance in positions[first : last + 1]]
    if not balances or any(balance < cost for balance in balances):
        return None
    return f"it takes {cost}, and after each seq from {low} to {high} the wallet held at least {min(balances)}"


def _last_index(seqs: list[int], seq: int) -> int:
    return max(index for index, value in enumerate(seqs) if value == seq)


def _never_in_such_a_state(case: Case, refusal: Refusal) -> str | None:
    attempt = refusal.attempt
    if attempt.outcome == "MATCH_CLOSED":
        origin = case.run.config.origin_unix
        if origin is None:
            return None  # Whether the closing time had come cannot be said without the wall clock.
        closes = [m["closes_at"] for m in case.table("matches") if m["match_id"] == attempt.match_id][:1]
        if any(at is not None and at - origin <= refusal.until + case.clock_slack_s for at in closes):
            return None
    stages = _stages(case, attempt.match_id)
    low = max((s.number for s in stages if s.done < refusal.begin), default=0)
    later = min((s.number for s in stages if s.asked > refusal.until), default=None)
    states = {s.state for s in stages if s.number >= low and (later is None or s.number < later)}
    if states & TRUE_IN[attempt.op, attempt.outcome]:
        return None
    return f"its match was {' or '.join(sorted(states))} all the time"


def _stages(case: Case, match_id: str) -> list[Stage]:
    stages = [Stage(0, "ABSENT", -NEVER, -NEVER)]
    for row in case.table("transitions"):
        if row["match_id"] != match_id:
            continue
        again = row["settlement_version"] > 1
        commands = [
            a
            for a in case.attempts
            if a.match_id == match_id and LEADS_TO.get(a.op) == row["to_state"] and (a.op == "resettle_match") == again
        ]
        done = min((a.t_return for a in commands if a.cls == "ok"), default=NEVER)
        if again and row["to_state"] == "SETTLING":
            done = NEVER  # Which of several corrections an answer was for, it does not say.
        asked = min((a.t_invoke for a in commands), default=-NEVER)
        stages.append(Stage(row["transition_no"], row["to_state"], asked, done))
    return stages


def _cancelled_later(case: Case, refusal: Refusal) -> str | None:
    attempt = refusal.attempt
    for row in case.table("cancels"):
        if not _took_a_part(row, attempt):
            continue
        story = case.stories.get(("cancel", attempt.user, row["idempotent_key"]))
        if story is not None and story.begin_s > refusal.until:
            return f"key {row['idempotent_key']}, sent later, cancelled {row['cancelled_stake']} of the bet"
    return None


def _took_a_part(row: Row, attempt: Attempt) -> bool:
    same_bet = row["bet_id"] == attempt.bet_id and row["user_id"] == attempt.user
    return bool(same_bet and row["outcome"] == "ACCEPTED" and row["cancelled_stake"] > 0)
