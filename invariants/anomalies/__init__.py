"""The catalogue of anomalies: each code is one function whose docstring is its specification."""

from typing import Final

from invariants.anomalies import events, keys, recovery, refusals, sessions, settlement, validity, wallets, writers
from invariants.anomalies.common import Check, Found, Witness

__all__ = ["CHECKS", "Check", "Found", "Witness"]

_LIST: Final = (
    Check("A01", "lost", keys.a01_lost, True),
    Check("A02", "duplicate", keys.a02_duplicate, False),
    Check("A03", "phantom", keys.a03_phantom, True),
    Check("A04", "failed but applied", keys.a04_failed_but_applied, True),
    Check("A05", "replay diverges", keys.a05_replay_diverges, True),
    Check("A06", "overdraft", wallets.a06_overdraft, True),
    Check("A07", "negative", wallets.a07_negative, True),
    Check("A08", "wrong refusal", refusals.a08_wrong_refusal, True, older=("config.origin_unix", "matches.outcomes")),
    Check("A09", "broken chain", wallets.a09_broken_chain, False),
    Check("A10", "seq", wallets.a10_seq, True),
    Check("A11", "projection", events.a11_projection, True),
    Check("A12", "money", wallets.a12_money, True),
    Check("A13", "torn", settlement.a13_torn, True),
    Check("A14", "real-time order", sessions.a14_real_time_order, False),
    Check("A15", "session", sessions.a15_session, False),
    Check("A16", "own writes", sessions.a16_own_writes, False),
    Check("A17", "too stale", sessions.a17_too_stale, False, older=("history.as_of",)),
    Check("A18", "dishonest flag", sessions.a18_dishonest_flag, False, older=("history.as_of", "history.strong")),
    Check("A19", "impossible read", sessions.a19_impossible_read, True, older=("history.page_rows",)),
    Check("A20", "fractured", sessions.a20_fractured, False, older=("ledger.xact", "history.page_cut")),
    Check("A21", "event lost", events.a21_event_lost, True),
    Check("A22", "effect repeated", events.a22_effect_repeated, False),
    Check("A23", "event order", events.a23_event_order, False),
    Check("A24", "phantom event", events.a24_phantom_event, True, older=("outbox.created_at", "kafka.timestamp")),
    Check("A25", "event differs", events.a25_event_differs, False),
    Check("A26", "skipped", events.a26_skipped, True),
    Check("A27", "paid twice", settlement.a27_paid_twice, False),
    Check("A28", "paid wrong", settlement.a28_paid_wrong, True),
    Check("A29", "illegal transition", settlement.a29_illegal_transition, True),
    Check("A30", "escrow leak", wallets.a30_escrow_leak, True),
    # That no server claims a shard may be because its server was not read.
    Check("A31", "wrong shard", wallets.a31_wrong_shard, True),
    Check("A32", "zombie write", writers.a32_zombie_write, False, older=("routes.changed_at",)),
    Check("A33", "rewritten", wallets.a33_rewritten, True, older=("ledger.xact",)),
    Check("A34", "no recovery", recovery.a34_no_recovery, True),
    Check("A35", "blind reconciliation", recovery.a35_blind_reconciliation, True, older=("config.origin_unix",)),
    Check("V01", "vacuous", validity.v01_vacuous, True),
    Check("V02", "no unknown", validity.v02_no_unknown, True),
    Check("V03", "fault unmeasured", validity.v03_fault_unmeasured, True),
    Check("V04", "never", validity.v04_never, True),
    Check("V05", "incomplete reads", validity.v05_incomplete_reads, True),
    Check("V06", "recording", validity.v06_recording, True),
)

CHECKS: Final[dict[str, Check]] = {check.code: check for check in _LIST}
"""Every code this version decides, by code."""
