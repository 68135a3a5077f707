"""A14–A20: what clients saw, by looking at every pair of moments."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from invariants.judges.replay.case import NEVER, Attempt, Case, Entry, Finding

NOT_FOUND: Final = 404


def _of_read(code: str, read: Attempt, text: str) -> Finding:
    place = {"attempt": read.number, "user": read.user, "seq": read.seq}
    return Finding(code, f"read {read.number} of user {read.user} at {read.t_invoke:.3f} s {text}", place)


def a14_real_time_order(case: Case) -> Iterator[Finding]:
    """A14: a key that was first sent after another had been acknowledged has the smaller seq of the two."""
    for entry in case.client_entries:
        story = case.stories.get(("ledger", entry.user, entry.key))
        if story is None:
            continue
        begin_s = story.begin_s
        earlier = [other.seq for ack_s, other in case.acknowledged.get(entry.user, []) if ack_s < begin_s]
        if any(seq > entry.seq for seq in earlier):
            yield Finding(
                "A14",
                f"key {entry.key} of user {entry.user} has seq {entry.seq} and was first sent at {begin_s:.3f} s, when"
                f" seq {max(earlier)} had been acknowledged",
                {"user": entry.user, "seq": entry.seq, "key": entry.key},
            )


def a15_session(case: Case) -> Iterator[Finding]:
    """A15: an unflagged read shows less than its client had seen longer ago than the staleness bound."""
    sessions: dict[tuple[int, int], list[Attempt]] = defaultdict(list)
    for read in case.reads:
        sessions[read.client, read.user].append(read)
    for read in case.reads:
        horizon = read.t_invoke - case.stale_after_s
        seen = [other.seq for other in sessions[read.client, read.user] if other.t_return < horizon]
        if not read.stale and any(seq > read.seq for seq in seen):
            yield _of_read("A15", read, f"answered seq {read.seq} after its client {read.client} had seen {max(seen)}")


def a16_own_writes(case: Case) -> Iterator[Finding]:
    """A16: a read that named what it must know got less, unflagged, or no wallet at all."""
    for read in case.attempts:
        if read.op != "balance" or not read.min_seq or read.min_seq < 0:
            continue
        less = read.cls == "ok" and read.seq is not None and read.seq < read.min_seq and not read.stale
        if less or read.status == NOT_FOUND:
            yield _of_read("A16", read, f"asked for seq {read.min_seq} and got {read.seq} (status {read.status})")


def a17_too_stale(case: Case) -> Iterator[Finding]:
    """A17: an unflagged balance lacks what was acknowledged before the bound, or says itself that it is too old."""
    for read in case.reads:
        below = read.min_seq is not None and read.seq < read.min_seq
        if read.stale or read.source == "ledger" or below:
            continue  # Answers of the ledger are A18's, those below a `min_seq` A16's.
        horizon = read.t_invoke - case.stale_after_s
        known = _acknowledged_before(case, read.user, horizon)
        as_of_s = _as_of(case, read)
        if known > read.seq:
            yield _of_read(
                "A17", read, f"answered seq {read.seq}; {known} had been acknowledged before {horizon:.3f} s"
            )
        elif as_of_s is not None and as_of_s < horizon - case.clock_slack_s:
            yield _of_read("A17", read, f"is complete up to {as_of_s:.3f} s only, by its own word")


def _acknowledged_before(case: Case, user: int, moment: float) -> int:
    """Return the highest seq of a wallet acknowledged before a moment; 0 if there is none."""
    return max((entry.seq for ack_s, entry in case.acknowledged.get(user, []) if ack_s < moment), default=0)


def _as_of(case: Case, read: Attempt) -> float | None:
    """Return the moment of the run up to which an answer says it is complete; None if it does not say, or no clock."""
    origin = case.run.config.origin_unix
    return None if origin is None or read.as_of is None else read.as_of - origin


def ledger_reads(case: Case) -> list[tuple[Attempt, int]]:
    """Return the unflagged answers of the ledger that show a wallet's head, each with the newest seq it shows."""
    shown: list[tuple[Attempt, int | None]] = [(read, read.seq) for read in case.reads if read.source == "ledger"]
    for page in case.attempts:
        if page.op == "entries" and page.cls == "ok" and page.page_cut is False:
            # An empty page shows that there is nothing behind where it was to begin.
            shown.append((page, page.seq if page.seq is not None else page.after_seq))
    return [(read, seq) for read, seq in shown if seq is not None and not read.stale]


