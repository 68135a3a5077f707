"""Which running stack a command means, and the options by which its user says so."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from compose.errors import StackNotFound
from compose.stack import DEFAULT_ROOT, Stack, find_stacks
from compose.state import stacks_folder
from ledgerproof.options import EnvironmentProblem
from reference.config import ConfigError, ServiceConfig, load_config

if TYPE_CHECKING:
    from collections.abc import Callable

stack_option: Final = click.option(
    "--stack", "stack_name", default=None, help="Name or folder of the stack; needed where several run."
)
json_flag: Final = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
_config_option: Final = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Configuration file of a service that is not a stack of this folder.",
)


def service_options(command: "Callable[..., int]") -> "Callable[..., int]":
    """Add the options that say which service is meant, and --json."""
    for option in (json_flag, _config_option, stack_option):
        command = option(command)
    return command


def running_stack(named: str | None) -> Stack:
    """Return the stack with this name or folder, or the only one of this folder.

    Raises EnvironmentProblem if there is no such stack, or several and none was named.
    """
    if named is not None and Path(named).is_dir():
        return _attached(Path(named), named)
    names = sorted(s.name for s in find_stacks(DEFAULT_ROOT) if s.place != "elsewhere" and not s.closing)
    if named is None:
        if not names:
            raise EnvironmentProblem("there is no stack in this folder: start one with `ledgerproof up`")
        if len(names) > 1:
            raise EnvironmentProblem(f"there are several stacks, choose one with --stack: {', '.join(names)}")
        named = names[0]
    elif named not in names:
        raise EnvironmentProblem(f"there is no stack {named!r}; there are {', '.join(names) or 'none'}")
    return _attached(stacks_folder(DEFAULT_ROOT) / named, named)


def _attached(folder: Path, named: str) -> Stack:
    try:
        return Stack.attach(folder)
    except (StackNotFound, OSError) as error:
        raise EnvironmentProblem(f"there is no stack {named!r}: {error}") from error


def service_config(stack_name: str | None, config_path: Path | None) -> ServiceConfig:
    """Return the configuration of the service that was meant. Raises EnvironmentProblem if that is not one."""
    if config_path is None:
        return running_stack(stack_name).config
    try:
        return load_config(config_path)
    except ConfigError as error:
        raise EnvironmentProblem(str(error)) from error
