"""The rows that place bets through the API: accepted, sustained and in bulk over HTTP, and one by one over gRPC."""

import time
from dataclasses import dataclass
from typing import Any, Final

from ledgerproof.bench import usage
from ledgerproof.bench.context import Bench
from ledgerproof.bench.lag import LagSampler
from ledgerproof.bench.plan import Window
from ledgerproof.bench.row import FSYNC_KAFKA, Row, ended
from ledgerproof.bench.search import Found, Held, Step, highest_rate
from ledgerproof.bench.slope import Trend, trend

ACCEPTED_P99_MAX_MS: Final = 100.0
ACCEPTED_SHARE_MIN: Final = 0.999
GENERATOR_LAG_P99_MAX_MS: Final = 5.0
"""A generator that hands requests over later than this measures itself."""
CONFIRM_WINDOWS: Final = 3
"""Confirming windows begin no later than this many of their lengths after the search."""
FIRST_RATE: Final = 800.0
HINT_SHARE: Final = 0.97
"""Of what was accepted or consumed in a window that was too fast, this is tried next."""
FLOOR: Final = "floor_unnest"
BULK_COMMANDS: Final = 1_000
BULK_CONNECTIONS: Final = 3
"""Together they ask for less than a writer's queue holds."""
GRPC_CALLS: Final = 64
"""Calls under way at any time."""
GRPC_RATE_MAX: Final = 10_000
BULK_RATE_MAX: Final = 25_000
"""Commands are prepared for this many a second; a window that uses them up ends early."""


@dataclass(frozen=True)
class Attempt:
    """One window at one rate."""

    step: Step
    window: Window
    cpu_s: dict[str, float]
    trends: list[Trend]


def judge_accepted(rate: float, window: Window, *, confirming: bool = False) -> Step:
    """Say whether every bet was accepted in time, and whether the window can be believed."""
    hint = HINT_SHARE * window.accepted_per_s if 0 < window.accepted_per_s < rate else None
    if window.lag_p99_ms > GENERATOR_LAG_P99_MAX_MS:
        why = f"the generator was {window.lag_p99_ms:.1f} ms late (99th percentile)"
        return Step(rate, Held.INVALID, why, confirming=confirming)
    if window.accepted < ACCEPTED_SHARE_MIN * window.due:
        why = f"at {rate:,.0f}/s only {window.accepted} of {window.due} were accepted {window.statuses}"
        return Step(rate, Held.NO, why, hint, confirming)
    if window.p99_ms is None or window.p99_ms >= ACCEPTED_P99_MAX_MS:
        measured = "not finite" if window.p99_ms is None else f"{window.p99_ms:.0f} ms"
        return Step(rate, Held.NO, f"at {rate:,.0f}/s p99 is {measured}", None, confirming)
    return Step(rate, Held.YES, "", None, confirming)


def judge_sustained(rate: float, window: Window, trends: list[Trend], *, confirming: bool = False) -> Step:
    """Say whether every backlog stayed bounded while the bets were accepted."""
    if window.lag_p99_ms > GENERATOR_LAG_P99_MAX_MS:
        why = f"the generator was {window.lag_p99_ms:.1f} ms late (99th percentile)"
        return Step(rate, Held.INVALID, why, confirming=confirming)
    if window.accepted < ACCEPTED_SHARE_MIN * window.due:
        why = f"at {rate:,.0f}/s only {window.accepted} of {window.due} were accepted {window.statuses}"
        return Step(rate, Held.NO, why, None, confirming)
    if not trends:
        return Step(rate, Held.INVALID, "no backlog was sampled", confirming=confirming)
    growing = [each for each in trends if not each.bounded]
    if growing:
        worst = max(growing, key=lambda each: each.slope_per_s)
        hint = HINT_SHARE * (rate - worst.slope_per_s) if worst.slope_per_s < rate else None
        return Step(rate, Held.NO, f"at {rate:,.0f}/s {worst.why}", hint, confirming)
    return Step(rate, Held.YES, "", None, confirming)


