"""The closed forms agree with published values, with each other and with their own limits."""

import math

import numpy as np
import pytest

from sim import networks, queueing


def test_md1_waits_half_as_long_as_mm1() -> None:
    assert queueing.mm1_mean_wait_s(80, 0.01) == pytest.approx(0.04)
    assert queueing.md1_mean_wait_s(80, 0.01) == pytest.approx(0.02)


def test_erlang_c_equals_its_textbook_sum() -> None:
    offered, servers = 6.4, 8
    tail = offered**servers / math.factorial(servers) / (1 - offered / servers)
    expected = tail / (sum(offered**n / math.factorial(n) for n in range(servers)) + tail)
    assert queueing.erlang_c(offered, servers) == pytest.approx(expected, rel=1e-12)


def test_erlang_c_of_two_servers_is_the_known_fraction() -> None:
    assert queueing.erlang_c(1.0, 2) == pytest.approx(1 / 3)


def test_one_server_of_mmc_is_mm1() -> None:
    assert queueing.erlang_c(0.7, 1) == pytest.approx(0.7)
    assert queueing.mmc_mean_wait_s(70, 0.01, 1) == pytest.approx(queueing.mm1_mean_wait_s(70, 0.01))


def test_erlang_c_of_a_thousand_servers_does_not_overflow() -> None:
    assert 0 < queueing.erlang_c(950, 1000) < 0.2


def test_laws_of_utilisation_and_of_little() -> None:
    assert queueing.utilisation(300, 0.01, 4) == pytest.approx(0.75)
    assert queueing.number_in_system(300, 0.01) == pytest.approx(3.0)


def test_a_writer_saturates_at_full_batches_back_to_back() -> None:
    assert queueing.batch_saturation_per_s(0.002, 0.00013, 256) == pytest.approx(256 / 0.03528)
    assert queueing.batch_saturation_per_s(0.002, 0.0, 1) == pytest.approx(500)


def test_group_commit_carries_ten_times_what_saturates_single_commits() -> None:
    with pytest.raises(ValueError, match="no steady state"):
        queueing.md1_mean_wait_s(500, 0.002)
    assert queueing.gated_batch_mean_latency_s(5000, 0.002, 0.0) == pytest.approx(0.003, rel=1e-3)


def test_a_rare_command_meets_an_idle_writer() -> None:
    assert queueing.gated_batch_mean_latency_s(0.001, 0.002, 0.0005) == pytest.approx(0.0025, rel=1e-4)


@pytest.mark.parametrize("rate", [100.0, 101.0, -1.0, math.nan, math.inf])
def test_a_load_without_steady_state_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="no steady state"):
        queueing.mm1_mean_wait_s(rate, 0.01)
    with pytest.raises(ValueError, match="no steady state"):
        queueing.mmc_mean_wait_s(rate, 0.01, 1)


@pytest.mark.parametrize(("rate", "fixed_s", "per_command_s"), [(0, 0.01, 0), (10, 0, 0), (1e6, 1, 0), (10, 0, 0.2)])
def test_batches_beyond_the_formula_are_refused(rate: float, fixed_s: float, per_command_s: float) -> None:
    with pytest.raises(ValueError, match=r"positive|frequent|steady"):
        queueing.gated_batch_mean_latency_s(rate, fixed_s, per_command_s)


def test_erlang_b_is_the_known_fraction_and_one_full_state_of_mmck() -> None:
    assert queueing.erlang_b(1.0, 2) == pytest.approx(1 / 5)
    assert queueing.erlang_b(5.0, 6) == pytest.approx(queueing.mmck(500, 0.01, 6, 6).lost)
    assert queueing.erlang_b(0.0, 3) == 0


def test_erlang_c_follows_from_erlang_b() -> None:
    blocked = queueing.erlang_b(6.4, 8)
    assert queueing.erlang_c(6.4, 8) == pytest.approx(blocked / (1 - 0.8 * (1 - blocked)))


