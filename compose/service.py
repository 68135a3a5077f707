"""The service under test: its configuration file, its installation and its processes."""

import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from compose import wire
from compose.errors import NodeDied, SpecError
from compose.processes import Errand
from compose.state import NodeRecord, StackSpec
from reference.config import CONFIG_VARIABLE, ROLES, ServiceConfig
from reference.routing import even_routing

STOP_SIGNAL = signal.SIGTERM
INSTALL_TIMEOUT_S = 120.0
TRACES_FOLDER = "traces"
"""Below the folder of a stack: one file of spans a process."""
PROJECT = Path(__file__).resolve().parent.parent
"""The folder that `reference` is imported from, whatever the current folder is."""


def configuration(spec: StackSpec, nodes: list[NodeRecord], redis_password: str, folder: Path) -> ServiceConfig:
    """Return the configuration of the service of the stack in `folder`; SpecError if the settings do not fit."""
    ports = {node.name: node.port for node in nodes}
    fields: dict[str, Any] = {
        "servers": [
            {"name": node.name, "host": wire.HOST, "port": node.port} for node in nodes if node.kind == "postgres"
        ],
        "routing": even_routing(spec.servers),
        "passwords": {role: secrets.token_hex(16) for role in ROLES},
        "kafka_bootstrap": f"{wire.HOST}:{ports['kafka']}",
        "redis_host": wire.HOST,
        "redis_port": ports["redis"],
        "redis_password": redis_password,
        "token_key": secrets.token_hex(32),
        "default_partitions": spec.partitions,
        "trace_folder": str(folder / TRACES_FOLDER),
        "failpoint_folder": str(folder) if spec.failpoints else None,
    }
    try:
        return msgspec.convert(fields | spec.settings, ServiceConfig)
    except msgspec.ValidationError as error:
        raise SpecError(f"the service's settings are wrong: {error}") from error


def write_configuration(path: Path, config: ServiceConfig) -> None:
    """Write the configuration; it holds passwords, so only its owner may read it."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(config), indent=1))


def environment(config_path: Path) -> dict[str, str]:
    """Return what a process of the service needs in its environment besides what is there."""
    inherited = os.environ.get("PYTHONPATH")
    path = f"{PROJECT}{os.pathsep}{inherited}" if inherited else str(PROJECT)
    return {CONFIG_VARIABLE: str(config_path), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def command(node: NodeRecord) -> list[str]:
    """Return the command to start one process of the service."""
    program = [sys.executable, "-m", "reference", role_of(node.name), "--name", node.name, "--port", str(node.port)]
    return program if node.grpc_port is None else [*program, "--grpc-port", str(node.grpc_port)]


ANSWERING_ROLE = "api"
"""The role whose callers wait for it; all others work behind the answers."""


def role_of(name: str) -> str:
    """Return what a process of the service does, by its node's name."""
    return name.rstrip("0123456789")


def install(superuser: str, password_file: Path, errand: Errand) -> None:
    """Create roles, schema and topics; NodeDied if that fails. Safe to repeat."""
    program = [sys.executable, "-m", "reference", "install"]
    code = errand.run([*program, "--superuser", superuser, "--password-file", str(password_file)], INSTALL_TIMEOUT_S)
    if code != 0:
        raise NodeDied(f"installing the service ended with {code}")


def check_ready(port: int, timeout_s: float) -> None:
    """Raise wire.NoAnswer unless the process says it can do its work."""
    status = wire.http_status(port, "/readyz", timeout_s)
    if status != 200:
        raise wire.NoAnswer(f"/readyz answers {status}", definite=True)
