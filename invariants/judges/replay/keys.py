"""A01–A05: each key's story against what is stored under it."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from invariants.history import FINAL_RETRY
from invariants.judges.replay.case import (
    OTHER_BODY,
    ROLLBACK,
    SYSTEM,
    Attempt,
    Case,
    Entry,
    Finding,
    KeyName,
    Row,
    Story,
    rows_of,
    several,
)
from invariants.judges.replay.plain import distinct

STATES: Final = {
    "create_match": {"OPEN"},
    "close_match": {"CLOSED"},
    "settle_match": {"SETTLING", "SETTLED"},
    "void_match": {"VOID"},
}
"""Match command → the states one of which the match has entered if it had its effect."""

FORMS: Final = {
    "REFUND": ("REFUND", "ESCROW"),
    "PAYOUT": ("PAYOUT", "ESCROW"),
    "COMMISSION": ("DEBIT", "HOUSE"),
    "TAKE_BACK": ("DEBIT", "ESCROW"),
    "COMMISSION_BACK": ("REFUND", "HOUSE"),
    "ADVANCE": ("CREDIT", "HOUSE"),
}
"""Kind of a system entry, as its key says → type and account."""

CORRECTIONS: Final = {"TAKE_BACK", "COMMISSION_BACK", "ADVANCE"}
"""Kinds that only a settlement that corrects another can post."""


def effects(case: Case) -> dict[KeyName, int | None]:
    """Return every key that had an effect, with the seq of its first entry (None where the effect is no entry)."""
    found: dict[KeyName, int | None] = {}
    for entry in case.client_entries:
        found.setdefault(("ledger", entry.user, entry.key), entry.seq)
    arrived = {row["bet_id"] for row in case.table("orders")}
    for row in case.table("cancels"):
        # One that still waits for its bet has had no effect once the bet's order is there.
        undone = row["waiting"] is None or (row["waiting"] and row["bet_id"] is not None and row["bet_id"] in arrived)
        if row["outcome"] != "ACCEPTED" or (undone and not row["idempotent_key"].startswith(ROLLBACK)):
            continue
        if row["idempotent_key"].startswith(ROLLBACK):
            found.setdefault(("rollback", row["user_id"], row["idempotent_key"].removeprefix(ROLLBACK)), None)
        else:
            found.setdefault(("cancel", row["user_id"], row["idempotent_key"]), None)
    for row in case.table("refusals"):
        if row["outcome"] == "ROLLED_BACK":
            found.setdefault(("rollback", row["user_id"], row["idempotent_key"]), None)
    entered = [(row["match_id"], row["to_state"]) for row in case.table("transitions")]
    # A match that is there was opened.
    entered += [(row["match_id"], "OPEN") for row in case.table("matches")]
    for match_id, state in entered:
        for op, states in STATES.items():
            if state in states:
                found.setdefault(("match", None, f"{op}:{match_id}"), None)
    for row in case.table("settlements"):
        found.setdefault(_resettle(row), None)
    return found


def _resettle(row: Row) -> KeyName:
    return ("match", None, f"resettle_match:{row['match_id']}:{row['result'] or 'VOID'}")


def a01_lost(case: Case) -> Iterator[Finding]:
    """A01: an acknowledged key has no effect; for a rollback any refusal under the bet's key is effect enough."""
    there = effects(case)
    refused = {(row["user_id"], row["idempotent_key"]) for row in case.table("refusals")}
    for story in case.stories.values():
        if story.fate != "MUST" or story.name in there:
            continue
        if story.family == "rollback" and (story.user, story.key) in refused:
            continue
        yield Finding(
            "A01",
            f"{story.op} with key {story.key} of user {story.user} was acknowledged at {story.ack_s:.3f} s and has no"
            " effect",
            {"user": story.user, "key": story.key},
        )


