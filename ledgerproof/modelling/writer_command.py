"""`ledgerproof sim writer`: batching, queue and deadline of one writer, for parameters that the user types."""

from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ledgerproof.attach import json_flag
from ledgerproof.output import print_json, print_table

if TYPE_CHECKING:
    from sim.statistics import Estimate
    from sim.writer_model import Prediction

HAND_TYPED: Final = (
    "Service times were typed by hand, not measured: calibration from measured runs comes with the full capacity model."
)
OPTIMISTIC: Final = "Writers of one server do not slow each other in this model: read capacity as an upper bound."


@click.command("writer")
@click.option("--rate", "rate_per_s", type=float, default=540.0, show_default=True, help="Commands per second.")
@click.option("--servers", type=int, default=4, show_default=True, help="Postgres servers.")
@click.option("--apis", type=int, default=2, show_default=True, help="API processes, each with a writer per server.")
@click.option("--fixed-ms", type=float, default=2.0, show_default=True, help="Time of a batch, whatever its size.")
@click.option("--per-command-ms", type=float, default=0.13, show_default=True, help="Time each command adds to it.")
@click.option("--batch", "batch_max", type=int, default=256, show_default=True, help="Commands in one batch at most.")
@click.option("--queue", "queue_max", type=int, default=4096, show_default=True, help="Commands that wait at most.")
@click.option("--deadline-ms", type=float, default=2000.0, show_default=True, help="Longest wait before a refusal.")
@click.option("--duration", "duration_s", type=float, default=60.0, show_default=True, metavar="SECONDS")
@click.option("--replications", type=int, default=10, show_default=True, help="Independent runs, 2 to 1,000.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same prediction.")
@json_flag
def writer_command(*, as_json: bool, **typed: Any) -> int:
    """Predict throughput, latency and refusals of the batching writer alone, by simulation (SimPy); starts nothing.

    The service times are parameters that YOU type: the defaults are examples, not measurements of your machine.
    Calibration from measured runs comes with the full capacity model. Until then this shows how batching, queue
    and deadline behave, and where they saturate, for service times you already know. Writers of one server do
    not slow each other in the model, so its capacity is an upper bound.
    """
    # The model loads numpy and SimPy; this module is loaded by every command, and cli.py loads it.
    from sim.writer_model import Parameters, predict  # noqa: PLC0415

    try:
        parameters = Parameters(**typed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    prediction = predict(parameters)
    if as_json:
        print_json({**msgspec.to_builtins(prediction), "notes": [HAND_TYPED, OPTIMISTIC]})
        return 0
    title = (
        f"{parameters.rate_per_s:g} commands/s, {parameters.servers} servers × {parameters.apis} APIs = "
        f"{parameters.writers} writers, {parameters.replications} × {parameters.duration_s:g} s, seed {parameters.seed}"
    )
    print_table(title, ["", "mean", "95 % interval"], _rows(prediction))
    click.echo(
        f"saturation: {prediction.saturation_per_s:,.0f} commands/s "
        f"({prediction.writer_saturation_per_s:,.0f} per writer; closed form)"
    )
    if prediction.saturated:
        click.echo("SATURATED: more arrives than can be posted; latencies are those that queue and deadline allow.")
    click.echo(f"{HAND_TYPED}\n{OPTIMISTIC}")
    return 0


def _rows(prediction: "Prediction") -> list[list[str]]:
    percent = 100.0
    return [
        _row("throughput, commands/s", prediction.throughput_per_s, 1),
        _row("mean batch, commands", prediction.mean_batch, 2),
        _row("writer utilisation, %", prediction.utilisation, 2, percent),
        _row("latency mean, ms", prediction.mean_ms, 3),
        _row("latency p50, ms", prediction.p50_ms, 3),
        _row("latency p95, ms", prediction.p95_ms, 3),
        _row("latency p99, ms", prediction.p99_ms, 3),
        _row("refused, %", prediction.refused_share, 3, percent),
    ]


def _row(name: str, value: "Estimate | None", digits: int, scale: float = 1.0) -> list[str]:
    if value is None:
        return [name, "-", "too few commands"]
    low, mean, high = (f"{number * scale:,.{digits}f}" for number in (value.low, value.mean, value.high))
    return [name, mean, f"{low} … {high}"]
