"""The autoscalers do what their documentation says: every expected number here is worked out by hand."""

import math

import pytest

from sim.autoscaler import (
    Behaviour,
    HpaState,
    KafkaTrigger,
    KedaObject,
    KedaState,
    Pod,
    ScalingPolicy,
    ScalingRules,
    StepRule,
    average_value_desired,
    combined,
    cpu_counts,
    decide,
    kafka_active,
    kafka_metric,
    keda_step,
    pods_desired,
    rate_limit,
    step_desired,
    value_desired,
)

FREE = ScalingRules((ScalingPolicy("Percent", 10_000),))
"""A direction that nothing slows."""


def pods(*usages: float | None, unready: int = 0) -> list[Pod]:
    return [*(Pod(usage) for usage in usages), *[Pod(None, ready=False)] * unready]


# --- desired = ceil(current × metric / target) ------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "desired"),
    [
        (0.7, 4),  # on target
        (0.77, 4),  # ratio 1.1: the border of the tolerance is within it
        (0.7701, 5),  # just beyond: ceil(4 × 1.1001)
        (0.63, 4),  # ratio 0.9
        (0.6299, 4),  # beyond, but ceil(4 × 0.8999) = 4 all the same
        (0.5, 3),  # ceil(4 × 0.714) = ceil(2.86)
        (1.4, 8),
        (0.0, 0),  # bounds are applied later
    ],
)
def test_four_pods_with_a_target_of_70_percent(usage: float, desired: int) -> None:
    assert pods_desired(4, pods(*[usage] * 4), 0.7) == desired


def test_a_ratio_that_divides_evenly_is_not_rounded_up_by_floating_point() -> None:
    # 3 × 0.3 / 0.1 is 9.000000000000002 in floating point.
    assert 3 * (0.3 / 0.1) != 9
    assert pods_desired(3, pods(0.3, 0.3, 0.3), 0.1) == 9


def test_pods_that_are_not_ready_count_as_idle_when_the_others_say_up() -> None:
    # Ready: 2 pods at 1.4, ratio 2. With 2 idle ones: 2.8 / 4 / 0.7 = 1, so nothing changes.
    assert pods_desired(4, pods(1.4, 1.4, unready=2), 0.7) == 4
    # One idle: 2.8 / 3 / 0.7 = 1.333; ceil(1.333 × 3) = 4.
    assert pods_desired(3, pods(1.4, 1.4, unready=1), 0.7) == 4


def test_pods_that_are_not_ready_are_left_out_when_the_others_say_down() -> None:
    # Ratio 0.5 over 2 ready pods: ceil(0.5 × 2) = 1, whatever still starts.
    assert pods_desired(5, pods(0.35, 0.35, unready=3), 0.7) == 1


def test_a_missing_sample_counts_as_the_whole_target_downwards_and_as_nothing_upwards() -> None:
    # Down: (0.35 + 0.35 + 0.7) / 3 / 0.7 = 0.667; ceil(0.667 × 3) = 2 instead of 1.
    assert pods_desired(3, pods(0.35, 0.35, None), 0.7) == 2
    # Up: (1.4 + 1.4 + 0) / 3 / 0.7 = 1.333; ceil(1.333 × 3) = 4 instead of 6.
    assert pods_desired(3, pods(1.4, 1.4, None), 0.7) == 4
    # Exactly on target, a missing sample says nothing.
    assert pods_desired(3, pods(0.7, 0.7, None), 0.7) == 3


def test_a_guess_that_turns_the_direction_changes_nothing() -> None:
    # Ratio 1.2 of one pod; with four idle ones 0.24, which would remove: no.
    assert pods_desired(5, pods(0.84, unready=4), 0.7) == 5


def test_without_any_sample_nothing_is_known() -> None:
    assert pods_desired(3, pods(None, None, unready=1), 0.7) is None
    assert pods_desired(0, [], 0.7) is None


def test_a_value_for_all_pods_scales_the_ready_ones_and_starts_from_zero() -> None:
    assert value_desired(4, 4, 150.0, 100.0) == 6
    assert value_desired(4, 3, 150.0, 100.0) == 5
    assert value_desired(4, 4, 110.0, 100.0) == 4
    assert value_desired(0, 0, 250.0, 100.0) == 3
    assert value_desired(0, 0, 0.0, 100.0) == 0