def a02_duplicate(case: Case) -> Iterator[Finding]:
    """A02: two entries of a client's key, or two of one bet, account and version that is not a payout or refund.

    And a match corrected to one result more often than under different keys anybody asked for it.
    """
    for (user, key), entries in several(case.client_entries, lambda e: (e.user, e.key)).items():
        yield Finding(
            "A02",
            f"key {key} of user {user} has the entries {[e.seq for e in entries]}",
            {"user": user, "key": key},
        )
    # Payouts and refunds that repeat are A27.
    booked = [e for e in case.entries if e.bet_id is not None and e.type in ("DEBIT", "CREDIT")]
    booked = [e for e in booked if e.contra in ("ESCROW", "HOUSE")]
    for (bet, kind, contra, version), entries in several(
        booked, lambda e: (e.bet_id, e.type, e.contra, e.version)
    ).items():
        if len({e.key for e in entries}) == 1 and not any(e.system for e in entries):
            continue  # One key of a client with two entries was named above.
        yield Finding(
            "A02",
            f"bet {bet} has {len(entries)} {kind} entries against {contra} of version {version}:"
            f" {[(e.user, e.seq) for e in entries]}",
            {"bet_id": bet, "contra": contra, "settlement_version": version},
        )
    keys: dict[KeyName, set[str]] = defaultdict(set)
    for attempt in case.attempts:
        if attempt.op == "resettle_match":
            keys[attempt.name] |= {attempt.key} - {None}
    versions: dict[KeyName, set[int]] = defaultdict(set)
    for row in case.table("settlements"):
        if row["settlement_version"] > 1:
            versions[_resettle(row)].add(row["settlement_version"])
    for name, made in versions.items():
        if name in keys and len(keys[name]) < len(made):
            yield Finding(
                "A02",
                f"{name[2]} was done as versions {sorted(made)} for the keys {sorted(keys[name])}",
                {"match_id": str(name[2]).split(":")[1], "settlement_version": max(made)},
            )


def asks_for(attempt: Attempt, entry: Entry, bets: dict[tuple[int, str | None], list[Row]]) -> bool:
    """Return whether a request asks for exactly this entry; what a bet reserves is judged elsewhere (A28).

    A stake without its bet row is torn (A13) and passes here, so that one bug has one name.
    """
    if attempt.op == "deposit":
        return (entry.type, entry.contra, entry.amount) == ("CREDIT", "EXTERNAL", attempt.amount)
    if attempt.op == "withdraw":
        asked = None if attempt.amount is None else -attempt.amount
        return (entry.type, entry.contra, entry.amount) == ("DEBIT", "EXTERNAL", asked)
    if (entry.type, entry.contra) != ("DEBIT", "ESCROW"):
        return False
    rows = bets.get((entry.user, entry.bet_id), [])
    if not rows:
        return True
    placed = tuple(rows[0][name] for name in ("match_id", "outcome", "side", "odds", "stake"))
    return placed == (attempt.match_id, attempt.selection, attempt.side, attempt.odds, attempt.amount)


def bets_by_place(case: Case) -> dict[tuple[int, str | None], list[Row]]:
    """Return (user, bet id) → bet rows."""
    found: dict[tuple[int, str | None], list[Row]] = {}
    for row in case.table("bets"):
        found.setdefault((row["user_id"], row["bet_id"]), []).append(row)
    return found


def a03_phantom(case: Case) -> Iterator[Finding]:
    """A03: an entry, or a settlement, that nobody asked for or that differs from everything that was asked."""
    bets = bets_by_place(case)
    for entry in case.client_entries:
        story = case.stories.get(("ledger", entry.user, entry.key))
        place = {"user": entry.user, "seq": entry.seq, "key": entry.key}
        if story is None:
            yield Finding("A03", f"nobody sent key {entry.key}, which seq {entry.seq} of user {entry.user} has", place)
        elif not any(asks_for(a, entry, bets) for a in story.attempts):
            yield Finding(
                "A03",
                f"seq {entry.seq} of user {entry.user} is {entry.type} {entry.amount}; no attempt of key {entry.key}"
                " asked for that",
                place,
            )
    settled = {(row["match_id"], row["settlement_version"]) for row in case.table("settlements")}
    cancelled = {row["bet_id"] for row in case.table("orders") if row["cancelled_stake"] > 0}
    for entry in case.system_entries:
        if not _founded(entry, bets, settled, cancelled):
            yield Finding(
                "A03",
                f"seq {entry.seq} of user {entry.user} ({entry.type} {entry.amount}, key {entry.key}) follows from no"
                " cancel or settlement of a bet of this wallet",
                {"user": entry.user, "seq": entry.seq, "key": entry.key},
            )
    yield from _unasked(case)


