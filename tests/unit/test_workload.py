"""The schedule: the same seed gives the same run plan, and its statistics are those it promises."""

import itertools

import numpy as np
import pytest

from ledgerproof import workload
from ledgerproof.workload import BEYOND_FUNDS_MINOR, CONTENDED_WALLETS, PER_BET, WALLETS, Kind, Schedule, draw

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return draw(seed=11, rate=500, duration_s=60)


def test_equal_seeds_draw_equal_schedules() -> None:
    assert draw(5, 200, 20).digest() == draw(5, 200, 20).digest()


def test_another_seed_draws_another_schedule() -> None:
    assert draw(5, 200, 20).digest() != draw(6, 200, 20).digest()


def test_arrivals_are_sorted_and_within_the_load(schedule: Schedule) -> None:
    assert (np.diff(schedule.t) >= 0).all()
    assert schedule.t[0] >= 0
    assert schedule.t[-1] < 60


def test_rate_counts_bets_that_ought_to_be_accepted(schedule: Schedule) -> None:
    # Poisson with mean 30,000: five standard deviations.
    assert abs(schedule.bets - 30_000) < 5 * np.sqrt(30_000)


def test_gaps_of_bets_are_exponential(schedule: Schedule) -> None:
    gaps = np.diff(schedule.t[np.isin(schedule.kind, (Kind.BET, Kind.RACE))])
    # The coefficient of variation of an exponential is 1; a paced schedule would have 0.
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)


def test_every_kind_occurs_about_as_often_as_promised(schedule: Schedule) -> None:
    for kind, share in PER_BET.items():
        count = int((schedule.kind == kind).sum())
        expected = 30_000 * share
        # A BALANCE may stand in for an arrival that found no earlier command to be about.
        assert count > 0
        assert abs(count - expected) < 6 * np.sqrt(expected) + 200, kind.name


def test_hot_wallets_take_more_bets_than_quiet_ones(schedule: Schedule) -> None:
    users = schedule.user[schedule.kind == Kind.BET]
    counts = np.sort(np.unique(users, return_counts=True)[1])[::-1]
    assert 0.04 < counts[0] / counts.sum() < 0.07
    assert counts[:20].sum() > 8 * counts[-200:].sum()


def test_users_are_valid_and_contended_wallets_are_apart(schedule: Schedule) -> None:
    lifecycle = np.isin(schedule.kind, workload.LIFECYCLE)
    contended = schedule.kind == Kind.CONTEND
    others = schedule.user[~lifecycle & ~contended]
    assert others.min() >= 1
    assert others.max() <= WALLETS
    apart = schedule.user[contended]
    assert apart.min() > WALLETS
    assert apart.max() <= WALLETS + CONTENDED_WALLETS


def test_bets_go_to_a_match_that_is_open_then(schedule: Schedule) -> None:
    for arrival in np.flatnonzero(np.isin(schedule.kind, (Kind.BET, Kind.RACE, Kind.BEYOND))):
        plan = schedule.matches[schedule.match[arrival]]
        assert plan.opens_s <= schedule.t[arrival] < plan.ends_s


def test_late_bets_go_to_a_match_that_ended(schedule: Schedule) -> None:
    late = np.flatnonzero(schedule.kind == Kind.LATE)
    assert len(late) > 0
    for arrival in late:
        assert schedule.matches[schedule.match[arrival]].ends_s <= schedule.t[arrival] - 1.0


def test_both_sides_and_all_outcomes_are_bet_on(schedule: Schedule) -> None:
    bets = schedule.kind == Kind.BET
    assert 0.45 < schedule.side[bets].mean() < 0.55
    assert set(schedule.selection[bets].tolist()) == {0, 1, 2}


def test_most_bets_can_be_matched(schedule: Schedule) -> None:
    # For one outcome of one match, a back at or below some lay's odds finds a partner.
    bets = (schedule.kind == Kind.BET) & (schedule.match == 3) & (schedule.selection == 0)
    backs = schedule.odds[bets & (schedule.side == 0)]
    lays = schedule.odds[bets & (schedule.side == 1)]
    assert (backs <= np.median(lays)).mean() > 0.3


def test_targets_are_earlier_commands_of_the_right_kind(schedule: Schedule) -> None:
    about = np.flatnonzero(schedule.target >= 0)
    assert set(schedule.kind[about].tolist()) == {Kind.CANCEL, Kind.RETRY, Kind.OTHER_BODY}
    ages = schedule.t[about] - schedule.t[schedule.target[about]]
    assert (ages >= workload.TARGET_AGE_S[0]).all()
    assert (ages <= workload.TARGET_AGE_S[1]).all()
    for arrival in about:
        allowed = workload.COMMANDS if schedule.kind[arrival] == Kind.RETRY else (Kind.BET,)
        assert schedule.kind[schedule.target[arrival]] in allowed


