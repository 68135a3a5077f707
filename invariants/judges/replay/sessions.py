"""A14, A15, A16, A18, A19: what clients saw, by looking at every pair of moments."""

from collections.abc import Iterator

from invariants.judges.replay.case import Attempt, Case, Finding

NOT_FOUND: int = 404


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
    for read in case.reads:
        horizon = read.t_invoke - case.stale_after_s
        seen = [r.seq for r in case.reads if (r.client, r.user) == (read.client, read.user) and r.t_return < horizon]
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


def a18_dishonest_flag(case: Case) -> Iterator[Finding]:
    """A18: an unflagged read that says it comes from the ledger misses what had been acknowledged before it."""
    for read in case.reads:
        if read.source != "ledger" or read.stale:
            continue
        known = [entry.seq for ack_s, entry in case.acknowledged.get(read.user, []) if ack_s < read.t_invoke]
        if any(seq > read.seq for seq in known):
            yield _of_read("A18", read, f"names the ledger and seq {read.seq}; seq {max(known)} had been acknowledged")


def a19_impossible_read(case: Case) -> Iterator[Finding]:
    """A19: a read showed a balance that the wallet never had at that seq."""
    had = {(entry.user, entry.seq, entry.snapshot) for entry in case.entries}
    for read in case.reads:
        if (read.seq, read.balance) != (0, 0) and (read.user, read.seq, read.balance) not in had:
            yield _of_read("A19", read, f"answered {read.balance} at seq {read.seq}, which never was")
