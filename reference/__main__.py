"""Start one process of the service: `python -m reference ROLE --name NAME --port PORT`."""

import argparse
import asyncio
import importlib
import sys
from functools import partial
from pathlib import Path

from reference import failpoint_socket
from reference.config import ConfigError, load_config
from reference.errors import LedgerError
from reference.service import configure_logging, end_process, run_process

WORKERS = ("api", "relay", "matcher", "settler", "projector", "reconciler")


def main() -> int:
    """Parse the command line and run; returns the exit code (2: wrong arguments or configuration)."""
    parser = argparse.ArgumentParser(prog="python -m reference", description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    installing = roles.add_parser("install", help="prepare servers and topics")
    installing.add_argument("--superuser", required=True)
    installing.add_argument("--password-file", type=Path, required=True)
    for role in WORKERS:
        worker = roles.add_parser(role)
        worker.add_argument("--name", required=True)
        worker.add_argument("--port", type=int, required=True)
        if role == "api":
            worker.add_argument("--grpc-port", type=int, help="also serve gRPC on this port")
    arguments = parser.parse_args()
    try:
        config = load_config()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(getattr(arguments, "name", arguments.role))
    if arguments.role == "install":
        from reference.install import install  # noqa: PLC0415 - no worker needs it, and each starts the sooner

        try:
            asyncio.run(install(config, arguments.superuser, arguments.password_file.read_text().strip()))
        except (LedgerError, OSError) as error:
            print(f"not installed: {error}", file=sys.stderr)
            return 1
        return 0
    failpoint_socket.listen(config, arguments.name)
    # Only the process that is to run is imported, which keeps each one small.
    process = importlib.import_module(f"reference.{arguments.role}")
    own = {"grpc_port": arguments.grpc_port} if arguments.role == "api" else {}
    try:
        return run_process(partial(process.run, config, arguments.name, arguments.port, **own))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_process(main())
