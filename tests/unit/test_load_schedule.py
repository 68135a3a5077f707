"""The schedule of a load: drawn from the seed alone, split without loss, Poisson, and read from strict profiles."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from load.options import stages_of
from load.profiles import ProfileError, read_profile, read_profiles
from load.schedule import ALL_OPERATIONS, Schedule, Stage, draw, expected_before, from_times, match_ids, phase_spans
from load.statistics import exponential_ks
from load.traces import TraceError, read_trace, spans_of

STAGES = [
    Stage("up", 20.0, 0.0, 400.0, {"bet": 3, "balance": 1}),
    Stage("flat", 20.0, 400.0, 400.0, {"bet": 1}),
    Stage("down", 20.0, 400.0, 50.0, {"deposit": 1}, settle_share=0.5),
]


def schedule(seed: int = 7) -> Schedule:
    return draw(seed, STAGES, wallets=100, matches=10, hot_share=0.3)


def test_the_seed_alone_decides_the_schedule() -> None:
    assert schedule().digest() == schedule().digest()
    assert schedule().digest() != schedule(8).digest()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shares_of_any_number_of_workers_are_the_whole_schedule(count: int) -> None:
    whole = schedule()
    parts = [whole.share(index, count) for index in range(count)]
    assert sum(map(len, parts)) == len(whole)
    assert sorted(np.concatenate([part.number for part in parts])) == list(range(len(whole)))
    for index, part in enumerate(parts):
        assert set(part.number % count) <= {index}
    rows = sorted((row for part in parts for row in part.arrivals()), key=lambda row: row.number)
    assert rows == list(whole.arrivals())


def test_there_is_no_worker_beyond_the_last() -> None:
    with pytest.raises(ValueError, match="no worker 2 of 2"):
        schedule().share(2, 2)


def test_times_ascend_and_stay_in_their_stage() -> None:
    whole = schedule()
    assert (np.diff(whole.t) >= 0).all()
    for number, (phase, start_s, end_s) in enumerate(phase_spans(STAGES)):
        inside = whole.t[whole.phase == number]
        assert (inside >= start_s - 0.5).all(), phase
        assert (inside < end_s).all(), phase


@pytest.mark.parametrize("rates", [(400.0, 400.0), (0.0, 400.0), (400.0, 30.0)])
@pytest.mark.parametrize("seed", range(3))
def test_gaps_are_those_of_a_poisson_process(rates: tuple[float, float], seed: int) -> None:
    stage = Stage("s", 30.0, *rates, {"bet": 1})
    drawn = draw(seed, [stage], wallets=1, matches=1)
    expected = 30.0 * sum(rates) / 2
    assert abs(len(drawn) - expected) < 5 * expected**0.5
    # In units of its expected number of arrivals, any Poisson process has unit exponential gaps.
    _, p_value = exponential_ks(np.diff(expected_before(stage, drawn.t)))
    assert p_value > 0.01


def test_equal_gaps_are_no_poisson_process() -> None:
    assert exponential_ks(np.ones(200))[1] < 1e-6
    assert exponential_ks(np.random.default_rng(1).exponential(1.1, 20_000))[1] < 0.01


def test_operations_fall_by_weight_and_the_hot_wallet_takes_its_share() -> None:
    whole = schedule()
    up = whole.op[whole.phase == 0]
    assert abs((up == ALL_OPERATIONS.index("bet")).mean() - 0.75) < 0.03
    assert abs((whole.wallet == 0).mean() - (0.3 + 0.7 * 0.09)) < 0.05
    assert whole.wallet.max() < 100


def test_a_share_of_the_matches_is_closed_and_then_settled_once() -> None:
    ends = [row for row in schedule().arrivals() if row.op in {"close", "settle"}]
    assert Counter(row.op for row in ends) == {"close": 5, "settle": 5}
    for match in {row.match for row in ends}:
        close, settle = sorted((row for row in ends if row.match == match), key=lambda row: row.due_s)
        assert (close.op, settle.op) == ("close", "settle")
        assert settle.due_s - close.due_s > 0.4


def test_given_times_are_played_as_they_are() -> None:
    times = np.array([0.0, 0.5, 0.5, 2.0])
    drawn = from_times(1, times, {"bet": 1}, wallets=3, matches=2)
    assert drawn.t.tolist() == times.tolist()
    assert drawn.phases == ("trace",)
    with pytest.raises(ValueError, match="ascend"):
        from_times(1, np.array([1.0, 0.0]), {"bet": 1})


def test_match_ids_follow_from_the_name_of_their_world() -> None:
    assert match_ids("a", 4) == match_ids("a", 5)[:4]
    assert len({*match_ids("a", 4), *match_ids("b", 4)}) == 8


@pytest.mark.parametrize(
    "stage",
    [
        Stage("s", 0.0, 1.0, 1.0, {"bet": 1}),
        Stage("s", 1.0, -1.0, 1.0, {"bet": 1}),
        Stage("s", 1.0, 1.0, float("nan"), {"bet": 1}),
        Stage("s", 1.0, 1.0, 1.0, {"bets": 1}),
        Stage("s", 1.0, 1.0, 1.0, {"bet": 0}),
    ],
)
def test_what_cannot_be_drawn_is_refused(stage: Stage) -> None:
    with pytest.raises(ValueError, match=r"stage|operation|weights"):
        draw(1, [stage], wallets=1, matches=1)


# --- traces ---------------------------------------------------------------------------------------------------

TRACE = """time_s,op,phase,user,match,selection,side,odds,amount_minor
0,deposit,before,7,,,,,500
0.5,bet,before,7,final,AWAY,LAY,310,20
0.5,balance,after,9223372036854775807,,,,,
2,bet,after,8,01928c1e-0d0c-7000-8000-000000000001,HOME,BACK,150,30
"""


def test_a_trace_is_played_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    schedule, ids = read_trace(file, "world", time_factor=2.0)
    rows = list(schedule.arrivals())
    assert [(row.due_s, row.op, row.phase, row.wallet) for row in rows] == [
        (0.0, "deposit", "before", 7),
        (1.0, "bet", "before", 7),
        (1.0, "balance", "after", 2**63 - 1),
        (4.0, "bet", "after", 8),
    ]
    assert (rows[1].selection, rows[1].side, rows[1].odds, rows[1].amount_minor) == ("AWAY", "LAY", 310, 20)
    assert ids[rows[3].match] == "01928c1e-0d0c-7000-8000-000000000001"
    assert ids[rows[1].match] in match_ids("world", 3)
    assert spans_of(schedule) == [("before", 0.0, 1.0), ("after", 1.0, 4.0)]
    assert read_trace(file, "world")[0].digest() == read_trace(file, "world")[0].digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("time_s", "time"), r"unknown columns \['time'\], missing columns \['time_s'\]"),
        (("0.5,bet", "0.5,bets"), "line 3"),
        (("\n2,", "\n0.4,"), "line 5: times ascend"),
        (("310", "3"), "line 3: user, amount_minor or odds"),
        (("\n2,", "\nnan,"), "line 5: time_s"),
        (("AWAY", "NOBODY"), "line 3"),
    ],
)
def test_a_wrong_trace_is_refused_with_its_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE.replace(*change))
    with pytest.raises(TraceError, match=message):
        read_trace(file, "world")


# --- profiles ---------------------------------------------------------------------------------------------


def test_every_profile_can_be_drawn() -> None:
    profiles = read_profiles()
    assert set(profiles) >= {
        *("smoke", "steady", "match_day", "hot_wallet", "payout_burst", "soak", "sessions", "knee"),
    }
    for name, profile in profiles.items():
        stages = profile.drawn_stages(time_factor=0.05)
        assert len(profile.schedule(1, stages)) > 0, name


def test_sessions_are_users_by_think_time() -> None:
    stage = read_profile("sessions").stages[1]
    assert (stage.users, stage.think_time_s, stage.rates()) == (100_000, 100, (1000.0, 1000.0))


def test_the_payout_burst_of_a_match_day_is_thirty_times_the_quiet_rate() -> None:
    stages = {stage.phase: stage for stage in read_profile("match_day").drawn_stages()}

    def withdrawals_per_s(phase: str) -> float:
        stage = stages[phase]
        return stage.rate_from * stage.mix["withdraw"] / sum(stage.mix.values())

    assert withdrawals_per_s("payouts") == pytest.approx(30 * withdrawals_per_s("quiet"))


def test_without_grpc_its_bets_go_over_http() -> None:
    profile = read_profile("steady")
    both = [stages_of(profile, rate_factor=1, time_factor=1, rate=None, grpc=grpc)[1].mix for grpc in (True, False)]
    assert "grpc_bet" not in both[1]
    assert both[1]["bet"] == both[0]["bet"] + both[0]["grpc_bet"]


def test_a_knee_is_played_at_a_rate_of_choice() -> None:
    profile = read_profile("knee")
    (stage,) = profile.at_rate(123.0)
    assert profile.knee is not None
    assert (stage.rate_from, stage.rate_to, stage.duration_s) == (123.0, 123.0, profile.knee.window_s)
    with pytest.raises(ValueError, match="knee"):
        read_profile("smoke").at_rate(1.0)


GOOD = """
[p]
about = "x"
wallets = 1
matches = 1
stages = [{ phase = "a", duration_s = 1, rate = 1, mix = { bet = 1 } }]
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("wallets = 1", "'p': .*wallets"),
        ("wallets = 1\nwalets = 2", "'p'.*walets"),
        ("rate = 1", "'p', stage 0 .a.: a stage has either"),
        ("rate = 1, ramp = 2", "'p'.*ramp"),
        ("rate = 1, users = 2", "'p', stage 0 .a.: a stage has either"),
        ("mix = { bet = 1, bets = 2 }", "'p', stage 0 .a.: mix: no operation 'bets'"),
        ("mix = { bet = 0 }", "'p', stage 0 .a.: mix"),
        ("duration_s = 0", "'p', stage 0 .a.: duration_s"),
    ],
)
def test_a_wrong_key_is_refused_with_profile_and_key(tmp_path: Path, change: str, message: str) -> None:
    name = change.split(" = ", maxsplit=1)[0].split(",", maxsplit=1)[0]
    line = next(part for part in (f"{name} = {{ bet = 1 }}", f"{name} = 1") if part in GOOD)
    text = GOOD.replace(line, "" if change in {"wallets = 1"} else change)
    if change == "rate = 1":
        text = GOOD.replace("rate = 1, ", "")
    file = tmp_path / "profiles.toml"
    file.write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_profiles(file)


def test_limits_name_a_phase_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(GOOD + "[p.limits.b]\nbet = { p99_ms = 1 }\n")
    with pytest.raises(ProfileError, match=r"limits\.b: no stage"):
        read_profile("p", file)
    with pytest.raises(ProfileError, match="no profile 'q'"):
        read_profile("q")