def place(bench: Bench, rate: float, duration_s: float, *, judge_lag: bool, confirming: bool = False) -> Attempt:
    """Place bets at a rate for a time, with everything running, and judge the window."""
    sampler = LagSampler(bench.metrics_ports())
    plan = bench.plan("bets", loop="open", rate=rate, duration_s=duration_s)
    try:
        window, used = bench.measured(plan, before=sampler.start)
    finally:
        sampler.stop()
    trends = [
        trend(name, sampler.times_s[name], sampler.values[name], rate, duration_s) for name in sorted(sampler.values)
    ]
    if judge_lag:
        step = judge_sustained(rate, window, trends, confirming=confirming)
    else:
        step = judge_accepted(rate, window, confirming=confirming)
    p99 = "-" if window.p99_ms is None else f"{window.p99_ms:.0f} ms"
    bench.show(f"{rate:,.0f}/s for {duration_s:g} s: {step.held.value}, p99 {p99} {step.why}")
    return Attempt(step, window, used, trends)


def accepted(bench: Bench) -> None:
    """Find the highest rate of single bets whose answers stay fast, whatever the backlogs behind them do."""
    _search(bench, "http_single_bets_accepted", judge_lag=False)


def sustained(bench: Bench) -> None:
    """Find the highest rate of single bets at which no consumer falls behind."""
    _search(bench, "http_single_bets_sustained", judge_lag=True)


def _search(bench: Bench, name: str, *, judge_lag: bool) -> None:
    bench.open_workload()
    sizes, options = bench.sizes, bench.options
    step_s, confirm_s, search_s = (
        (sizes.lag_step_s, sizes.lag_confirm_s, sizes.lag_search_s)
        if judge_lag
        else (sizes.step_s, sizes.confirm_s, sizes.search_s)
    )
    age = bench.entries()
    attempts: list[Attempt] = []

    def attempt(rate: float, duration_s: float, *, confirming: bool) -> Step:
        if judge_lag and attempts and attempts[-1].step.held is not Held.YES:
            bench.drain()
        made = place(bench, rate, duration_s, judge_lag=judge_lag, confirming=confirming)
        if made.step.held is Held.INVALID:
            # A hiccup of the machine is not an answer; a generator that is late twice is one.
            made = place(bench, rate, duration_s, judge_lag=judge_lag, confirming=confirming)
        attempts.append(made)
        return made.step

    if options.rate is not None:
        asked = attempt(options.rate, options.duration_s or confirm_s, confirming=True)
        found = Found(options.rate if asked.held is Held.YES else None, [asked], asked.why)
        row = _row(bench, name, attempts[-1], found, age)
        row.variant = "at a given rate"
        row.rate = attempts[-1].window.accepted_per_s
        if asked.held is not Held.YES:
            ended(row, asked.why)
    else:
        deadline = time.monotonic() + search_s
        found = highest_rate(
            lambda rate: attempt(rate, step_s, confirming=False),
            lambda rate: attempt(rate, confirm_s, confirming=True),
            _first_rate(bench, judge_lag=judge_lag),
            deadline=deadline,
            confirm_until=deadline + CONFIRM_WINDOWS * confirm_s,
        )
        row = _row(bench, name, attempts[-1], found, age)
        if found.rate is None:
            row.rate = None
            ended(row, f"no rate was confirmed: {found.limit}")
    bench.add(row)


def _first_rate(bench: Bench, *, judge_lag: bool) -> float:
    """Begin where an earlier row says it is safe to."""
    held = bench.best("http_single_bets_sustained")
    return FIRST_RATE if judge_lag or held is None else max(FIRST_RATE, held)