def test_a_total_is_shared_by_the_pods_it_asks_for() -> None:
    assert average_value_desired(4, 1000.0, 100.0) == 10
    assert average_value_desired(10, 1100.0, 100.0) == 10
    assert average_value_desired(10, 1101.0, 100.0) == 12
    assert average_value_desired(10, 899.0, 100.0) == 9
    assert average_value_desired(0, 5.0, 100.0) == 1


def test_the_largest_of_several_metrics_counts_and_an_unknown_one_forbids_only_down() -> None:
    assert combined(5, [3, 7, 6]) == 7
    assert combined(5, [3, None]) is None
    assert combined(5, [8, None]) == 8
    assert combined(5, [None]) is None


def test_a_young_pod_counts_once_a_whole_sample_lies_after_it_was_ready() -> None:
    def young(sample_s: float, *, ready: bool = True) -> bool:
        return cpu_counts(100, 50, ready=ready, changed_s=60, sample_s=sample_s)

    assert not young(89.9)
    assert young(90)
    assert not young(95, ready=False)


def test_an_old_pod_counts_unless_it_was_never_ready() -> None:
    assert cpu_counts(400, 50, ready=True, changed_s=60, sample_s=0)
    assert not cpu_counts(400, 50, ready=False, changed_s=55, sample_s=399)
    assert cpu_counts(400, 50, ready=False, changed_s=350, sample_s=399), "it was ready, and is ill only now"


# --- bounds, windows and policies -------------------------------------------------------------------------


def test_an_autoscaler_of_zero_pods_is_off_unless_its_minimum_is_zero() -> None:
    assert decide(Behaviour(min_replicas=1), HpaState(), 0, 0, 7) == 0
    assert decide(Behaviour(min_replicas=0), HpaState(), 0, 0, 3) == 3


def test_a_count_outside_the_bounds_goes_to_them_at_once() -> None:
    assert decide(Behaviour(min_replicas=10, max_replicas=20), HpaState(), 0, 2, None) == 10
    assert decide(Behaviour(min_replicas=1, max_replicas=20), HpaState(), 0, 50, 60) == 20


def test_an_unknown_proposal_changes_nothing() -> None:
    assert decide(Behaviour(), HpaState(), 0, 5, None) == 5


def test_bounds_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="max_replicas"):
        Behaviour(min_replicas=5, max_replicas=4)


def test_defaults_double_or_add_four_in_15_s_whichever_is_more() -> None:
    behaviour, state = Behaviour(max_replicas=100), HpaState()
    assert decide(behaviour, state, 0, 1, 100) == 5, "1 + 4"
    assert decide(behaviour, state, 5, 5, 100) == 5, "within the 15 s the 4 are used up; 1 × 2 is less"
    assert decide(behaviour, state, 15, 5, 100) == 10
    assert decide(behaviour, state, 30, 10, 100) == 20


def test_defaults_remove_only_after_five_minutes_below_and_then_all_at_once() -> None:
    behaviour, state = Behaviour(), HpaState()
    current = 20
    assert decide(behaviour, state, 0, current, 20) == 20
    for now in range(15, 300, 15):
        assert decide(behaviour, state, now, current, 4) == 20
    assert decide(behaviour, state, 300, current, 4) == 4, "the 20 of second 0 has left the window"


def test_the_highest_recommendation_of_the_window_holds_down_scaling() -> None:
    behaviour, state = Behaviour(), HpaState()
    for now, proposal, after in (
        (0, 9, 9),
        (60, 7, 9),
        (120, 8, 9),
        (180, 3, 9),
        (301, 3, 8),
        (361, 3, 8),
        (421, 3, 3),
    ):
        assert decide(behaviour, state, now, 9 if now < 361 else 8, proposal) == after, now


def test_the_lowest_recommendation_of_the_window_holds_up_scaling() -> None:
    up = ScalingRules(FREE.policies, stabilisation_s=60)
    behaviour, state = Behaviour(up=up), HpaState()
    assert decide(behaviour, state, 0, 4, 4) == 4
    assert decide(behaviour, state, 15, 4, 9) == 4
    assert decide(behaviour, state, 45, 4, 7) == 4
    assert decide(behaviour, state, 60, 4, 12) == 7, "9, 7 and 12 are left"


