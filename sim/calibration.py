"""Finds what each step costs, from windows in which most of the machine was idle; says what the data do not support.

CPU follows from the utilisation law: seconds used per second are what each kind of work costs times how often it is
done (non-negative least squares: Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23). So queueing
is not counted as work, which a fit of latencies under load would do. What a commit waits for besides the processors is
found by holding the model itself against the latencies at the lowest rates, percentile by percentile.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sim.cases import Measured, Window
from sim.costs import Calibration, Costs, Fit, Interval, Linear, Refusal, Stage
from sim.system import DEFAULTS, Play, System

UTILISATION_MAX: Final = 0.4
"""Windows above are not fitted: there queueing and caches begin to change what work costs."""
WINDOWS_MIN: Final = 4
RESAMPLES: Final = 400
QUANTILES: Final = 201
MATCH_ROUNDS: Final = 8
MATCH_S: Final = 60.0
QUIET_WINDOWS: Final = 3
GATHERED_LEAST: Final = 1.3
"""Groups of requests that a batch gathers, in the window that gathers most."""
POSTS_SHARE: Final = 0.25
"""Of MATCH_S: a mean needs less than a tail."""
RECEIVED_SHARE: Final = 0.4
HANDED_SHARE: Final = 0.25
"""Of a bet's time in the event loop: reading and checking the request, and encoding its batch for Postgres; the rest
decodes and writes the answer. Chosen, not measured: CPU of a process does not say what it was spent on."""
R_SQUARED_MIN: Final = 0.9
REQUESTS_MIN: Final = 500
"""Of a window whose percentiles are matched."""

Floats = NDArray[np.float64]


class NotCalibrated(Exception):
    """The measurements cannot be calibrated from; the message says why, and what to measure."""


def calibrate(measured: Measured, progress: Callable[[str], None] = lambda _: None) -> Calibration:
    """Return the costs that a measured configuration shows. Raises NotCalibrated."""
    refused: list[Refusal] = []
    windows = _usable(measured, refused)
    if measured.idle is None:
        raise NotCalibrated("the idle window is missing: measure the case `calibration`")
    bets = [window for window in windows if window.read_share == 0]
    reads = [window for window in windows if window.read_share == 1]
    if len(bets) < WINDOWS_MIN or not any(window.burst > 1 for window in bets):
        raise NotCalibrated(
            f"{len(bets)} windows of bets can be used, bursts among them: {any(w.burst > 1 for w in bets)}; "
            f"{WINDOWS_MIN} and bursts are needed, below {UTILISATION_MAX:.0%} of the machine"
        )
    if len(reads) < 2:
        refused.append(
            Refusal("reads", f"{len(reads)} windows of reads: their cost cannot be told from the idle loop's")
        )
    fits: list[Fit] = []
    progress("fitting CPU")
    costs = _costs(measured, bets, reads, fits)
    for fit in fits:
        if fit.r_squared < R_SQUARED_MIN:
            refused.append(
                Refusal(
                    fit.name, f"the fit explains {fit.r_squared:.0%} of what was measured; its cost is a rough guess"
                )
            )
    costs = _matched(measured, costs, bets, fits, progress)
    if max(groups_per_s(window, costs.tick_ms) * window.duration_s / window.posts for window in bets) < GATHERED_LEAST:
        refused.append(
            Refusal(
                "wakes", "each group of bets was posted alone: what a wake costs cannot be told from a batch's cost"
            )
        )
    if not measured.outages:
        refused.append(Refusal("returns", "no outage was measured: how long a part needs to come back is not known"))
    refused.append(Refusal("tail", "beyond p99.9 of the lowest rates nothing is known: no window has the samples"))
    refused.append(Refusal("peak", "no peak is extrapolated from a curve: saturation follows from the steps alone"))
    return Calibration(
        commit=measured.commit,
        machine=measured.machine,
        measured_at=measured.started_at,
        command="ledgerproof sim measure calibration; ledgerproof sim calibrate",
        utilisation_max=max(utilisation(window, measured.cores) for window in windows),
        costs=costs,
        fits=fits,
        refused=refused,
    )


def used_cores(window: Window) -> float:
    """Return the cores that the service and its generator used; sessions are part of their server's."""
    return sum(seconds for name, seconds in window.cpu_s.items() if " " not in name) / window.duration_s


def utilisation(window: Window, cores: int) -> float:
    """Return the share of the machine that the service and its generator used, 0 to 1."""
    return used_cores(window) / cores