def _behind(case: Case) -> set[int]:
    """Return the attempts among `ledger_reads` that lack what had been acknowledged before them."""
    return {
        read.number for read, seq in ledger_reads(case) if _acknowledged_before(case, read.user, read.t_invoke) > seq
    }


def a18_dishonest_flag(case: Case) -> Iterator[Finding]:
    """A18: an answer is older than it says, or comes from elsewhere than was asked."""
    behind = _behind(case)
    for read, seq in ledger_reads(case):
        if read.number in behind:
            known = _acknowledged_before(case, read.user, read.t_invoke)
            yield _of_read("A18", read, f"names the ledger and seq {seq}; seq {known} had been acknowledged")
    for read in case.reads:
        as_of_s = _as_of(case, read)
        if as_of_s is not None and read.number not in behind:
            known = _acknowledged_before(case, read.user, as_of_s - case.clock_slack_s)
            if known > read.seq:
                text = f"answered seq {read.seq} as complete up to {as_of_s:.3f} s; {known} had been acknowledged"
                yield _of_read("A18", read, text)
        if read.strong and read.source != "ledger":
            yield _of_read("A18", read, f"asked for the ledger and was answered from {read.source}")


def a19_impossible_read(case: Case) -> Iterator[Finding]:
    """A19: a read showed a balance that the wallet never had at that seq, or a page has a gap."""
    had = {(entry.user, entry.seq, entry.snapshot) for entry in case.entries}
    for read in case.reads:
        if (read.seq, read.balance) != (0, 0) and (read.user, read.seq, read.balance) not in had:
            yield _of_read("A19", read, f"answered {read.balance} at seq {read.seq}, which never was")
    for page in case.attempts:
        if page.op != "entries" or page.cls != "ok" or not page.page_rows or page.page_rows < 0:
            continue
        if (page.user, page.seq, page.balance) not in had:
            yield _of_read("A19", page, f"ends with {page.balance} at seq {page.seq}, which never was")
        elif page.after_seq is not None and page.seq - page.after_seq != page.page_rows:
            yield _of_read("A19", page, f"has {page.page_rows} entries from behind {page.after_seq} to {page.seq}")


def a20_fractured(case: Case) -> Iterator[Finding]:
    """A20: an answer of the ledger ends inside a transaction, or lacks what had been seen, or committed with it."""
    behind, known = _behind(case), _known(case)
    members: dict[tuple[int, int], set[Transaction]] = defaultdict(set)
    for entry in case.entries:
        if (transaction := _transaction(entry)) is not None:
            members[entry.user, entry.seq].add(transaction)
    for read, seq in ledger_reads(case):
        if members[read.user, seq] & members[read.user, seq + 1]:
            yield _of_read("A20", read, f"showed seq {seq}; seq {seq + 1} was committed by the same transaction")
        elif read.number not in behind:
            seen = [other for at, other in known[read.user] if at < read.t_invoke]
            if any(other > seq for other in seen):
                yield _of_read("A20", read, f"showed seq {seq}; {max(seen)}, or what came with it, had been shown")


Transaction = tuple[str, int, float]
"""Server, transaction id and time: what the entries of one commit have in common."""


def _transaction(entry: Entry) -> Transaction | None:
    """Return the transaction of an entry; None where it is not recorded."""
    parts = (entry.row["server"], entry.row["xact"], entry.row["created_at"])
    return None if None in parts else parts


def _known(case: Case) -> dict[int, list[tuple[float, int]]]:
    """Return, by user, (moment, seq) of each entry: by when it is known to have been committed."""
    seen: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for user, told in case.acknowledged.items():
        seen[user] += [(ack_s, entry.seq) for ack_s, entry in told]
    for read in case.attempts:
        shows = read.family == "read" and read.cls == "ok" and read.seq is not None and read.seq > 0
        if shows and (read.user, read.seq) in case.places:
            seen[read.user].append((read.t_return, read.seq))
    # Who shows an entry shows all before it.
    alone = [
        (entry, min((at for at, seq in seen[entry.user] if seq >= entry.seq), default=NEVER)) for entry in case.entries
    ]
    together: dict[Transaction, float] = {}
    for entry, at in alone:
        if (transaction := _transaction(entry)) is not None:
            together[transaction] = min(at, together.get(transaction, NEVER))
    known: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for entry, at in alone:
        transaction = _transaction(entry)
        first = at if transaction is None else min(at, together[transaction])
        if first != NEVER:
            known[entry.user].append((first, entry.seq))
    return known