def _founded(
    entry: Entry,
    bets: dict[tuple[int, str | None], list[Row]],
    settled: set[tuple[str, int]],
    cancelled: set[str],
) -> bool:
    # Exactly the key such an entry has: ledger:KIND:bet:version.
    kind = entry.key.removeprefix(SYSTEM).split(":")[0]
    version = entry.version
    if version is None or entry.key != f"{SYSTEM}{kind}:{entry.bet_id}:{version}":
        return False
    if FORMS.get(kind) != (entry.type, entry.contra):
        return False
    rows = bets.get((entry.user, entry.bet_id), [])
    if not rows or rows[0]["match_id"] != entry.match_id:
        return False
    if version == 0:
        return kind == "REFUND" and entry.bet_id in cancelled
    if kind in CORRECTIONS and version < 2:
        return False
    return (entry.match_id, version) in settled


def _unasked(case: Case) -> Iterator[Finding]:
    """Find the settlements that no attempt asked for: the first by settle or void, later ones by resettle."""
    commands: dict[str | None, list[Attempt]] = {}
    for attempt in case.attempts:
        if attempt.family == "match":
            commands.setdefault(attempt.match_id, []).append(attempt)
    for row in distinct(case.table("settlements"), ("match_id", "settlement_version", "kind", "result")):
        of_match = commands.get(row["match_id"], [])
        if (row["settlement_version"] or 0) > 1:
            asked = [a for a in of_match if a.op == "resettle_match"]
            asked = [a for a in asked if (a.selection is None) == (row["kind"] == "VOID")]
        else:
            op = "void_match" if row["kind"] == "VOID" else "settle_match"
            asked = [a for a in of_match if a.op == op]
        # An attempt whose result was not recorded may have asked for this one.
        if not any(a.selection is None or a.selection == row["result"] for a in asked):
            yield Finding(
                "A03",
                f"nobody asked for {row['kind']} {row['result']} of match {row['match_id']}, version"
                f" {row['settlement_version']}",
                {"match_id": row["match_id"], "settlement_version": row["settlement_version"]},
            )


def a04_failed_but_applied(case: Case) -> Iterator[Finding]:
    """A04: a key that was only ever refused or not admitted has an effect, or holds an entry and a refusal."""
    there = effects(case)
    corrected = {_resettle(row) for row in case.table("settlements") if row["settlement_version"] > 1}
    first_only = {_resettle(row) for row in case.table("settlements")} - corrected
    for story in case.stories.values():
        # Matches close by themselves, and no resettle made true what the first settlement said.
        if story.fate != "MUST_NOT" or story.op == "close_match" or story.name in first_only:
            continue
        if story.name in there:
            yield Finding(
                "A04",
                f"all {len(story.attempts)} attempts of {story.op} with key {story.key} of user {story.user} failed,"
                f" yet it was applied (seq {there[story.name]})",
                {"user": story.user, "key": story.key},
            )
    refused = {(row["user_id"], row["idempotent_key"]): row["outcome"] for row in case.table("refusals")}
    for entry in case.client_entries:
        if (entry.user, entry.key) in refused:
            yield Finding(
                "A04",
                f"key {entry.key} of user {entry.user} holds seq {entry.seq} and the refusal"
                f" {refused[entry.user, entry.key]}",
                {"user": entry.user, "key": entry.key},
            )


