"""A run as the checker sees it: what the clients were told, what was done to the service, what it holds now."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec
import polars as pl

from invariants import fates, history, timeline
from invariants.history import FINAL_RETRY, LoadReport
from invariants.snapshot import MissingEvidence, Snapshot
from reference.commands import BALANCE_TOPIC, TOPIC_OF
from reference.routing import SHARDS, shard_of_match

CONFIG_FILE: Final = "config.json"
FIRST_SNAPSHOT: Final = "snapshot-1"
SECOND_SNAPSHOT: Final = "snapshot-2"
WALL_CLOCK_DRIFT: Final = "wall_clock_drift_s"
"""Series: how much the wall clock has moved against the run's clock since the run began, seconds."""
CLOCK_SLACK_S: Final = 0.05
"""Times of the service and of the run that differ by less than this are not told apart."""
SYSTEM_PREFIX: Final = "ledger:"
"""Keys that begin so are the service's own: refunds, payouts and commission."""


DRIFT_KINDS: Final = {"drift_planted": "planted", "drift_measured": "measured", "drift_repaired": "repaired"}
"""Kinds of the timeline that tell of a planted drift, and what `Run.drifts` calls their times."""
_DRIFT: Final = pl.Struct(
    {"user": pl.Int64(), "code": pl.String(), "within_s": pl.Float64(), "requested_by": pl.String()}
)
"""The `detail` of these rows, as JSON: whose balance, the reconciler's code for it, how soon it must be reported, and
whose passes count (null: everybody's)."""


@dataclass(frozen=True)
class RunConfig:
    """What the checker must know about the service and the workload."""

    servers: list[str] = field(default_factory=list)
    routing: list[int] = field(default_factory=list)
    """`routing[shard]` is an index into `servers`."""
    commission_bps: int = 200
    """Commission on net winnings, in hundredths of a percent."""
    stale_after_s: float = 0.5
    """Reads older than this must say that they are stale."""
    operations: list[str] = field(default_factory=list)
    """Operations that must have succeeded; empty: those the history shows."""
    required_sometimes: list[str] = field(default_factory=list)
    """*Sometimes* names that this run alone must show; empty: none is required."""
    max_amount_minor: int = 10**9
    """A bet that reserves more than this is refused."""
    recover_within_s: float = 30.0
    """After the measured end of a fault, errors and backlogs are back under their bounds within this time."""
    origin_unix: float | None = None
    """Unix time at which the run's clock was zero; None: not recorded, and no time of the service is compared."""
    evidence: int = 1
    """What the run recorded (`snapshot.EVIDENCE` when it was made)."""


class _ServerName(msgspec.Struct):
    name: str


class _ServiceFile(msgspec.Struct):
    servers: list[_ServerName]
    routing: list[int]
    commission_bps: int = 200
    projection_stale_after_ms: int = 500
    max_amount_minor: int = 10**9
    operations: list[str] = []
    required_sometimes: list[str] = []


class _ConfigFile(msgspec.Struct):
    service: _ServiceFile | None = None
    operations: list[str] = []
    required_sometimes: list[str] = []
    recover_within_s: float = 30.0
    origin_unix: float | None = None
    evidence: int = 1


def load_config(folder: Path) -> RunConfig:
    """Read config.json: the service's configuration at its top level or under `service`.

    Raises MissingEvidence when it is absent or does not fit.
    """
    path = folder / CONFIG_FILE
    try:
        text = path.read_bytes()
        outer = msgspec.json.decode(text, type=_ConfigFile)
        service = outer.service or msgspec.json.decode(text, type=_ServiceFile)
    except (OSError, msgspec.DecodeError) as error:
        raise MissingEvidence(f"{CONFIG_FILE} of the run cannot be used: {error}") from error
    return RunConfig(
        servers=[server.name for server in service.servers],
        routing=service.routing,
        commission_bps=service.commission_bps,
        stale_after_s=service.projection_stale_after_ms / 1000,
        operations=outer.operations or service.operations,
        required_sometimes=outer.required_sometimes or service.required_sometimes,
        max_amount_minor=service.max_amount_minor,
        recover_within_s=outer.recover_within_s,
        origin_unix=outer.origin_unix,
        evidence=outer.evidence,
    )