def _usable(measured: Measured, refused: list[Refusal]) -> list[Window]:
    usable = []
    for window in measured.windows:
        name = f"{window.offered_per_s:,.0f}/s, bursts of {window.burst}, {window.read_share:.0%} reads"
        busy = utilisation(window, measured.cores)
        if busy > UTILISATION_MAX:
            refused.append(Refusal(name, f"{busy:.0%} of the machine was busy, {UTILISATION_MAX:.0%} is the limit"))
        elif window.accepted < window.due:
            refused.append(Refusal(name, f"{window.due - window.accepted} of {window.due} requests were not accepted"))
        elif not window.proven:
            refused.append(Refusal(name, f"the generator was {window.lag_p99_ms:.1f} ms late"))
        else:
            usable.append(window)
    return usable


# --- CPU -------------------------------------------------------------------------------------------------------------


def _costs(measured: Measured, bets: Sequence[Window], reads: Sequence[Window], fits: list[Fit]) -> Costs:
    idle = measured.idle
    assert idle is not None
    tick_ms = float(np.median([window.lag_p99_ms for window in bets if window.burst == 1])) / 0.99
    both = [*bets, *reads]

    def cpu(name: str) -> Callable[[Window], float]:
        return lambda window: window.cpu_s.get(name, 0.0) / window.duration_s

    def session(who: str) -> Callable[[Window], float]:
        return lambda window: sum(s for name, s in window.cpu_s.items() if name.endswith(f" {who}")) / window.duration_s

    def beyond_idle(read: Callable[[Window], float]) -> Callable[[Window], float]:
        return lambda window: max(0.0, read(window) - read(idle))

    groups: _Column = lambda window: groups_per_s(window, tick_ms)  # noqa: E731
    bet_groups: _Column = lambda window: groups(window) if window.read_share == 0 else 0.0  # noqa: E731
    read_groups: _Column = lambda window: groups(window) if window.read_share == 1 else 0.0  # noqa: E731
    placed: _Column = lambda window: window.accepted_of.get("bets", 0) / window.duration_s  # noqa: E731
    looked: _Column = lambda window: window.accepted_of.get("reads", 0) / window.duration_s  # noqa: E731
    posts: _Column = lambda window: window.posts / window.duration_s  # noqa: E731

    def work(name: str) -> _Column:
        return lambda window: window.work.get(name, 0.0) / window.duration_s

    def fit(name: str, windows: Sequence[Window], read: _Column, **columns: _Column) -> dict[str, float]:
        found = fitted(name, windows, read, columns)
        fits.append(found)
        return {column: interval.value for column, interval in found.coefficients.items()}

    # The loop wakes to what comes and to the answers of Postgres and Redis; at low rates each wakes it anew.
    wakes: _Column = lambda window: bet_groups(window) + posts(window) + 2 * read_groups(window)  # noqa: E731
    api = fit("api", both, cpu("api0"), wakes=wakes, batches=posts, bets=placed, questions=read_groups, reads=looked)
    post = fit("posting session", bets, session("ledger_api"), posts=posts, entries=placed)
    generator = fit("generator", both, cpu("generator"), ticks=lambda _: 1000 / tick_ms, groups=groups, each=_requests)
    jobs = work("relay jobs")
    relay = fit("relay", bets, beyond_idle(cpu("relay0")), rounds=relay_rounds_per_s, events=jobs)
    relay_session = fit(
        "relay's session", bets, beyond_idle(session("ledger_relay")), rounds=relay_rounds_per_s, events=jobs
    )
    kafka = fit("kafka", bets, beyond_idle(cpu("kafka")), rounds=relay_rounds_per_s, events=jobs)
    stages: dict[str, Stage] = {}
    for name in ("matcher", "projector"):
        batches, done = work(f"{name} batches"), work(f"{name} jobs")
        own = fit(name, bets, beyond_idle(cpu(f"{name}0")), batches=batches, jobs=done)
        sql = fit(f"{name}'s session", bets, beyond_idle(session(f"ledger_{name}")), batches=batches, jobs=done)
        stages[name] = Stage(Linear(own["batches"], own["jobs"]), Linear(sql["batches"], sql["jobs"]))
    redis = fit("redis", both, beyond_idle(cpu("redis")), read_groups=read_groups, reads=looked, bets=placed)
    seen = ("ledger_api", "ledger_relay", "ledger_matcher", "ledger_projector", "ledger_reconciler")

    def unseen(window: Window) -> float:
        servers = sum(s for name, s in window.cpu_s.items() if name.startswith("pg") and " " not in name)
        rest = servers / window.duration_s - sum(session(who)(window) for who in seen)
        return rest + cpu("settler0")(window)

    others = fit("unseen", bets, beyond_idle(unseen), bets=placed)
    # Events are more than bets: fills are told, too. The model counts bets.
    share = float(np.mean([jobs(window) / placed(window) for window in bets]))
    return Costs(
        cores=measured.cores,
        generator=Linear(generator["groups"], generator["each"]),
        tick_ms=tick_ms,
        api_wake_ms=api["wakes"],
        api_bet_ms=api["bets"],
        api_batch_ms=api["batches"],
        api_read_ms=api["reads"],
        api_question_ms=api["questions"],
        received_share=RECEIVED_SHARE,
        handed_share=HANDED_SHARE,
        post=Linear(post["posts"], post["entries"]),
        commit_ms=[],
        commit_each_ms=_commit_each_ms(bets, post, api["bets"] * HANDED_SHARE),
        linger_slack_ms=measured.timer_late_ms,
        redis_read=Linear(redis["read_groups"], redis["reads"]),
        relay=Stage(
            Linear(relay["rounds"], relay["events"] * share),
            Linear(relay_session["rounds"], relay_session["events"] * share),
        ),
        kafka=Linear(kafka["rounds"], kafka["events"] * share),
        matcher=stages["matcher"],
        projector=stages["projector"],
        projector_redis=Linear(0.0, redis["bets"]),
        idle_cores=used_cores(idle) + generator["ticks"] / tick_ms,
        unseen_bet_ms=others["bets"],
        warm=measured.warm,
        cold_at=float(np.mean([utilisation(window, measured.cores) for window in both])),
        returns_s={one.case.sort: max(0.0, one.gone_s - one.case.lasts_s) for one in measured.outages},
    )


