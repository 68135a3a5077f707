"""What only the service's own counters and the timeline can show, and what a campaign of runs adds up to."""

import json
from pathlib import Path

from click.testing import CliRunner
from honest_world import ORIGIN_UNIX_S, World, small_world
from later_bugs import primary, sample

from invariants.page import page
from invariants.sometimes import COUNTERS, never
from invariants.verdict import judge
from ledgerproof.cli import cli
from ledgerproof.sampler import parse_counters

AGAIN = "a consumer got an event again after a rebalance"
LOST = "a cache fill lost to a newer one"
FAILOVER = "failover promoted the standby"
DESIGNED = (
    "an info resolved as applied", "an info resolved as not applied", "a retry replayed",
    "same key raced on two API processes", "same key with another body refused",
    "commit succeeded and the answer was lost", "server killed between commit and answer", FAILOVER,
    "relay died between send and mark", AGAIN, "projection dropped a duplicate", "a stale read was flagged", LOST,
    "funds refused under contention", "settle and void raced", "a bet arrived while its match closed",
    "backlog over 10000 then drained", "two faults overlapped",
)  # fmt: skip


def shown(world: World, name: str) -> int:
    return judge(world.run()).sometimes[name]


def test_every_sometimes_of_the_design_is_counted() -> None:
    assert set(DESIGNED) <= set(COUNTERS)


def test_lost_cache_fills_are_those_of_the_doors_over_all_their_lives() -> None:
    world = small_world()
    sample(world, "cache_fills_lost_total", "api0", {1.0: 2.0, 2.0: 5.0, 3.0: 1.0})
    sample(world, "cache_fills_lost_total", "projector0", {1.0: 9.0})
    assert shown(world, LOST) == 6


def test_events_that_come_again_count_after_a_restart_or_a_rebalance_only() -> None:
    world = small_world()
    sample(world, "events_repeated_total", "matcher0", {1.0: 0.0, 2.0: 4.0})
    sample(world, "kafka_assignments_total", "matcher0", {1.0: 1.0, 2.0: 1.0})
    assert shown(world, AGAIN) == 0
    sample(world, "kafka_assignments_total", "matcher0", {3.0: 2.0})
    sample(world, "events_repeated_total", "matcher0", {2.9: 4.0, 4.0: 7.0})
    assert shown(world, AGAIN) == 3

    world = small_world()
    world.timeline.append({"t": 5.0, "kind": "process_death", "node": "projector0"})
    sample(world, "events_repeated_total", "projector0", {1.0: 8.0, 6.0: 2.0})
    assert shown(world, AGAIN) == 2
    # A record that was sent twice since then comes again by itself; one that was sent twice before does not matter.
    world.send(world.tables["outbox"][0] | {"created_at": ORIGIN_UNIX_S + 1.0})
    assert shown(world, AGAIN) == 2
    world.send(world.tables["outbox"][0] | {"created_at": ORIGIN_UNIX_S + 7.0})
    assert shown(world, AGAIN) == 1


def test_failover_is_another_member_that_becomes_primary() -> None:
    world = small_world()
    primary(world, "primary", 0.1, "pg0a", 1)
    assert shown(world, FAILOVER) == 0
    primary(world, "primary", 0.9, "pg0a", 2)
    assert shown(world, FAILOVER) == 0
    primary(world, "primary", 1.9, "pg0b", 3)
    assert shown(world, FAILOVER) == 1


def test_counters_of_a_process_are_summed_over_their_labels() -> None:
    text = b'# HELP x\nevents_repeated_total{group="matcher"} 3.0\ncache_fills_lost_total 2.0\n' + (
        b'kafka_assignments_total{group="a"} 1.0\nkafka_assignments_total{group="b"} 2.0\nother_total 9.0\n'
    )
    assert parse_counters(text) == {
        "events_repeated_total": 3.0,
        "cache_fills_lost_total": 2.0,
        "kafka_assignments_total": 3.0,
    }


def test_campaign_needs_each_of_them_in_one_run_at_least() -> None:
    first, second = dict.fromkeys(COUNTERS, 0), dict.fromkeys(COUNTERS, 1)
    assert never([first]) == list(COUNTERS)
    assert never([first, second]) == []
    assert never([first | {LOST: 2}, first], [LOST, AGAIN]) == [AGAIN]


def test_campaign_is_added_up_on_the_command_line(tmp_path: Path) -> None:
    folders = []
    for number, counts in enumerate(({LOST: 1}, {LOST: 2, AGAIN: 0})):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "verdict.json").write_text(json.dumps({"sometimes": counts}))
        folders.append(str(folder))
    call = CliRunner().invoke(cli, ["sometimes", *folders, "--require", LOST, "--json"], standalone_mode=False)
    assert (call.return_value, json.loads(call.stdout)) == (0, {"runs": 2, "sometimes": {LOST: 3}, "never": []})
    call = CliRunner().invoke(cli, ["sometimes", *folders], standalone_mode=False)
    assert call.return_value == 30
    assert "NEVER" in call.stdout
    (tmp_path / "run-0" / "verdict.json").unlink()
    call = CliRunner().invoke(cli, ["sometimes", *folders], standalone_mode=False)
    assert "has no verdict" in str(call.exception)


def test_page_of_the_anomalies_is_what_the_checks_say() -> None:
    stored = (Path(__file__).parents[2] / "docs" / "anomalies.md").read_text(encoding="utf-8")
    assert stored == page(), "write it again: python -m invariants.page > docs/anomalies.md"
