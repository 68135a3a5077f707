"""The scenarios in which planted bugs show; each is silent on the clean tree."""

from collections.abc import Awaitable, Callable
from typing import Final

from ledgerproof.mutants.floor import Floor
from ledgerproof.mutants.triggers import everyday, failures, moving, reading

Trigger = Callable[[Floor], Awaitable[None]]

TRIGGERS: Final[dict[str, Trigger]] = {
    function.__name__: function
    for function in (
        everyday.commands,
        everyday.matches,
        everyday.bulk,
        everyday.open_book,
        everyday.acknowledgements,
        everyday.contended,
        everyday.beyond_funds,
        everyday.late_bets,
        everyday.resettle_again,
        everyday.late_cancel,
        failures.lost_answers,
        failures.relay_killed,
        failures.relay_killed_in_outage,
        failures.slow_commit,
        failures.matcher_killed,
        failures.handlers_fail,
        failures.workers_restart,
        failures.settler_interrupted,
        failures.events_come_again,
        failures.late_relay,
        failures.server_killed,
        failures.nodes_broken,
        failures.drift_planted,
        reading.projection_stands_still,
        reading.cache_is_behind,
        reading.old_reads,
        reading.cache_fill_is_late,
        reading.cache_away,
        reading.payout_reads,
        moving.shard_moves,
    )
}
"""By name: scenarios that play on a Floor. Each opens wallets and places bets, so that no run is vacuous."""
