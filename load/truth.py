"""Does the load report what is true? `python -m load.truth` plays it against a server whose latencies are known.

For each freeze pattern: the percentiles that our load reports (two workers), the true ones computed from the same
schedule, and what stock pacing reports of the same server. Exit code 0 if all of ours agree, 1 if not.
"""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import click
import msgspec
import numpy as np

from load.freeze_server import ServerReport
from load.freezes import PATTERNS, STOCK_RATE_A_USER, quantile_ms, true_latencies_s
from load.launch import command
from load.profiles import read_profile
from load.result import Result
from load.statistics import exponential_ks

PERCENTS: Final = (50.0, 90.0, 95.0, 99.0, 99.9)
RELATIVE: Final = 0.02
ABSOLUTE_MS: Final = 1.0
ARRIVALS_TOLERANCE: Final = 0.001
KS_LEVEL: Final = 0.01
QUIET_LAG_MS: Final = 1.0
START_TIMEOUT_S: Final = 60.0
STOCK_LOCUSTFILE: Final = Path(__file__).with_name("stock_locustfile.py")
REQUEST_TIMEOUT_S: Final = 60.0
"""Longer than any freeze: an arrival in a freeze waits for its end."""


class Comparison(msgspec.Struct):
    """One pattern: what was reported and what is true, in milliseconds."""

    pattern: str
    scheduled: int
    sent: int
    lag_p50_ms: float
    lag_p99_ms: float
    server_late_p99_ms: float
    noise_ms: list[float]
    """How late the generator and the server together were at each percentile, and how much later it is if every
    request comes to the server as late as one in a hundred did: no fault of the reporting."""
    reported_ms: list[float | None]
    true_ms: list[float]
    stock_ms: list[float | None]
    stock_sent: int
    ks_p: float
    """Of the gaps between requests as the server saw them come."""
    invalid: list[str]

    @property
    def noisy(self) -> bool:
        """Return whether the machine itself kept the generator from being exact."""
        return self.lag_p99_ms > QUIET_LAG_MS

    def wrong(self, slack_ms: float = 0.0) -> list[str]:
        """Return what does not agree; `slack_ms` is allowed beside the tolerances and the measured noise.

        The gaps between arrivals are judged only where the machine was quiet: what a busy one adds is not Poisson.
        """
        found = [
            f"p{percent:g}: reported {reported:.2f} ms, true {true:.2f} ms"
            for percent, reported, true, noise in zip(
                PERCENTS, self.reported_ms, self.true_ms, self.noise_ms, strict=True
            )
            if reported is not None and abs(reported - true) > max(RELATIVE * true, ABSOLUTE_MS) + noise + slack_ms
        ]
        if abs(self.sent - self.scheduled) > ARRIVALS_TOLERANCE * self.scheduled:
            found.append(f"{self.sent} of {self.scheduled} arrivals were sent")
        if self.ks_p < KS_LEVEL and not self.noisy:
            found.append(f"the gaps between arrivals are not exponential (p = {self.ks_p:.4f})")
        return found


@contextmanager
def server(pattern: str, duration_s: float, report: list[ServerReport]) -> Iterator[int]:
    """Run the test server; give its port, and at the end append its report."""
    process = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", "load.freeze_server", pattern, str(duration_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield int(_line(process.stdout))
    finally:
        # The server ends with its input, and with this process too.
        said, _ = process.communicate()
        if said:
            report.append(msgspec.json.decode(said, type=ServerReport))


def _line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None, "the process was started with a pipe"
    return stream.readline()