def test_a_percent_policy_rounds_so_that_it_reaches_further() -> None:
    up = Behaviour(up=ScalingRules((ScalingPolicy("Percent", 10, 60),)))
    assert decide(up, HpaState(), 0, 5, 50) == 6, "5.5 upwards"
    down = Behaviour(down=ScalingRules((ScalingPolicy("Percent", 10, 60),)))
    assert decide(down, HpaState(), 0, 15, 1) == 13, "13.5 downwards"


def test_a_policy_of_pods_counts_what_its_own_period_has_seen() -> None:
    behaviour = Behaviour(up=ScalingRules((ScalingPolicy("Pods", 4, 60),)))
    state = HpaState()
    assert decide(behaviour, state, 0, 10, 50) == 14
    assert decide(behaviour, state, 30, 14, 50) == 14
    assert decide(behaviour, state, 59, 14, 50) == 14
    assert decide(behaviour, state, 60, 14, 50) == 18


@pytest.mark.parametrize(("select", "up", "down"), [("Max", 30, 8), ("Min", 24, 16), ("Disabled", 20, 20)])
def test_overlapping_policies_are_selected_by_their_change(select: str, up: int, down: int) -> None:
    # 20 pods: +4 → 24, +50 % → 30; −4 → 16, −60 % → 8.
    rising = ScalingRules((ScalingPolicy("Pods", 4), ScalingPolicy("Percent", 50)), select)  # type: ignore[arg-type]
    falling = ScalingRules((ScalingPolicy("Pods", 4), ScalingPolicy("Percent", 60)), select)  # type: ignore[arg-type]
    assert rate_limit(rising, HpaState(), 0, 20, up=True) == up
    assert rate_limit(falling, HpaState(), 0, 20, up=False) == down
    assert decide(Behaviour(up=rising, down=falling), HpaState(), 0, 20, 90) == up
    assert decide(Behaviour(up=rising, down=falling), HpaState(), 0, 20, 1) == down


def test_policies_with_different_periods_each_look_back_over_their_own() -> None:
    # 6 pods were added 40 s ago: of a 30 s policy nothing is used, of a 60 s policy 6.
    state = HpaState(added=[(60, 6)])
    rules = ScalingRules((ScalingPolicy("Pods", 2, 30), ScalingPolicy("Pods", 10, 60)), "Max")
    assert rate_limit(rules, state, 100, 16, up=True) == 20, "16 + 2 = 18, and 10 + 10 = 20"
    assert rate_limit(ScalingRules(rules.policies, "Min"), state, 100, 16, up=True) == 18


def test_what_was_removed_within_the_period_may_come_back() -> None:
    state = HpaState(removed=[(95, 5)])
    rules = ScalingRules((ScalingPolicy("Pods", 1, 15),))
    assert rate_limit(rules, state, 100, 10, up=True) == 16, "15 pods at the period's beginning, and one"


def test_memory_stays_bounded() -> None:
    state, behaviour = HpaState(), Behaviour()
    current = 10
    for step in range(2000):
        current = decide(behaviour, state, step * 15.0, current, 10 + step % 5)
    assert len(state.recommendations) <= 300 / 15 + 1
    assert len(state.added) <= 1
    assert len(state.removed) <= 1


# --- the seed's HPA ---------------------------------------------------------------------------------------


def test_memory_that_does_not_fall_with_load_pins_the_seeds_hpa_at_its_count() -> None:
    # 80 % asked, 74 % held whether busy or idle: ratio 0.925 is within the tolerance, so memory proposes what there
    # is, and the largest proposal counts.
    behaviour, state = Behaviour(min_replicas=10, max_replicas=100), HpaState()
    current = 60
    for step in range(200):
        idle_cpu = pods_desired(current, [Pod(0.05)] * current, 0.7)
        held = pods_desired(current, [Pod(0.74)] * current, 0.8)
        assert idle_cpu is not None
        assert idle_cpu < 10
        current = decide(behaviour, state, step * 15.0, current, combined(current, [idle_cpu, held]))
    assert current == 60