def a05_replay_diverges(case: Case) -> Iterator[Finding]:
    """A05: two answers of a key contradict each other or its entry; or a 409 although there was no other body."""
    bets = bets_by_place(case)
    entries = _by_key(case)
    before = {("ledger", r["user_id"], r["idempotent_key"]) for r in rows_of(case.run.first, "ledger")}
    before |= {
        ("cancel", r["user_id"], r["idempotent_key"])
        for r in rows_of(case.run.first, "cancels")
        if r["outcome"] == "ACCEPTED"
    }
    rows_of_cancels: dict[KeyName, list[Row]] = {}
    for row in case.table("cancels"):
        rows_of_cancels.setdefault(("cancel", row["user_id"], row["idempotent_key"]), []).append(row)
    for story in case.stories.values():
        reasons: list[str] = []
        if story.family in ("ledger", "cancel"):
            reasons += _contradictions(story) + _wrongly_other(story)
            if case.run.second is not None and story.name in before:
                reasons += _late_originals(story)
        if story.family == "ledger":
            held = entries.get((story.user, story.key), [])
            reasons += _not_the_entry(story, held) + _mixed(story, held, bets)
        if story.family == "cancel" and story.fate == "MUST":
            first = min(story.oks, key=lambda a: (a.t_invoke, a.number))
            reasons += [
                f"it was acknowledged for bet {first.bet_id} and is stored for bet {row['bet_id']}"
                for row in rows_of_cancels.get(story.name, [])
                if None not in (first.bet_id, row["bet_id"]) and row["bet_id"] != first.bet_id
            ]
        for reason in reasons:
            yield Finding(
                "A05", f"key {story.key} of user {story.user}: {reason}", {"user": story.user, "key": story.key}
            )


def _by_key(case: Case) -> dict[tuple[int | None, str | None], list[Entry]]:
    found: dict[tuple[int | None, str | None], list[Entry]] = {}
    for entry in case.client_entries:
        found.setdefault((entry.user, entry.key), []).append(entry)
    return found


def _contradictions(story: Story) -> list[str]:
    found = []
    for name, values in (
        ("seqs", {a.seq for a in story.oks}),
        ("balances", {a.balance for a in story.oks}),
        ("bets", {a.answer.get("bet_id") for a in story.oks}),
        ("bodies", {a.body for a in story.oks}),
        ("refusals", {a.outcome for a in story.refusals}),
    ):
        if len(values - {None}) > 1:
            found.append(f"its answers name several {name}: {sorted(map(str, values))}")
    if story.oks and story.refusals:
        found.append("it was acknowledged and refused")
    if sum(a.replayed is False for a in story.oks) > 1:
        found.append("two acknowledgements claim to be the first")
    return found


def _not_the_entry(story: Story, entries: list[Entry]) -> list[str]:
    # A key with two entries is A02: which of them was acknowledged is not to be said.
    if len(entries) != 1:
        return []
    entry = entries[0]
    return [
        f"acknowledged with seq {a.seq} and balance {a.balance}; its entry is seq {entry.seq} with {entry.snapshot}"
        for a in story.oks
        if a.seq not in (None, entry.seq) or a.balance not in (None, entry.snapshot)
    ]


def _mixed(story: Story, entries: list[Entry], bets: dict[tuple[int, str | None], list[Row]]) -> list[str]:
    """Find entries that some attempt asked for, but none of those that were acknowledged."""
    return [
        f"seq {entry.seq} was applied with another body than the one acknowledged"
        for entry in entries
        if story.oks
        and not any(asks_for(a, entry, bets) for a in story.oks)
        and any(asks_for(a, entry, bets) for a in story.attempts)
    ]


def _late_originals(story: Story) -> list[str]:
    return [
        f"its retry at {a.t_invoke:.3f} s was answered as if it were the first; the first snapshot holds it"
        for a in story.oks
        if a.tag == FINAL_RETRY and a.replayed is False
    ]


def _wrongly_other(story: Story) -> list[str]:
    found = []
    for accused in story.attempts:
        if accused.status != OTHER_BODY:
            continue
        if not any(a.body != accused.body and a.t_invoke < accused.t_return for a in story.attempts):
            found.append(f"refused as another body at {accused.t_return:.3f} s; no other body had been sent")
    return found
