"""The closed forms agree with published values, with each other and with their own limits."""

import math

import pytest

from sim import queueing


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
