"""`ledgerproof replay-plan`: run a saved plan, from its stack to its verdict."""

from pathlib import Path

import click

from ledgerproof.attach import running_stack, stack_option
from ledgerproof.options import EnvironmentProblem
from ledgerproof.output import check_writable, json_path_option, out_option
from ledgerproof.progress import Progress


@click.command("replay-plan")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@out_option
@json_path_option("Also write verdict.json to PATH; without a PATH, to standard output instead of the summary.")
@click.option("--check-only", is_flag=True, help="Only say whether FILE is a plan; starts nothing.")
@click.option("--keep", is_flag=True, help="Leave the stack running for a look; `ledgerproof down` ends it.")
@click.option("--lent", is_flag=True, help="Use a running stack; nobody else may give it commands meanwhile.")
@stack_option
def replay_plan_command(
    *,
    file: Path,
    out: Path,
    json_path: str | None,
    check_only: bool,
    keep: bool,
    lent: bool,
    stack_name: str | None,
) -> int:
    """Run the plan in FILE (TOML or JSON, see docs/plans.md): its clients, faults and failpoints, then the proof.

    The seed in the plan draws what the plan leaves open. Processes are real, so their interleaving is not replayed,
    but for what the plan orders by its waits.
    """
    from ledgerproof.cli import tell_verdict  # noqa: PLC0415 - the command line imports this module
    from ledgerproof.plan.format import PlanError, load  # noqa: PLC0415 - slow to import
    from ledgerproof.plan.runner import PlanOptions, run_plan  # noqa: PLC0415 - slow to import

    if lent and keep:
        raise click.UsageError("a lent stack is not taken down anyway: leave --keep out")
    try:
        plan = load(file)
    except PlanError as error:
        raise EnvironmentProblem(str(error)) from error
    if check_only:
        click.echo(f"{file}: {plan.title}")
        return 0
    if json_path not in (None, "-"):
        check_writable(Path(json_path))
    stack = running_stack(stack_name) if lent or stack_name is not None else None
    folder, verdict = run_plan(plan, PlanOptions(out=out, keep=keep, stack=stack), Progress())
    return tell_verdict(verdict, folder, json_path)