def compare(pattern: str, *, seed: int, duration_s: float, rate: float, workers: int, stock: bool) -> Comparison:
    """Play one pattern. Raises RuntimeError if Locust gives no result."""
    profile = read_profile("truth")
    base = profile.drawn_stages()[0]
    factors = {"rate_factor": rate / base.rate_from, "time_factor": duration_s / base.duration_s}
    schedule = profile.schedule(seed, profile.drawn_stages(**factors))
    with tempfile.TemporaryDirectory(prefix="truth-") as name:
        folder = Path(name)
        reports: list[ServerReport] = []
        with server(pattern, duration_s, reports) as port:
            options = [
                *("--targets", f"127.0.0.1:{port}", "--load-profile", "truth", "--seed", str(seed)),
                *("--rate-factor", repr(factors["rate_factor"]), "--time-factor", repr(factors["time_factor"])),
                *("--request-timeout", str(REQUEST_TIMEOUT_S), "--result", str(folder / "result.json")),
            ]
            _locust(command(options, workers=workers), duration_s)
        result = Result.from_json((folder / "result.json").read_bytes())
        said = reports[0]
        stock_ms: list[float | None] = [None] * len(PERCENTS)
        stock_sent = 0
        if stock:
            stock_ms, stock_sent = _stock(pattern, duration_s, rate, folder)
    # The pattern begins with the first request, which comes a little after its intended time.
    times = np.maximum(schedule.t + result.start_monotonic_s - said.began_s, 0.0)
    chosen = PATTERNS[pattern]
    true = true_latencies_s(times, chosen.windows(duration_s), chosen.service, duration_s)
    # Who was due just before a freeze and came a little late fell into it: that moves a percentile by a whole arrival.
    late_s = (result.lag.at_ms(99) + said.late_ms(99)) / 1000
    later = true_latencies_s(times + late_s, chosen.windows(duration_s), chosen.service, duration_s)
    cell = result.total()
    gaps = np.diff(np.array(said.arrivals_s)) * rate
    return Comparison(
        pattern=pattern,
        scheduled=result.scheduled,
        sent=result.sent,
        lag_p50_ms=result.lag_p50_ms,
        lag_p99_ms=result.lag_p99_ms,
        server_late_p99_ms=said.late_ms(99),
        noise_ms=[
            result.lag.at_ms(percent)
            + said.late_ms(percent)
            + max(0.0, quantile_ms(later, percent) - quantile_ms(true, percent))
            for percent in PERCENTS
        ],
        reported_ms=[cell.percentile(percent).ms for percent in PERCENTS],
        true_ms=[quantile_ms(true, percent) for percent in PERCENTS],
        stock_ms=stock_ms,
        stock_sent=stock_sent,
        ks_p=exponential_ks(gaps)[1],
        invalid=result.invalid,
    )


def _locust(arguments: Sequence[str], duration_s: float) -> None:
    done = subprocess.run(  # noqa: S603 - our own arguments
        arguments, capture_output=True, text=True, timeout=duration_s + REQUEST_TIMEOUT_S + START_TIMEOUT_S, check=False
    )
    if done.returncode not in {0, 10, 30}:
        raise RuntimeError(f"locust ended with {done.returncode}: {done.stderr[-2000:]}")


def _stock(pattern: str, duration_s: float, rate: float, folder: Path) -> tuple[list[float | None], int]:
    """Return what stock pacing reports: percentiles in ms, and how many requests it made."""
    users = max(1, round(rate / STOCK_RATE_A_USER))
    with server(pattern, duration_s, []) as port:
        options = [
            *("--host", f"http://127.0.0.1:{port}", "--users", str(users), "--spawn-rate", str(users)),
            *("--run-time", f"{round(duration_s)}s", "--csv", str(folder / "stock")),
        ]
        _locust(command(options, locustfile=STOCK_LOCUSTFILE), duration_s)
    rows = list(csv.DictReader((folder / "stock_stats.csv").read_text().splitlines()))
    total = next(row for row in rows if row["Name"] == "Aggregated")
    return [float(total[f"{percent:g}%"]) for percent in PERCENTS], int(total["Request Count"])


def table(found: Sequence[Comparison]) -> str:
    """Return the comparisons as a table."""
    lines = [
        f"{'pattern':<16}{'':<9}{'arrivals':>9}"
        + "".join(f"{f'p{percent:g}':>11}" for percent in PERCENTS)
        + "   milliseconds"
    ]
    for one in found:
        rows: list[tuple[str, int, Sequence[float | None], str]] = [
            ("true", one.scheduled, one.true_ms, ""),
            (
                "ours",
                one.sent,
                one.reported_ms,
                f"   lag p99 {one.lag_p99_ms:.2f}, server late p99 {one.server_late_p99_ms:.2f}, KS p {one.ks_p:.2f}",
            ),
            ("stock", one.stock_sent, one.stock_ms, ""),
        ]
        for label, count, values, note in rows:
            lines.append(
                f"{one.pattern if label == 'true' else '':<16}{label:<9}{count:>9,}"
                + "".join(f"{'–' if value is None else f'{value:,.1f}':>11}" for value in values)
                + note
            )
        lines += [f"{'':<16}INVALID: {reason}" for reason in one.invalid]
        lines += [f"{'':<16}WRONG {reason}" for reason in one.wrong()]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--pattern", "patterns", multiple=True, type=click.Choice(list(PATTERNS)), help="All if left out.")
@click.option("--seed", default=1, show_default=True)
@click.option("--duration", "duration_s", default=30.0, show_default=True, help="Seconds of each pattern.")
@click.option("--rate", default=140.0, show_default=True, help="Arrivals per second.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--stock/--no-stock", default=True, show_default=True, help="Play stock pacing too.")
def main(patterns: tuple[str, ...], *, stock: bool, **settings: Any) -> None:
    """Compare all patterns and print the table."""
    found = []
    for pattern in patterns or PATTERNS:
        found.append(compare(pattern, stock=stock, **settings))
        lines = table(found[-1:]).splitlines()
        print("\n".join(lines if len(found) == 1 else lines[1:]), flush=True)
    sys.exit(1 if any(one.wrong() or one.invalid for one in found) else 0)


if __name__ == "__main__":
    main()