class Run:
    """All the evidence of one run; every frame is computed once, when a check first asks for it."""

    def __init__(
        self,
        *,
        config: RunConfig,
        recording: LoadReport,
        timeline_rows: pl.DataFrame,
        series_rows: pl.DataFrame,
        first: Snapshot,
        second: Snapshot | None,
        folder: Path | None = None,
    ) -> None:
        """Bundle the parts; `load_run` reads them from a run folder, tests give them directly."""
        self.folder = folder
        """Where the run is on disk; None for one that never was."""
        self.config = config
        self.recording = recording
        self.timeline = timeline_rows
        self.series = series_rows
        self.first = first
        self.second = second
        self.scratch: dict[str, pl.DataFrame] = {}
        """Frames that several checks of one theme share."""
        self.shown: dict[str, int] | None = None
        """How often each *sometimes* happened, where that was counted slice by slice."""

    @property
    def final(self) -> Snapshot:
        """The snapshot that is judged: the second where there is one."""
        return self.second or self.first

    @cached_property
    def lacking(self) -> frozenset[str]:
        """What the run is too old to hold, as `history.column`, `table` or `table.column`."""
        lacking = {f"history.{name}" for name in self.recording.lacking} | self.final.lacking()
        return frozenset(lacking | ({"config.origin_unix"} if self.config.origin_unix is None else set()))

    # -- clocks

    @cached_property
    def clock_slack_s(self) -> float:
        """How far the service's wall clock and the run's clock may be apart, seconds.

        They are clocks of one machine; how much they drifted apart during the run was measured beside it.
        """
        drift = self.series.filter(pl.col("name") == WALL_CLOCK_DRIFT)["value"].abs().max()
        return CLOCK_SLACK_S + (float(drift) if isinstance(drift, float) else 0.0)

    # -- what the clients were told

    @cached_property
    def attempts(self) -> pl.DataFrame:
        """One row per attempt (`history.attempts`) with `family`, `body` and `refused` (`fates.described`)."""
        return fates.described(history.attempts(self.recording.frame))

    @cached_property
    def fates(self) -> pl.DataFrame:
        """One row per key of the whole run (`fates.fates`)."""
        return fates.fates(self.attempts)

    @cached_property
    def first_resolution(self) -> pl.DataFrame:
        """What the first snapshot says of the keys that were unknown when it was taken."""
        before = self.attempts.filter(pl.col("tag").ne_missing(FINAL_RETRY))
        # Only a key with an unanswered attempt can be unknown.
        unanswered = before.filter(pl.col("cls") == "info")
        before = before.join(unanswered, on=["family", "user", "key"], how="semi", nulls_equal=True)
        return fates.resolve(fates.fates(before), self.first, self.server_of_shard)

    @cached_property
    def resolution(self) -> pl.DataFrame:
        """What the judged snapshot says of the keys that are unknown at the end."""
        return fates.resolve(self.fates, self.final, self.server_of_shard)

    # -- what the service holds

    def table(self, name: str) -> pl.DataFrame:
        """Return one table of the judged snapshot. Raises MissingEvidence."""
        return self.final.table(name)

    @cached_property
    def entries(self) -> pl.DataFrame:
        """The ledger by wallet and seq, with `system` and the neighbours and sums a replay needs.

        `before_seq` and `before_balance` are those of the previous row of the wallet (0 at its first);
        `replayed_balance` is the running sum of the amounts.
        """
        ordered = self.table("ledger").sort("user_id", "seq", "idempotent_key")
        first = pl.col("user_id").ne_missing(pl.col("user_id").shift(1))
        running = pl.col("amount").cum_sum()
        return ordered.with_columns(
            pl.col("idempotent_key").str.starts_with(SYSTEM_PREFIX).alias("system"),
            pl.when(first).then(0).otherwise(pl.col("seq").shift(1)).alias("before_seq"),
            pl.when(first).then(0).otherwise(pl.col("balance_snapshot").shift(1)).alias("before_balance"),
            # One running sum over all wallets, less its value where the wallet began: no window needed.
            (running - pl.when(first).then(running - pl.col("amount")).forward_fill()).alias("replayed_balance"),
        )

    @cached_property
    def client_entries(self) -> pl.DataFrame:
        """Entries that a client's command must explain."""
        return self.entries.filter(~pl.col("system"))

    @cached_property
    def system_entries(self) -> pl.DataFrame:
        """Entries that the settler posted by itself."""
        return self.entries.filter(pl.col("system"))

    @cached_property
    def events(self) -> pl.DataFrame:
        """Kafka records of the outbox's events, by topic, partition and offset."""
        records = self.table("kafka").filter(pl.col("topic").is_in(sorted(set(TOPIC_OF.values()))))
        return records.sort("topic", "partition", "offset")

    @cached_property
    def balance_updates(self) -> pl.DataFrame:
        """Kafka records of the projector's stream of balances."""
        return self.table("kafka").filter(pl.col("topic") == BALANCE_TOPIC)

    @cached_property
    def dead_letters(self) -> pl.DataFrame:
        """Kafka records of the dead letter topic."""
        return self.table("kafka").filter(pl.col("topic") == "events.dlq")

    # -- routing

    @cached_property
    def server_of_shard(self) -> dict[int, str]:
        """The server that must hold each logical shard of wallets: the one whose own route says so.

        A shard that none or more than one claims (A31) belongs where the newest route says, and where the run's
        configuration put it if there is no route. Raises MissingEvidence without a table.
        """
        newest = self.table("routes").sort("epoch", "here").unique("shard", keep="last")
        named = dict(newest.select("shard", "server_name").iter_rows())
        return self._initial_routing | named

    @cached_property
    def _initial_routing(self) -> dict[int, str]:
        if len(self.config.routing) != SHARDS or not self.config.servers:
            raise MissingEvidence(f"{CONFIG_FILE} of the run has no routing table of {SHARDS} shards")
        return {shard: self.config.servers[holder] for shard, holder in enumerate(self.config.routing)}

    def home_of_match(self, match_id: str) -> str:
        """Return the server that must hold a match: it never moves. Raises ValueError for an id that is no UUID."""
        return self._initial_routing[shard_of_match(UUID(match_id))]

    # -- faults and drifts

    @cached_property
    def drifts(self) -> pl.DataFrame:
        """One row per drift that the run planted in a store of the service, by time.

        Columns: node (its server), planted, measured, repaired (seconds, null if not seen), and of the row's detail
        (`_DRIFT`) user, code, within_s and requested_by; null where the timeline does not say so.
        """
        rows = self.timeline.filter(pl.col("kind").is_in(list(DRIFT_KINDS))).with_columns(
            pl.col("detail").str.json_decode(_DRIFT).alias("plan")
        )
        rows = rows.unnest("plan")
        edges = {
            name: rows.filter(pl.col("kind") == kind).group_by("node", "user").agg(pl.col("t").min().alias(name))
            for kind, name in DRIFT_KINDS.items()
        }
        planted = rows.filter(pl.col("kind") == "drift_planted").unique(["node", "user"], keep="first")
        found = planted.select("node", "user", "code", "within_s", "requested_by")
        for frame in edges.values():
            found = found.join(frame, on=["node", "user"], how="left", nulls_equal=True)
        return found.sort("planted", "user")

    @cached_property
    def requested_faults(self) -> pl.DataFrame:
        """One row per requested fault: fault_id, fault, node, requested, start, end (null if not measured)."""
        rows = self.timeline.filter(pl.col("fault_id").is_not_null())
        edges = {
            kind: rows.filter(pl.col("kind") == kind).group_by("fault_id").agg(pl.col("t").min().alias(name))
            for kind, name in (("fault_start", "start"), ("fault_end", "end"))
        }
        asked = rows.filter(pl.col("kind") == "fault_requested")
        asked = asked.group_by("fault_id").agg(
            pl.col("t").min().alias("requested"), pl.col("fault").first(), pl.col("node").first()
        )
        for frame in edges.values():
            asked = asked.join(frame, on="fault_id", how="left")
        return asked.sort("requested", "fault_id")