def _commit_each_ms(bets: Sequence[Window], post: dict[str, float], handed_ms: float) -> float:
    """Return by how much each entry lengthens what a batch waits for besides the processors."""
    sizes = np.array([window.posted / window.posts for window in bets])
    took_ms = np.array([1000 * window.post_s / window.posts for window in bets])
    waits_ms = took_ms - post["posts"] - (post["entries"] + handed_ms) * sizes
    return max(0.0, float(np.polyfit(sizes, waits_ms, 1)[0]))


_Column = Callable[[Window], float]


def _requests(window: Window) -> float:
    return window.due / window.duration_s


def groups_per_s(window: Window, tick_ms: float) -> float:
    """Return how often the generator finds something due: ticks with at least one of a Poisson process' arrivals."""
    arrivals_per_s = window.due / window.duration_s / window.burst
    return (1 - math.exp(-arrivals_per_s * tick_ms / 1000)) * 1000 / tick_ms


def relay_rounds_per_s(window: Window) -> float:
    """Return how many batches the relay sends in a second: it rests a fixed time after each, if something has come."""
    rest_s = DEFAULTS["relay_gather_ms"] / 1000
    arrivals_per_s = window.due / window.duration_s / window.burst
    # The rest ends; then the next arrival is awaited, on average 1/rate, in steps of the poll.
    return 1 / (rest_s + math.exp(-arrivals_per_s * rest_s) * DEFAULTS["relay_poll_ms"] / 1000)


def fitted(name: str, windows: Sequence[Window], read: _Column, columns: dict[str, _Column]) -> Fit:
    """Fit what is read of each window as a sum of columns; coefficients are CPU milliseconds a unit.

    Intervals are by resampling residuals with random signs (wild bootstrap: Wu, Annals of Statistics 14 (1986)).
    """
    matrix = np.array([[column(window) for column in columns.values()] for window in windows]) / 1000
    seen = np.array([read(window) for window in windows])
    # Windows are weighted alike in relative terms, with a floor at the resolution of the kernel's clock.
    weight = 1 / np.maximum(seen, 0.005)
    found, _ = nnls(matrix * weight[:, None], seen * weight)
    residual = seen - matrix @ found
    draw = np.random.default_rng(1)
    freedom = max(len(windows) - len(columns), 1)
    inflated = residual * math.sqrt(len(windows) / freedom)
    signs = draw.choice((-1.0, 1.0), (RESAMPLES, len(windows)))
    again = np.array([nnls(matrix * weight[:, None], (matrix @ found + inflated * sign) * weight)[0] for sign in signs])
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    spread = float(((seen - seen.mean()) ** 2).sum())
    return Fit(
        name=name,
        unit="CPU ms",
        windows=len(windows),
        coefficients={
            column: Interval(float(value), float(min(lo, value)), float(max(hi, value)))
            for column, value, lo, hi in zip(columns, found, low, high, strict=True)
        },
        r_squared=1 - float((residual**2).sum()) / spread if spread > 0 else 1.0,
        worst_residual=float(np.max(np.abs(residual) / np.maximum(seen, 0.005))),
    )