def _row(bench: Bench, name: str, last: Attempt, found: Found, age: int) -> Row:
    window = last.window
    return bench.row(
        name,
        rate=round(window.accepted_per_s, 1),
        p50_ms=window.p50_ms,
        p99_ms=window.p99_ms,
        floor=FLOOR,
        reason=found.limit,
        loop="open, Poisson arrivals; latency from the intended time",
        data_age=age,
        duration_s=window.duration_s,
        samples=window.due,
        cpu_ms_per_op=usage.per_operation_ms(last.cpu_s, window.accepted),
        fsync=FSYNC_KAFKA,
        details={
            **generator_details(window),
            "offered_per_s": round(last.step.rate, 1),
            "statuses": window.statuses,
            "p99_by_second_ms": window.p99_by_second_ms,
            "accepted_by_second": window.accepted_by_second,
            "backlogs": {
                each.name: {
                    "slope_per_s": round(each.slope_per_s, 1),
                    "first": each.first,
                    "last": each.last,
                    "bounded": each.bounded,
                }
                for each in last.trends
            },
            "search": [
                {"rate": round(step.rate, 1), "held": step.held.value, "why": step.why, "confirming": step.confirming}
                for step in found.steps
            ],
        },
    )


def bulk(bench: Bench) -> None:
    """Measure bets that come a thousand a request."""
    bench.open_workload()
    age = bench.entries()
    seconds = bench.sizes.read_s
    plan = bench.plan(
        "bulk",
        loop="closed",
        duration_s=seconds,
        connections=BULK_CONNECTIONS,
        requests_max=BULK_CONNECTIONS + int(BULK_RATE_MAX * seconds / BULK_COMMANDS),
        bulk=BULK_COMMANDS,
        count='"status":202',
    )
    window, used = bench.measured(plan)
    row = bench.row(
        "http_bulk_bets",
        variant=f"{BULK_COMMANDS:,} a request",
        rate=round(window.counted / window.duration_s, 1),
        p50_ms=window.p50_ms,
        p99_ms=window.p99_ms,
        floor=FLOOR,
        loop=f"closed, {BULK_CONNECTIONS} connections",
        batch_size=BULK_COMMANDS,
        data_age=age,
        duration_s=round(window.duration_s, 2),
        samples=window.counted,
        cpu_ms_per_op=usage.per_operation_ms(used, window.counted),
        fsync=FSYNC_KAFKA,
        details={**generator_details(window), "statuses": window.statuses, "latency_is_of": "one request"},
    )
    asked = window.due * BULK_COMMANDS
    if window.counted < ACCEPTED_SHARE_MIN * asked:
        ended(row, f"only {window.counted} of {asked} accepted: {window.statuses} {window.first_problem}")
    bench.add(row)


def over_grpc(bench: Bench) -> None:
    """Measure single bets over gRPC, as many as its client and the service get through together."""
    bench.open_workload()
    age = bench.entries()
    seconds = bench.sizes.read_s
    plan = bench.plan(
        "grpc_bets",
        ports=bench.grpc_ports,
        loop="closed",
        duration_s=seconds,
        connections=GRPC_CALLS,
        requests_max=int(GRPC_RATE_MAX * seconds),
    )
    window, used = bench.measured(plan)
    row = bench.row(
        "grpc_single_bets",
        rate=round(window.accepted_per_s, 1),
        p50_ms=window.p50_ms,
        p99_ms=window.p99_ms,
        floor=FLOOR,
        loop=f"closed, {GRPC_CALLS} calls",
        data_age=age,
        duration_s=round(window.duration_s, 2),
        samples=window.due,
        cpu_ms_per_op=usage.per_operation_ms(used, window.accepted),
        fsync=FSYNC_KAFKA,
        reason=f"the client used {window.cpu_share:.0%} of a core",
        details={**generator_details(window), "statuses": window.statuses},
    )
    if window.accepted < ACCEPTED_SHARE_MIN * window.due:
        ended(row, f"only {window.accepted} of {window.due} were accepted {window.statuses} {window.first_problem}")
    bench.add(row)


def generator_details(window: Window) -> dict[str, Any]:
    """Return how the generator did, for a row's details."""
    return {
        "generator_lag_p99_ms": window.lag_p99_ms,
        "generator_lag_max_ms": window.lag_max_ms,
        "generator_cpu_share": round(window.cpu_share, 3),
        "generator_priority": window.priority,
        "connections": window.connections,
        "queued_for_a_connection": window.queued,
        "connections_lost": window.lost,
        "first_problem": window.first_problem,
    }
