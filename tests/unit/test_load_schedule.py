"""The schedule of a load: drawn from the seed alone, split without loss, Poisson, and read from strict profiles."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from load.requests import Names
from load.schedule import ALL_OPERATIONS, Schedule, Stage, draw, expected_before, from_times, match_ids, phase_spans
from load.statistics import exponential_ks
from load.trace import TraceError, write_synthetic
from load.traces import read_trace

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

TRACE = """time,user,operation,amount,match,selection,side,odds,stake,key,bet
10,,create_match,,final,,,,,,
10,7,deposit,500,,,,,,d-1,
10.5,7,bet,,final,AWAY,LAY,310,20,b-1,
10.5,9223372036854775807,balance,,,,,,,,
11,7,cancel,,,,,,,,b-1
12,8,bet,,01928c1e-0d0c-4000-8000-000000000001,Red,BACK,150,30,,
12,,void_match,,final,,,,,,
"""


def test_a_trace_is_played_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    schedule = read_trace(file, time_factor=2.0)
    rows = list(schedule.arrivals())
    assert [(row.due_s, row.op, row.wallet) for row in rows] == [
        (0.0, "create", 0),
        (0.0, "deposit", 7),
        (1.0, "bet", 7),
        (1.0, "balance", 2**63 - 1),
        (2.0, "cancel", 7),
        (4.0, "bet", 8),
        (4.0, "void", 0),
    ]
    assert (rows[2].selection, rows[2].side, rows[2].odds, rows[2].amount_minor) == ("AWAY", "LAY", 310, 20)
    ids = schedule.match_ids("world")
    assert ids[rows[5].match] == "01928c1e-0d0c-4000-8000-000000000001"
    assert ids[rows[2].match] != schedule.match_ids("another")[rows[2].match]
    assert (schedule.created, schedule.cancelled) == ({rows[0].match}, {(7, "b-1")})
    assert schedule.outcomes == [None, ["Red", "OTHER"]]
    assert schedule.spans() == [("trace", 0.0, 4.0)]
    assert schedule.operations() == {"create", "deposit", "bet", "balance", "cancel", "void"}
    assert read_trace(file).digest() == read_trace(file).digest() != schedule.digest()
    names = Names("run", "world", 0, ids, schedule.outcomes)
    commands = [names.command(row) for row in rows if row.op not in {"balance", "cancel"}]
    assert [command.key for command in commands][1:3] == ["run-k-d-1", "run-k-b-1"]
    assert commands[1].body == b'{"amount_minor":500}'
    assert b"Red" in (names.create(rows[5].match).body or b"")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_a_trace_by_wallet_so_that_a_cancel_meets_its_bet(tmp_path: Path, workers: int) -> None:
    file = write_synthetic(tmp_path / "trace.csv", rows=3_000, seed=4)
    whole = read_trace(file)
    shares = [whole.share(index, workers) for index in range(workers)]
    played = [list(share.arrivals()) for share in shares]
    assert [len(share) for share in shares] == [len(rows) for rows in played]
    assert sorted(row.number for rows in played for row in rows) == list(range(len(whole)))
    for rows in played:
        keys = {row.traced.key for row in rows if row.op == "bet" and row.traced is not None}
        assert {row.traced.bet for row in rows if row.op == "cancel" and row.traced is not None} <= keys
        assert [row.due_s for row in rows] == sorted(row.due_s for row in rows)


def test_a_wrong_trace_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE.replace("12,8,bet", "12,8,bets"))
    with pytest.raises(TraceError, match="line 7: unknown operation 'bets'"):
        read_trace(file)