def final_snapshot(folder: Path) -> Snapshot:
    """Return the snapshot of a run folder that is judged: the second where there is one. Raises MissingEvidence."""
    evidence = load_config(folder).evidence
    second = folder / SECOND_SNAPSHOT
    if second.exists():
        return Snapshot(SECOND_SNAPSHOT, second, evidence=evidence)
    return Snapshot(FIRST_SNAPSHOT, folder / FIRST_SNAPSHOT, evidence=evidence)


def load_run(folder: Path) -> Run:
    """Read a run folder. Damage to the history or the snapshots is reported by the checks, not raised here.

    Raises MissingEvidence for a configuration, and polars errors for a timeline, that cannot be read.
    """
    second = folder / SECOND_SNAPSHOT
    config = load_config(folder)
    return Run(
        config=config,
        recording=history.load(folder),
        timeline_rows=timeline.load_timeline(folder),
        series_rows=timeline.load_series(folder),
        first=Snapshot(FIRST_SNAPSHOT, folder / FIRST_SNAPSHOT, evidence=config.evidence),
        second=Snapshot(SECOND_SNAPSHOT, second, evidence=config.evidence) if second.exists() else None,
        folder=folder,
    )


def run_of_frames(
    *,
    config: RunConfig,
    history_rows: pl.DataFrame,
    timeline_rows: pl.DataFrame,
    series_rows: pl.DataFrame,
    first: Mapping[str, pl.DataFrame],
    second: Mapping[str, pl.DataFrame] | None = None,
) -> Run:
    """Bundle a run that was never on disk: a simulated one, or one made by a test."""
    return Run(
        config=config,
        recording=LoadReport(frame=history_rows),
        timeline_rows=timeline_rows,
        series_rows=series_rows,
        first=Snapshot(FIRST_SNAPSHOT, None, first),
        second=Snapshot(SECOND_SNAPSHOT, None, second) if second is not None else None,
    )
