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
    "ledger_reconciler",
    "ledger_operator",
)
"""Database roles, one per kind of process; `ledger_auditor` only reads, `ledger_operator` is the people's."""

TOKEN_KEY_MIN = 32


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
    writer_linger_ms: int = 4
    """Under load a small batch waits this long for company: a commit costs ten times what a command in it costs."""
    writer_queue: int = 4096
    """Commands waiting for one server in one process at most."""
    command_deadline_ms: int = 2000
    """A command still queued after this long is refused with x-admitted: 0."""
    statement_timeout_ms: int = 5000
    relay_batch: int = 1000
    relay_poll_ms: int = 100
    """Pause of an idle relay."""
    relay_gather_ms: int = 50
    """Pause of a relay that just found something, but less than a batch."""
    progress_every_ms: int = 100
    """How often the projector says up to when the projection is complete."""
    consumer_batch: int = 1000
    projection_stale_after_ms: int = 500
    commission_bps: int = 200
    """Commission on net winnings, in hundredths of a percent."""
    max_amount_minor: int = 10**9
    reconcile_full_at: str = "0 2 * * *"
    """When the reconciler passes over everything: a cron line, UTC. Empty: only when asked."""
    reconcile_every_s: float = 60.0
    """How often it passes over what is new. 0: never by itself."""
    reconcile_overlap_s: float = 10.0
    """How late a transaction may commit: longer than a statement may take and a clock may be off."""
    reconcile_topics_s: float = 2 * 86_400.0
    """How far back the full pass compares outbox and topics; no more than the topics keep."""

    trace_sample: float = 0.01
    """Share of the requests without a traceparent of their own that are traced."""
    otlp_endpoint: str | None = None
    """Where spans go (OTLP over HTTP, a whole URL)."""
    trace_folder: str | None = None
    """Without an endpoint: a folder that gets one file of spans (JSON lines) a process."""
    failpoint_folder: str | None = None
    """Only under a harness: a folder that gets one folder a process, in which it opens an admin socket for its
    failpoints. Without it there are none to arm."""

    token_key: str | None = None
    """Secret of this environment that signs bearer tokens (HS256), 32 characters at least. The API needs it."""
    trust_every_caller: bool = False
    """Without `token_key`: ask for no token and let every caller do everything. For tools on one machine only."""
    rate_limit_per_s: float = 50
    """Requests (in a bulk: commands) per second that the token of one user may send for long."""
    rate_limit_burst: int = 100
    """Requests that the token of one user may send at once after a quiet time."""
    event_streams_max: int = 1000
    """Event streams open in one API process at most."""
    drain_notice_ms: int = 200
    """Between SIGTERM (not ready any more) and the first refused request: time for a load balancer to notice."""

    def __post_init__(self) -> None:
        """Refuse a table that does not route every shard to a configured server."""
        if len(self.routing) != SHARDS:
            raise ValueError(f"routing must have {SHARDS} items, not {len(self.routing)}")
        if not all(0 <= holder < len(self.servers) for holder in self.routing):
            raise ValueError("routing names a server that is not in servers")
        if self.reconcile_every_s < 0 or self.reconcile_overlap_s * 1000 <= self.statement_timeout_ms:
            raise ValueError("reconcile_every_s is negative, or reconcile_overlap_s not above statement_timeout_ms")
        if self.token_key is not None and len(self.token_key) < TOKEN_KEY_MIN:
            raise ValueError(f"token_key must have {TOKEN_KEY_MIN} characters at least")
        if self.rate_limit_per_s <= 0 or self.rate_limit_burst < 1:
            raise ValueError("rate_limit_per_s and rate_limit_burst must be positive")

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