def test_a_box_of_one_place_loses_what_finds_it_full() -> None:
    box = queueing.mmck(100, 0.01, 1, 1)
    assert box.lost == pytest.approx(0.5)
    assert box.queued == 0
    assert box.number == box.busy == pytest.approx(0.5)


def test_a_large_box_is_mmc() -> None:
    box = queueing.mmck(300, 0.01, 4, 2_000)
    assert box.lost == pytest.approx(0, abs=1e-12)
    assert box.queued / 300 == pytest.approx(queueing.mmc_mean_wait_s(300, 0.01, 4))


def test_an_overloaded_box_serves_at_full_speed() -> None:
    assert queueing.mmck(10_000, 0.01, 4, 500).throughput_per_s == pytest.approx(400)


def test_endless_patience_is_mmc_and_none_is_erlang_b() -> None:
    assert queueing.erlang_a(300, 0.01, 4, 100.0).queued / 300 == pytest.approx(
        queueing.mmc_mean_wait_s(300, 0.01, 4), rel=1e-3
    )
    assert queueing.erlang_a(500, 0.01, 6, 1e-9).lost == pytest.approx(queueing.erlang_b(5.0, 6), rel=1e-4)


def test_patience_of_one_service_makes_abandonment_a_delay_station() -> None:
    # With patience = service every customer leaves at the same rate, so that the number is Poisson.
    assert queueing.erlang_a(330, 0.01, 3, 0.01).number == pytest.approx(3.3)


def test_quantiles_of_waits_and_latencies() -> None:
    assert queueing.mm1_latency_quantile_s(70, 0.01, 50) == pytest.approx(math.log(2) * 0.01 / 0.3)
    wait_s = queueing.mmc_wait_quantile_s(300, 0.01, 4, 95)
    beyond = queueing.erlang_c(3.0, 4) * math.exp(-(400 - 300) * wait_s)
    assert beyond == pytest.approx(0.05)
    assert queueing.mmc_wait_quantile_s(10, 0.01, 4, 95) == 0
    with pytest.raises(ValueError, match="percentile"):
        queueing.mmc_wait_quantile_s(300, 0.01, 4, 100)


def test_pollaczek_khinchine_has_mm1_and_md1_as_cases() -> None:
    assert queueing.mg1_mean_wait_s(70, 0.01, 1.0) == pytest.approx(queueing.mm1_mean_wait_s(70, 0.01))
    assert queueing.mg1_mean_wait_s(70, 0.01, 0.0) == pytest.approx(queueing.md1_mean_wait_s(70, 0.01))


def test_processor_sharing_is_fair_to_short_customers() -> None:
    assert queueing.mg1_ps_mean_latency_s(60, 0.01) == pytest.approx(0.025)
    assert queueing.mg1_ps_mean_latency_s(60, 0.01, alone_s=0.002) == pytest.approx(0.005)


def test_numbers_of_an_endless_station_are_poisson() -> None:
    shares = [queueing.mginf_number_probability(300, 0.01, number) for number in range(60)]
    assert sum(shares) == pytest.approx(1)
    assert sum(number * share for number, share in enumerate(shares)) == pytest.approx(3)
    assert queueing.mginf_number_probability(0, 0.01, 0) == 1


def test_rare_short_breakdowns_are_nearly_mg1() -> None:
    almost = queueing.mg1_breakdowns_mean_latency_s(60, 0.01, 2.0, up_s=1e6, down_s=1e-6, down_scv=1.0)
    assert almost == pytest.approx(queueing.mg1_mean_wait_s(60, 0.01, 2.0) + 0.01, rel=1e-6)


