"""`ledgerproof load PROFILE`, `ledgerproof load compare A B` and `ledgerproof load profiles`."""

import secrets
from pathlib import Path
from typing import Any, Final

import click

from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import check_writable, json_path_option, out_option, print_json, print_table
from ledgerproof.progress import Progress

WORSE_EXIT: Final = 10
UNPROVEN_EXIT: Final = 30
EXIT_CODES: Final = """\b
Exit codes of a load: those of `ledgerproof prove`; 10 also if a limit of the profile was missed, 30 also if the
generator did not keep its schedule. Of compare: 0 nothing is worse, 10 something is, 30 one of the runs proves
nothing, 2 the two cannot be compared.
"""


class _Profiles(click.Group):
    """A group in which what is no subcommand is the name of a profile."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            return "play", self.commands["play"], args
        return super().resolve_command(ctx, args)


@click.group("load", cls=_Profiles, epilog=EXIT_CODES, subcommand_metavar="PROFILE [OPTIONS] | COMMAND …")
def load_group() -> None:
    """Load the service as a profile says, with Locust in an open loop, and prove what it did.

    `ledgerproof load profiles` lists the profiles. Latency counts from the moment a request was due.
    """


_file_option = click.option(
    "--profiles-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="File with the profiles; load/profiles.toml if left out.",
)


@load_group.command("play", epilog=EXIT_CODES)
@click.argument("profile")
@click.option("--seed", type=click.IntRange(0, 2**31), default=None, help="Draws the schedule; random if left out.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Locust workers.")
@click.option("--servers", type=click.IntRange(1, 16), default=2, show_default=True, help="Postgres servers.")
@click.option("--apis", type=click.IntRange(1, 16), default=2, show_default=True, help="API processes.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Play the arrivals of this CSV or Parquet file (docs/load-traces.md); the profile gives the limits.",
)
@click.option("--rate-factor", type=click.FloatRange(0.001, 1000), default=1.0, help="Multiplies every rate.")
@click.option("--time-factor", type=click.FloatRange(0.001, 1000), default=1.0, help="Multiplies every duration.")
@click.option(
    "--lag-limit-ms",
    type=click.FloatRange(0.1, 10_000),
    default=5.0,
    show_default=True,
    help="The run is INVALID if the generator sent later than this at p99.",
)
@click.option("--base-port", type=click.IntRange(1024, 65_000), default=None, help="First port; free ones if left out.")
@click.option("--keep", is_flag=True, help="Leave the stack running; `ledgerproof down` ends it.")
@_file_option
@out_option
@json_path_option("Also write verdict.json to PATH; without a PATH, to standard output instead of the summary.")
def play_command(*, profile: str, profiles_file: Path | None, json_path: str | None, **given: Any) -> int:
    """Play PROFILE against a stack of its own and judge the run. `knee` searches for the highest rate that holds."""
    from ledgerproof.cli import tell_verdict  # noqa: PLC0415 - the command line imports this module
    from ledgerproof.loading.run import LoadOptions, run_load  # noqa: PLC0415 - slow to import
    from load.profiles import PROFILES, ProfileError, read_profile  # noqa: PLC0415 - slow to import

    file = profiles_file or PROFILES
    try:
        chosen = read_profile(profile, file)
    except (ProfileError, OSError) as error:
        raise EnvironmentProblem(str(error)) from error
    if profile == "trace" and given["trace"] is None:
        raise click.UsageError("which trace? Give the file with --trace")
    if given["trace"] is not None and (chosen.knee is not None or given["rate_factor"] != 1.0):
        raise click.UsageError("a trace has its own rates: leave out --rate-factor; --time-factor stretches it")
    if json_path not in {None, "-"}:
        check_writable(Path(str(json_path)))
    if given["seed"] is None:
        given["seed"] = secrets.randbelow(2**20)
    folder, verdict = run_load(profile, chosen, file, LoadOptions(**given), Progress())
    return tell_verdict(verdict, folder, json_path)


@load_group.command("profiles")
@_file_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def profiles_command(*, profiles_file: Path | None, as_json: bool) -> int:
    """List the profiles: what they are for, how long they take and how many arrivals they have."""
    from load.profiles import PROFILES, ProfileError, read_profiles  # noqa: PLC0415 - slow to import

    try:
        profiles = read_profiles(profiles_file or PROFILES)
    except (ProfileError, OSError) as error:
        raise EnvironmentProblem(str(error)) from error
    rows = []
    for name, profile in profiles.items():
        stages = profile.drawn_stages()
        arrivals = sum(stage.duration_s * (stage.rate_from + stage.rate_to) / 2 for stage in stages)
        rows.append(
            {
                "profile": name,
                "duration_s": sum(stage.duration_s for stage in stages),
                "arrivals": round(arrivals),
                "highest_rate": max(max(stage.rate_from, stage.rate_to) for stage in stages),
                "wallets": profile.wallets,
                "about": profile.about,
            }
        )
    if as_json:
        print_json(rows)
    else:
        print_table(
            "",
            ["profile", "s", "arrivals", "up to/s", "wallets", "about"],
            [[str(value) for value in row.values()] for row in rows],
        )
    return 0


@load_group.command("compare", epilog=EXIT_CODES)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@json_path_option("Also write the comparison to PATH; without a PATH, to standard output instead of the table.")
@click.option(
    "--html",
    "html_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Also write the comparison as a page: ratios with their intervals, percentile curves over each other.",
)
def compare_command(*, a: Path, b: Path, json_path: str | None, html_path: Path | None) -> int:
    """Compare the loads of two run folders (or load.json files) of one profile: ratios B / A with 95 % intervals."""
    from ledgerproof.loading import compare  # noqa: PLC0415 - slow to import

    if html_path is not None:
        check_writable(html_path)
    try:
        found = compare.compare(compare.read_result(a), compare.read_result(b), (str(a), str(b)))
    except compare.NotComparable as error:
        raise EnvironmentProblem(str(error)) from error
    if json_path is not None:
        compare.write(found, json_path)
    if html_path is not None:
        from reports.compare_page import render_comparison  # noqa: PLC0415 - slow to import

        try:
            render_comparison(compare.told(found), (a, b), compare.NOTICED, html_path)
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {html_path}: {error.strerror}") from error
    if json_path != "-":
        print_table(f"{found.profile}: A is {found.a}, B is {found.b}", list(compare.HEADINGS), compare.table(found))
        for note in [*found.notes, *(f"unproven: {why}" for why in found.unproven)]:
            click.echo(note)
        said = f"B is {found.said.value}" if found.said.value in {"better", "worse"} else found.said.value
        click.echo(f"{said}; {found.undecided} of {len(found.lines)} measures are not decided")
        if html_path is not None:
            click.echo(f"page: {html_path}")
    if found.unproven:
        return UNPROVEN_EXIT
    return WORSE_EXIT if found.said is compare.Said.WORSE else 0