# --- waiting ---------------------------------------------------------------------------------------------------------


def _matched(
    measured: Measured, costs: Costs, bets: Sequence[Window], fits: list[Fit], progress: Callable[[str], None]
) -> Costs:
    """Find the commit's wait with which the model shows the latencies of the lowest rates."""
    single = [window for window in bets if window.burst == 1 and window.due >= REQUESTS_MIN]
    quiet = single[:QUIET_WINDOWS]
    if len(quiet) < QUIET_WINDOWS:
        raise NotCalibrated(f"{QUIET_WINDOWS} windows of single bets are needed, of {REQUESTS_MIN} requests or more")
    mean_ms = float(np.mean([1000 * window.post_s / window.posts - costs.post.fixed_ms for window in quiet]))
    shares = np.linspace(0, 1, QUANTILES)
    commit = np.full(QUANTILES, max(mean_ms, 0.05))
    for number in range(MATCH_ROUNDS):
        progress(f"matching the commit's wait, round {number + 1} of {MATCH_ROUNDS}")
        costs = msgspec.structs.replace(costs, commit_ms=commit.tolist())
        gap = np.mean([_gap(measured, costs, window, number) for window in quiet], axis=0)
        at = np.array(quiet[0].percents) / 100
        commit = np.maximum.accumulate(np.maximum(commit + 0.7 * np.interp(shares, at, gap), 0.02))
    costs = msgspec.structs.replace(costs, commit_ms=commit.tolist())
    # A batch waits for the event loop and for other batches, too: the model knows how long, a regression does not.
    bursts = [window for window in bets if window.burst > 1]
    sizes = np.array([window.posted / window.posts for window in bursts])
    for number in range(MATCH_ROUNDS // 2):
        progress("matching what each entry of a batch adds")
        gap = np.array([_post_gap_ms(measured, costs, window, number) for window in bursts])
        each_ms = costs.commit_each_ms + float((gap * sizes).sum() / (sizes**2).sum())
        costs = msgspec.structs.replace(costs, commit_each_ms=max(0.0, each_ms))
    for window in single:
        gap = _gap(measured, costs, window, 99)
        curve = _curve(window)
        known = np.array(window.percents) <= 99.0
        fits.append(
            Fit(
                name=f"latency at {window.offered_per_s:,.0f}/s",
                unit="ms",
                windows=1,
                coefficients={},
                r_squared=1 - float((gap[known] ** 2).sum() / ((curve[known] - curve[known].mean()) ** 2).sum()),
                worst_residual=float(np.max(np.abs(gap[known]) / curve[known])),
            )
        )
    return costs


def _curve(window: Window) -> Floats:
    return np.array([math.nan if value is None else value for value in window.curves_ms["bets"]])


def _post_gap_ms(measured: Measured, costs: Costs, window: Window, number: int) -> float:
    """Return by how many milliseconds posting a batch took longer than the model's."""
    play = Play(
        shape=measured.shape,
        costs=costs,
        rate_per_s=window.offered_per_s,
        duration_s=MATCH_S * POSTS_SHARE,
        burst=window.burst,
        seed=1,
        replication=number,
        warm_s=0.0,
    )
    system = System(play)
    system.run()
    return 1000 * (window.post_s / window.posts - system.post_s / max(1, system.batches))


def _gap(measured: Measured, costs: Costs, window: Window, number: int) -> Floats:
    """Return by how many milliseconds the measured percentiles lie above the model's."""
    play = Play(
        shape=measured.shape,
        costs=costs,
        rate_per_s=window.offered_per_s,
        duration_s=MATCH_S,
        burst=window.burst,
        seed=1,
        replication=number,
    )
    latency_ms = System(play).run().latency_s["bets"] * 1000
    return _curve(window) - np.quantile(latency_ms, np.array(window.percents) / 100)