def test_memory_above_its_target_drives_the_seeds_hpa_to_its_maximum() -> None:
    behaviour, state = Behaviour(min_replicas=10, max_replicas=100), HpaState()
    current = 10
    for step in range(20):
        held = pods_desired(current, [Pod(0.9)] * current, 0.8)
        current = decide(behaviour, state, step * 15.0, current, held)
    assert current == 100


# --- KEDA -------------------------------------------------------------------------------------------------


def test_lag_is_cut_to_what_the_partitions_can_share() -> None:
    trigger = KafkaTrigger(lag_threshold=10)
    assert kafka_metric(trigger, 95, 10, 10) == 95
    assert kafka_metric(trigger, 5000, 10, 3) == 100
    assert kafka_metric(KafkaTrigger(10, allow_idle_consumers=True), 5000, 10, 3) == 5000
    assert kafka_metric(KafkaTrigger(10, limit_to_partitions_with_lag=True), 5000, 10, 3) == 30
    both = KafkaTrigger(10, allow_idle_consumers=True, limit_to_partitions_with_lag=True)
    assert kafka_metric(both, 5000, 10, 3) == 30


def test_whole_division_lets_one_replica_more_than_partitions_through() -> None:
    trigger = KafkaTrigger(lag_threshold=10)
    assert kafka_metric(trigger, 109, 10, 10) == 109
    assert average_value_desired(5, kafka_metric(trigger, 109, 10, 10), 10) == 11
    assert kafka_metric(trigger, 110, 10, 10) == 100


def test_keda_activates_above_its_threshold_and_only_when_it_polls() -> None:
    scaled, state = KedaObject(polling_interval_s=30), KedaState()
    trigger = KafkaTrigger(lag_threshold=10, activation_lag_threshold=50)
    assert keda_step(scaled, state, 0, 0, [5], active=kafka_active(trigger, 50)) == 0, "50 is not above 50"
    assert keda_step(scaled, state, 15, 0, [6], active=kafka_active(trigger, 51)) == 0, "not yet polled"
    assert keda_step(scaled, state, 30, 0, [6], active=kafka_active(trigger, 51)) == 1
    assert keda_step(scaled, state, 45, 1, [6], active=True) == 5, "from one on it is an HPA: 1 + 4"


def test_keda_goes_to_zero_after_its_cooldown_and_never_below_its_minimum() -> None:
    scaled, state = KedaObject(cooldown_s=300), KedaState()
    assert keda_step(scaled, state, 0, 1, [1], active=True) == 1
    for now in range(15, 300, 15):
        assert keda_step(scaled, state, now, 1, [0], active=False) == 1
    assert keda_step(scaled, state, 300, 1, [0], active=False) == 0
    floor, state = KedaObject(min_replicas=2), KedaState()
    assert keda_step(floor, state, 0, 0, [0], active=False) == 2
    assert keda_step(floor, state, 1e6, 2, [0], active=False) == 2


def test_keda_of_a_busy_group_stops_at_its_maximum() -> None:
    scaled, state = KedaObject(max_replicas=50), KedaState()
    trigger, current = KafkaTrigger(lag_threshold=1000), 1
    for step in range(20):
        told = kafka_metric(trigger, 10_000_000, 100, 100)
        current = keda_step(
            scaled, state, step * 15.0, current, [average_value_desired(current, told, 1000)], active=True
        )
    assert current == 50


# --- the seed's steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "lag", "after"),
    [
        (20, 1_000_000, 20),
        (20, 1_000_001, 25),
        (48, 5e6, 50),
        (50, 5e7, 50),
        (20, 100_000, 20),
        (20, 99_999, 19),
        (1, 0, 1),
        (20, 500_000, 20),
    ],
)
def test_the_seeds_steps(current: int, lag: float, after: int) -> None:
    assert step_desired(StepRule(), current, lag) == after


def test_the_seeds_steps_have_no_count_at_which_they_rest() -> None:
    # Whatever the load, a group that keeps up has little lag and loses a member, until it does not keep up.
    lag_when_keeping_up = 0.0
    assert all(step_desired(StepRule(), members, lag_when_keeping_up) < members for members in range(2, 51))


def test_infinite_lag_is_no_trouble() -> None:
    assert step_desired(StepRule(), 3, math.inf) == 8
