"""`ledgerproof sim predict PROFILE`: what the service will do under a load profile, sealed before anybody plays it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ledgerproof.modelling.calibrate_command import STORED, read_calibration
from ledgerproof.output import check_writable, print_table, write_json
from ledgerproof.progress import Progress

if TYPE_CHECKING:
    from load.profiles import Profile
    from load.schedule import Stage
    from sim.cases import Shape
    from sim.costs import Calibration, Interval
    from sim.prediction import Forecast, Prediction

PREDICTIONS_FOLDER: Final = Path("reports/predictions")
READS: Final = frozenset({"balance", "strong_balance", "entries"})
PHASE_MAX_S: Final = 30.0
"""No more of a phase is simulated: after that it repeats itself, or it is beyond what the service carries."""
PHASE_MIN_S: Final = 5.0
"""Less says nothing: the first seconds are a warm-up."""
EXIT_CODES: Final = """\b
Exit codes:
   0  forecast and sealed
   2  usage: no such profile, trace or calibration, a load too long to be computed, or a knee without its bracket
"""


@click.command("predict", epilog=EXIT_CODES)
@click.argument("profile")
@click.option("--rate-factor", type=click.FloatRange(0.001, 1000), default=1.0, help="Multiplies every rate.")
@click.option("--time-factor", type=click.FloatRange(0.001, 1000), default=1.0, help="Multiplies every duration.")
@click.option("--servers", type=click.IntRange(1, 16), default=2, show_default=True, help="Postgres servers.")
@click.option("--apis", type=click.IntRange(1, 16), default=2, show_default=True, help="API processes.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True, help="Draws arrivals and waits.")
@click.option(
    "--trace", type=click.Path(path_type=Path), default=None, help="Arrivals of this file, for the profile `trace`."
)
@click.option(
    "--profiles-file",
    type=click.Path(path_type=Path),
    default=None,
    help="File with the profiles; load/profiles.toml if left out.",
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), default=STORED, help="What `ledgerproof sim calibrate` found."
)
@click.option(
    "--out",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help=f"Gets the sealed forecast (JSON); {PREDICTIONS_FOLDER}/PROFILE.json if left out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the sealed forecast as JSON instead of the table.")
def predict_command(
    *, profile: str, profiles_file: Path | None, calibration: Path, path: Path | None, as_json: bool, **given: Any
) -> int:
    """Forecast each phase of PROFILE; nothing is started.

    A phase is forecast at its mean rate, for 30 s at most, with its share of reads. Of `knee` the highest rate that
    keeps the limit is sought.
    """
    from load.profiles import PROFILES, ProfileError, read_profile  # noqa: PLC0415 - slow to import

    known = read_calibration(calibration)
    try:
        chosen = read_profile(profile, profiles_file or PROFILES)
    except (ProfileError, OSError) as error:
        raise click.UsageError(f"{error}; `ledgerproof load profiles` lists them") from error
    if (profile == "trace") != (given["trace"] is not None):
        raise click.UsageError("the profile `trace` and --trace FILE belong together: give both or none")
    if given["trace"] is not None and given["rate_factor"] != 1.0:
        raise click.UsageError("a trace has its own rates: leave out --rate-factor; --time-factor stretches it")
    file = path or PREDICTIONS_FOLDER / f"{profile}.json"
    if path is None:
        PREDICTIONS_FOLDER.mkdir(parents=True, exist_ok=True)
    check_writable(file)
    try:
        made = _made(profile, chosen, known, given)
    except ValueError as error:
        raise click.UsageError(f"{error}; a smaller --rate-factor or --time-factor helps") from error
    write_json(file, made)
    if as_json:
        click.echo(file.read_text())
    else:
        _print(profile, made)
        click.echo(f"sealed as {made.digest} in {file}")
    if chosen.knee is not None:
        found = _knee(made.forecasts, chosen.knee.p99_ms)
        if not as_json:
            click.echo(found)
    return 0


def phases_of(
    stages: "list[Stage]", *, hot_share: float, servers: int, apis: int
) -> "list[tuple[Shape, float, float]]":
    """Return of each phase in turn its shape, its mean rate per second and its length in seconds.

    Stages of one phase are added up, weighted by their arrivals. A phase in which nothing arrives is left out.
    """
    from sim.cases import Shape  # noqa: PLC0415

    found = []
    for phase in dict.fromkeys(stage.phase for stage in stages):
        mine = [stage for stage in stages if stage.phase == phase]
        arrivals = [stage.duration_s * (stage.rate_from + stage.rate_to) / 2 for stage in mine]
        lasts_s = sum(stage.duration_s for stage in mine)
        if not sum(arrivals):
            continue
        reads = sum(
            count * sum(weight for op, weight in stage.mix.items() if op in READS) / sum(stage.mix.values())
            for count, stage in zip(arrivals, mine, strict=True)
        )
        shape = Shape(
            name=phase,
            why="",
            servers=servers,
            apis=apis,
            read_share=round(reads / sum(arrivals), 6),
            hot_share=hot_share,
        )
        found.append((shape, sum(arrivals) / lasts_s, lasts_s))
    return found


def _made(profile: str, chosen: "Profile", known: "Calibration", given: dict[str, Any]) -> "Prediction":
    from ledgerproof.machine import commit  # noqa: PLC0415
    from sim.prediction import Prediction, calibration_digest, predict, sealed  # noqa: PLC0415 - slow to import
    from sim.system import REQUESTS_MAX  # noqa: PLC0415

    stages = chosen.drawn_stages(rate_factor=given["rate_factor"], time_factor=given["time_factor"])
    place = {"servers": given["servers"], "apis": given["apis"]}
    phases = (
        _traced(given["trace"], given["time_factor"], place)
        if given["trace"] is not None
        else phases_of(stages, hot_share=chosen.hot_share, **place)
    )
    if not phases:
        raise ValueError(f"nothing arrives in profile {profile!r}")
    longest = max(rate * simulated_s(lasts_s) for _, rate, lasts_s in phases)
    if longest > REQUESTS_MAX:
        raise ValueError(f"a phase of {longest:,.0f} requests is more than the {REQUESTS_MAX:,} that can be computed")
    said = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "seed": given["seed"]}
    with Progress().step(f"Forecasting {profile}") as step:
        if chosen.knee is None:
            asked: list[tuple[Shape, float | None, float]] = [
                (shape, rate, simulated_s(lasts_s)) for shape, rate, lasts_s in phases
            ]
            return predict(known, asked, progress=step.show, **said)
        from sim.knee import find_knee  # noqa: PLC0415

        knee = chosen.knee
        bounds = find_knee(
            known.costs,
            phases[0][0],
            low_per_s=knee.low_rate * given["rate_factor"],
            high_per_s=knee.high_rate * given["rate_factor"],
            tolerance=knee.tolerance,
            p99_ms=knee.p99_ms,
            refused_share=knee.error_share,
            window_s=simulated_s(knee.window_s * given["time_factor"]),
            seed=given["seed"],
            progress=step.show,
        )
        forecasts = [one for one in bounds if one is not None]
        return sealed(Prediction(calibration=calibration_digest(known), forecasts=forecasts, **said))


def simulated_s(lasts_s: float) -> float:
    """Return how much is simulated of a phase of so many seconds."""
    return min(PHASE_MAX_S, max(PHASE_MIN_S, lasts_s))


def _traced(path: Path, time_factor: float, place: dict[str, int]) -> "list[tuple[Shape, float, float]]":
    from load.trace import TraceError  # noqa: PLC0415
    from load.traces import read_trace  # noqa: PLC0415
    from sim.cases import Shape  # noqa: PLC0415

    try:
        read = read_trace(path, time_factor=time_factor)
    except (TraceError, OSError) as error:
        raise click.UsageError(f"{error}; docs/load-traces.md says what a trace looks like") from error
    count = len(read)
    reads = sum(read.count_of(op) for op in READS)
    [(phase, start_s, end_s)] = read.spans()
    shape = Shape(
        name=phase, why="", read_share=round(reads / max(1, count), 6), servers=place["servers"], apis=place["apis"]
    )
    return [(shape, count / (end_s - start_s), end_s - start_s)] if count else []


def _print(profile: str, made: "Prediction") -> None:
    columns = [
        "phase",
        "rate/s",
        "answered/s",
        "of",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "most waits",
        "refused",
        "bottleneck",
    ]
    rows = []
    for one in made.forecasts:
        stage = max(one.backlog_peak, key=lambda name: one.backlog_peak[name].value)
        waits = one.backlog_peak[stage]
        named = [
            one.shape.name,
            f"{one.rate_per_s:,.0f}",
            _interval(one.throughput_per_s, 0),
        ]
        ends = [f"{stage} {_interval(waits, 0)}", f"{one.refused_share:.2%}", _bottleneck(one)]
        for number, (name, percentiles) in enumerate(one.latency_ms.items()):
            latencies = [_interval(percentiles[percent], 1) for percent in ("p50", "p95", "p99")]
            rows.append([*(["", "", ""] if number else named), name, *latencies, *(["", "", ""] if number else ends)])
        if not one.latency_ms:
            rows.append([*named, "-", "-", "-", "-", *ends])
    print_table(f"forecast of {profile} with 95 % intervals, calibration {made.calibration[:12]}", columns, rows)


def _bottleneck(one: "Forecast") -> str:
    """Name what limits a forecast; where nothing does, what is busiest."""
    from sim.prediction import BUSY  # noqa: PLC0415

    busiest = max(one.utilisation, key=lambda name: one.utilisation[name])
    used = f"{busiest} {one.utilisation[busiest]:.0%}"
    if one.utilisation[busiest] >= BUSY:
        return used
    return f"{one.bottleneck} ({used})" if one.refused_share else f"none ({used})"


def _interval(one: "Interval", decimals: int) -> str:
    return f"{one.value:,.{decimals}f} ({max(0.0, one.low):,.{decimals}f}–{one.high:,.{decimals}f})"


def _knee(forecasts: "list[Forecast]", p99_ms: float) -> str:
    """Return between which rates the knee is. Raises click.UsageError if the bounds do not bracket one."""
    rates = [one.rate_per_s or 0.0 for one in forecasts]
    limit = f"p99 of {p99_ms:g} ms"
    if len(rates) != 2:
        raise click.UsageError(
            f"the bounds of the profile do not bracket the knee of a {limit}: the search ended at {rates[0]:,.0f}/s; "
            "move them with --rate-factor"
        )
    return f"the knee is between {rates[0]:,.0f}/s, which keeps {limit}, and {rates[1]:,.0f}/s, which does not"