def test_each_match_is_created_closed_and_settled_once_in_order(schedule: Schedule) -> None:
    steps: dict[int, list[Kind]] = {}
    for arrival in np.flatnonzero(np.isin(schedule.kind, workload.LIFECYCLE)):
        steps.setdefault(int(schedule.match[arrival]), []).append(Kind(int(schedule.kind[arrival])))
    assert len(schedule.matches) > 100
    for match, kinds in steps.items():
        assert kinds == sorted(kinds), "create, then close, then settle or void"
        assert len(kinds) == len(set(kinds))
        plan = schedule.matches[match]
        assert Kind.VOID not in kinds or plan.void


def test_some_settled_matches_are_corrected_and_always_to_another_result() -> None:
    for seed in range(5):
        plans = draw(seed, 10, 60).matches
        corrected = [plan for plan in plans if plan.corrections]
        assert corrected
        assert not any(plan.void for plan in corrected)
        for plan in corrected:
            times = [plan.settles_s] + [at_s for at_s, _ in plan.corrections]
            results = [plan.result] + [result for _, result in plan.corrections]
            assert times == sorted(times)
            assert all(before != after for before, after in itertools.pairwise(results))
    assert any(len(plan.corrections) == 2 for plan in plans)


def test_a_short_run_corrects_a_match_too() -> None:
    for seed in range(20):
        plans = draw(seed, 10, 5, slots=2).matches
        assert any(plan.corrections for plan in plans) or all(plan.void for plan in plans)


def test_some_matches_are_void_and_some_of_those_were_never_closed() -> None:
    plans = [plan for seed in range(5) for plan in draw(seed, 10, 60).matches]
    void = [plan for plan in plans if plan.void]
    assert 0.05 < len(void) / len(plans) < 0.2
    assert any(plan.closes_first for plan in void)
    assert any(not plan.closes_first for plan in void)


def test_odds_and_stakes_are_within_the_rules(schedule: Schedule) -> None:
    bets = np.isin(schedule.kind, workload.BETTING)
    assert schedule.odds[bets].min() >= 101
    assert schedule.odds[bets].max() <= 100_000
    assert schedule.amount[bets].min() >= 1
    assert (schedule.amount[schedule.kind == Kind.BEYOND] == BEYOND_FUNDS_MINOR).all()


def test_every_wallet_is_opened_once_and_none_can_pay_a_beyond_bet(schedule: Schedule) -> None:
    users = [user for user, _ in schedule.seed_deposits]
    assert sorted(users) == list(range(1, WALLETS + 1))
    assert max(amount for _, amount in schedule.seed_deposits) < BEYOND_FUNDS_MINOR / 10


def test_command_bodies_say_what_the_columns_say(schedule: Schedule) -> None:
    arrival = int(np.flatnonzero(schedule.kind == Kind.BET)[7])
    command = schedule.command(arrival)
    assert command.path == f"/v1/wallets/{schedule.user[arrival]}/bets"
    assert command.body is not None
    body = workload.msgspec.json.decode(command.body)
    assert body["stake_minor"] == schedule.amount[arrival] == command.amount
    assert body["odds"] == schedule.odds[arrival] == command.odds
    assert body["side"] == command.side
    assert body["match_id"] == command.match_id
    assert command.key == f"w11-{arrival}"


def test_payload_hash_follows_the_body() -> None:
    one = workload.deposit(1, 100, "k")
    assert one.payload_hash == workload.deposit(1, 100, "other key").payload_hash
    assert one.payload_hash != workload.deposit(1, 101, "k").payload_hash
    assert one.payload_hash != workload.withdraw(1, 100, "k").payload_hash
    assert workload.balance(1, strong=True, min_seq=None).payload_hash is None


def test_lifecycle_commands_are_the_same_when_built_again() -> None:
    plan = draw(3, 10, 30)
    first = plan.lifecycle_command(Kind.CREATE, 0, 1_000_000.5)
    again = plan.lifecycle_command(Kind.CREATE, 0, 1_000_000.5)
    assert first == again
    assert first.payload_hash == again.payload_hash


@pytest.mark.parametrize(("rate", "duration_s"), [(0, 10), (-1, 10), (10, 0), (float("nan"), 10)])
def test_senseless_rates_and_durations_are_refused(rate: float, duration_s: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        draw(1, rate, duration_s)


def test_a_tiny_run_can_be_drawn() -> None:
    assert len(draw(1, 1, 1.0)) > 0


def test_a_bulk_is_bets_of_several_wallets_with_keys_of_their_own_and_one_key_twice(schedule: Schedule) -> None:
    arrival = int(np.flatnonzero(schedule.kind == Kind.BULK)[3])
    commands = schedule.bulk(arrival)
    assert [command.op for command in commands] == ["bet"] * workload.BULK_BETS + ["deposit", "withdraw", "bet"]
    assert commands[-1] == commands[0]
    assert len({command.key for command in commands}) == len(commands) - 1
    assert {command.user for command in commands} <= set(range(1, WALLETS + 1))
    items = workload.msgspec.json.decode(workload.bulk_body(commands))["commands"]
    assert items[0] == {
        "op": "bet",
        "user_id": commands[0].user,
        "key": commands[0].key,
    } | workload.msgspec.json.decode(commands[0].body or b"")
    with pytest.raises(ValueError, match="BET"):
        schedule.bulk(int(np.flatnonzero(schedule.kind == Kind.BET)[0]))