def test_breakdowns_of_mm1_equal_the_priority_queue_of_white_and_christie() -> None:
    # The balance equations of (up or down, n customers), solved numerically.
    arrive, serve, fail, repair, most = 40.0, 100.0, 2.0, 10.0, 400
    flow = np.zeros((2 * most, 2 * most))
    for number in range(most):
        up, down = 2 * number, 2 * number + 1
        flow[up, down], flow[down, up] = fail, repair
        if number + 1 < most:
            flow[up, up + 2] = flow[down, down + 2] = arrive
        if number:
            flow[up, up - 2] = serve
    balance = (flow - np.diag(flow.sum(axis=1))).T
    balance[-1] = 1.0
    share = np.linalg.solve(balance, np.eye(2 * most)[-1])
    number = float(share @ (np.arange(2 * most) // 2))
    assert number / arrive == pytest.approx(
        queueing.mg1_breakdowns_mean_latency_s(arrive, 1 / serve, 1.0, up_s=1 / fail, down_s=1 / repair, down_scv=1.0),
        rel=1e-6,
    )


def test_breakdowns_that_leave_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match="steady state"):
        queueing.mg1_breakdowns_mean_latency_s(60, 0.01, 1.0, up_s=0.1, down_s=0.1, down_scv=1.0)


def test_traffic_of_a_network_is_what_enters_and_comes_back() -> None:
    rates = networks.traffic_per_s([10, 0], [[0.0, 0.5], [0.5, 0.0]])
    assert rates.tolist() == pytest.approx([40 / 3, 20 / 3])
    nodes = networks.jackson([10, 0], [[0.0, 0.5], [0.5, 0.0]], [0.01, 0.02], [1, 1])
    assert nodes[0].number == pytest.approx((40 / 300) / (1 - 40 / 300))
    assert networks.jackson_latency_s(nodes, [10, 0]) == pytest.approx((nodes[0].number + nodes[1].number) / 10)


@pytest.mark.parametrize(
    "routing", [[[0.0, 1.0], [1.0, 0.0]], [[0.6, 0.6], [0.0, 0.0]], [[-0.1, 0.0], [0.0, 0.0]], [[0.0, 0.0]]]
)
def test_routing_that_is_none_is_refused(routing: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"routing|shares"):
        networks.traffic_per_s([10, 10], routing)


def test_one_customer_of_a_closed_network_never_waits() -> None:
    alone = networks.closed_mva([0.01, 0.02], 1, think_s=0.07)
    assert alone.throughput_per_s == pytest.approx(10)
    assert alone.numbers == pytest.approx([0.1, 0.2])


def test_two_equal_stations_share_their_customers_as_the_product_form_says() -> None:
    # With n customers at two balanced stations the throughput is n / (n + 1) of what one can serve.
    for customers in (1, 2, 5, 20):
        found = networks.closed_mva([0.01, 0.01], customers)
        assert found.throughput_per_s == pytest.approx(100 * customers / (customers + 1))
        assert sum(found.numbers) == pytest.approx(customers)


def test_many_customers_of_a_closed_network_keep_its_bottleneck_busy() -> None:
    assert networks.closed_mva([0.01, 0.02], 2_000, think_s=1.0).throughput_per_s == pytest.approx(50, rel=1e-6)


def test_values_without_a_meaning_are_refused() -> None:
    for wrong in (
        lambda: queueing.erlang_b(-1, 2),
        lambda: queueing.mmck(100, 0.01, 4, 3),
        lambda: queueing.mmck(100, 0.01, 1, 10**7),
        lambda: queueing.erlang_a(100, 0.01, 1, 0),
        lambda: queueing.erlang_a(1e9, 0.01, 1, 1e3),
        lambda: queueing.mg1_mean_wait_s(60, 0.01, -1),
        lambda: queueing.mginf_number_probability(60, 0.01, -1),
        lambda: queueing.mg1_breakdowns_mean_latency_s(60, 0.01, 1.0, up_s=0.0, down_s=0.1, down_scv=1.0),
        lambda: networks.closed_mva([0.0], 3),
        lambda: networks.closed_mva([0.1], 0),
    ):
        with pytest.raises(ValueError, match=r"need|at most|must|more|and 1 ≤"):
            wrong()
