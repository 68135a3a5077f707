"""Configuration of a service process: one file, read in one place.

`LEDGERPROOF_CONFIG` names a JSON file with the fields of `ServiceConfig`. It is the only variable the
service reads.
"""

import os
from pathlib import Path

import msgspec

from reference.routing import SHARDS

CONFIG_VARIABLE = "LEDGERPROOF_CONFIG"

ROLES = (
    "ledger_api",
    "ledger_relay",
    "ledger_matcher",
    "ledger_settler",
    "ledger_projector",
    "ledger_auditor",
)
"""Database roles, one per kind of process; `ledger_auditor` only reads."""


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one physical Postgres server is."""

    name: str
    host: str
    port: int
    database: str = "ledger"


class ServiceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a service process needs to know. Units are in the names."""

    servers: list[ServerConfig]
    routing: list[int]
    """`routing[shard]` is an index into `servers`; 100 of them.

    It places the matches for good (their home servers) and the wallets at installation. Shards of wallets can be
    moved afterwards: where they are is in `shard_routes` on the servers, and `store.Routes` follows it.
    """
    passwords: dict[str, str]
    """Password of each database role."""
    kafka_bootstrap: str
    redis_host: str
    redis_port: int
    redis_password: str | None = None
    partitions: dict[str, int] = {}
    """Partitions per topic; `default_partitions` where a topic is not named."""
    default_partitions: int = 8
    replication_factor: int = 1

    writer_batch: int = 256
    """Commands posted by one transaction at most."""
    writer_queue: int = 4096
    """Commands waiting for one server in one process at most."""
    command_deadline_ms: int = 2000
    """A command still queued after this long is refused with x-admitted: 0."""
    statement_timeout_ms: int = 5000
    relay_batch: int = 1000
    relay_poll_ms: int = 100
    consumer_batch: int = 1000
    projection_stale_after_ms: int = 500
    commission_bps: int = 200
    """Commission on net winnings, in hundredths of a percent."""
    max_amount_minor: int = 10**9

    def __post_init__(self) -> None:
        """Refuse a table that does not route every shard to a configured server."""
        if len(self.routing) != SHARDS:
            raise ValueError(f"routing must have {SHARDS} items, not {len(self.routing)}")
        if not all(0 <= holder < len(self.servers) for holder in self.routing):
            raise ValueError("routing names a server that is not in servers")

    def partitions_of(self, topic: str) -> int:
        """Return the number of partitions of a topic."""
        return self.partitions.get(topic, self.default_partitions)


class ConfigError(Exception):
    """The configuration file is missing or wrong; the message names the file and what to do."""


def load_config(path: Path | None = None) -> ServiceConfig:
    """Read the configuration from `path`, or from the file that LEDGERPROOF_CONFIG names.

    Raises ConfigError if there is none or it does not fit.
    """
    if path is None:
        named = os.environ.get(CONFIG_VARIABLE)
        if not named:
            raise ConfigError(f"set {CONFIG_VARIABLE} to the path of a service configuration (JSON)")
        path = Path(named)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServiceConfig)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"the configuration {path} is wrong: {error}") from error
