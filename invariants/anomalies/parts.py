"""How each check is done slice by slice: what its folds must see at once, and how their findings make the whole.

A code that is not here cannot be checked in a large run, which is then INVALID.
"""

from collections.abc import Callable
from typing import Final

from invariants.anomalies import (
    event_screen,
    events,
    keys,
    recovery,
    refusals,
    sessions,
    settlement,
    validity,
    wallets,
    writers,
)
from invariants.anomalies.common import Check, Found, Part, Scope, Summed
from invariants.run import Run

_WHOLE, _WALLET, _MATCH, _EVENTS = Scope.WHOLE, Scope.WALLET, Scope.MATCH, Scope.EVENTS


def _by(scope: Scope, *folds: Callable[[Run], Found]) -> tuple[Part, ...]:
    return tuple(Part(scope, fold) for fold in folds)


PARTS: Final[dict[str, tuple[Part | Summed, ...]]] = {
    "A01": _by(_WALLET, keys.a01_lost),
    "A02": (*_by(_WALLET, keys.repeated_entries), *_by(_MATCH, keys.repeated_corrections)),
    "A03": (*_by(_WALLET, keys.unasked_entries), *_by(_MATCH, keys.unfounded_system_entries, keys.unasked_settlements)),
    "A04": _by(_WALLET, keys.a04_failed_but_applied),
    "A05": _by(_WALLET, keys.a05_replay_diverges),
    "A06": _by(_WALLET, wallets.a06_overdraft),
    "A07": _by(_WALLET, wallets.a07_negative),
    "A08": _by(_WALLET, refusals.a08_wrong_refusal),
    "A09": _by(_WALLET, wallets.a09_broken_chain),
    "A10": _by(_WALLET, wallets.a10_seq),
    "A11": _by(_WALLET, events.a11_projection),
    "A12": (Summed(_WALLET, wallets.money, wallets.money_conserved), *_by(_MATCH, wallets.escrow_of_matches)),
    "A13": (*_by(_WALLET, settlement.torn_stakes), *_by(_MATCH, settlement.torn_fills)),
    "A14": _by(_WALLET, sessions.a14_real_time_order),
    "A15": _by(_WALLET, sessions.a15_session),
    "A16": _by(_WALLET, sessions.a16_own_writes),
    "A17": _by(_WALLET, sessions.a17_too_stale),
    "A18": _by(_WALLET, sessions.a18_dishonest_flag),
    "A19": _by(_WALLET, sessions.a19_impossible_read),
    "A20": (*_by(_WALLET, sessions.halves_shown), Summed(_WALLET, sessions.orders_seen, sessions.judge_orders)),
    "A21": _by(_EVENTS, events.a21_event_lost),
    "A22": _by(_MATCH, events.a22_effect_repeated),
    "A23": _by(_WALLET, events.a23_event_order),
    "A24": (*_by(_EVENTS, events.phantom_events), *_by(_WHOLE, event_screen.too_early)),
    "A25": _by(_EVENTS, events.a25_event_differs),
    "A26": (*_by(_WALLET, events.projection_behind), *_by(_EVENTS, events.bets_without_order)),
    "A27": _by(_MATCH, settlement.a27_paid_twice),
    "A28": _by(_MATCH, settlement.a28_paid_wrong),
    "A29": _by(_MATCH, settlement.a29_illegal_transition),
    "A30": _by(_MATCH, wallets.a30_escrow_leak),
    "A31": (
        *_by(_WHOLE, wallets.shard_owners),
        *_by(_WALLET, wallets.misplaced_wallets),
        *_by(_MATCH, wallets.misplaced_matches),
    ),
    "A32": _by(_WHOLE, writers.a32_zombie_write),
    "A33": _by(_WALLET, wallets.a33_rewritten),
    "A34": (Summed(_WALLET, recovery.errors_told, recovery.judge_errors), *_by(_WHOLE, recovery.backlogs)),
    "A35": _by(_WHOLE, recovery.a35_blind_reconciliation),
    "V01": (Summed(_WALLET, validity.told, validity.judge_vacuous),),
    "V02": (Summed(_WALLET, validity.told, validity.judge_unknown),),
    "V03": _by(_WHOLE, validity.v03_fault_unmeasured),
    "V04": _by(_WHOLE, validity.v04_never),
    "V05": (Summed(_WALLET, validity.reads_told, validity.judge_reads),),
    "V06": (
        *_by(_WHOLE, validity.recording_problems, validity.numbers_left_out),
        *_by(_WALLET, validity.broken_records),
    ),
}


def parts_of(check: Check) -> tuple[Part | Summed, ...]:
    """Return the folds that find the same as the check, slice by slice; none for a check that cannot be cut."""
    return PARTS.get(check.code, ())
