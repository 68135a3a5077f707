"""What the live auditor has found and could not see, kept in bounds, and shown as metrics."""

import time
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from invariants.anomalies.common import MAX_WITNESSES, Witness
from invariants.live.rows import Seen
from invariants.verdict import Verdict

CODES: Final = (
    "A02 A06 A07 A09 A10 A11 A12 A13 A21 A22 A23 A24 A25 A27 A30 A31 A33".split(" ")  # noqa: SIM905 - one line
)
"""Every code that the live view decides: the label values of its metric."""
STORES: Final = ("postgres", "kafka", "redis")
NOTES_MAX: Final = 200
PLANTED_CODE: Final = "A11"
"""What a drift planted in the read model is."""


class Shown(msgspec.Struct):
    """A witness with when it was found."""

    code: str
    text: str
    key: str | None
    user: int | None
    seq: int | None
    at_unix_s: float


class Metrics:
    """Everything the auditor tells Prometheus; label sets are bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.findings = Counter(
            "ledgerproof_audit_findings", "Anomalies found by the live auditor", ["code"], registry=self.registry
        )
        for code in CODES:
            self.findings.labels(code)
        self.unseen = Gauge(
            "ledgerproof_audit_unseen", "1 while the store cannot be read whole", ["store"], registry=self.registry
        )
        for store in STORES:
            self.unseen.labels(store)
        self.rows = Counter("ledgerproof_audit_rows", "Rows read", ["kind"], registry=self.registry)
        self.waiting = Gauge(
            "ledgerproof_audit_waiting", "Rows whose counterpart was not read yet", ["kind"], registry=self.registry
        )
        self.round_s = Gauge(
            "ledgerproof_audit_round_seconds",
            "How long it took to look once through what changes, by kind",
            ["kind"],
            registry=self.registry,
        )
        self.polls = Counter("ledgerproof_audit_polls", "Looks at all stores", registry=self.registry)
        self.poll_s = Gauge("ledgerproof_audit_poll_seconds", "Length of the last look", registry=self.registry)
        self.last_poll = Gauge(
            "ledgerproof_audit_last_poll_timestamp_seconds", "When the last look ended", registry=self.registry
        )

    def exposition(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)


@dataclass
class Findings:
    """Counts by code, some witnesses of each, and what happened besides."""

    metrics: Metrics = field(default_factory=Metrics)
    counts: dict[str, int] = field(default_factory=dict)
    witnesses: list[Shown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was survived: lost connections, moved shards."""
    unseen: dict[str, str] = field(default_factory=dict)
    """What cannot be read now, and why."""
    blind: list[str] = field(default_factory=list)
    """What was missed for good, so that nothing can be said of it."""
    planted_user: int | None = None
    """The wallet whose balance a run makes wrong on purpose: its A11 is counted apart."""
    planted: int = 0
    _known: Seen[tuple[str, str], bool] = field(default_factory=lambda: Seen(100_000))

    def add(self, found: list[Witness]) -> None:
        """Count what was not found before."""
        for witness in found:
            if (witness.code, witness.text) in self._known:
                continue
            self._known[(witness.code, witness.text)] = True
            if witness.code == PLANTED_CODE and witness.user is not None and witness.user == self.planted_user:
                self.planted += 1
                continue
            self.counts[witness.code] = self.counts.get(witness.code, 0) + 1
            self.metrics.findings.labels(witness.code).inc()
            if self.counts[witness.code] <= MAX_WITNESSES:
                self.witnesses.append(
                    Shown(witness.code, witness.text, witness.key, witness.user, witness.seq, time.time())
                )

    def note(self, text: str) -> None:
        """Say what happened besides."""
        if len(self.notes) < NOTES_MAX:
            self.notes.append(text)

    def cannot_see(self, what: str, why: str) -> None:
        """Say that a store cannot be read now."""
        if what not in self.unseen:
            self.note(f"{what} cannot be read: {why}")
        self.unseen[what] = why
        self.metrics.unseen.labels(store_of(what)).set(1)

    def sees(self, what: str) -> None:
        """Say that a store was read again, whole."""
        if self.unseen.pop(what, None) is not None:
            self.note(f"{what} is read again")
            if not any(store_of(other) == store_of(what) for other in self.unseen):
                self.metrics.unseen.labels(store_of(what)).set(0)

    def missed(self, what: str) -> None:
        """Say that something was missed for good."""
        if what not in self.blind:
            self.blind.append(what)

    @property
    def verdict(self) -> Verdict:
        """What all of it amounts to."""
        if self.counts:
            return Verdict.INVARIANT_VIOLATED
        return Verdict.INVALID if self.unseen or self.blind else Verdict.PASS

    def result(self) -> dict[str, Any]:
        """Return what there is to say at the end."""
        verdict = self.verdict
        return {
            "verdict": verdict.name,
            "exit_code": int(verdict),
            "findings": self.counts,
            "planted": self.planted,
            "witnesses": msgspec.to_builtins(self.witnesses),
            "unseen": self.unseen,
            "missed": self.blind,
            "notes": self.notes,
        }


def store_of(what: str) -> str:
    """Return the kind of a store: kafka, redis, or postgres for any server."""
    return what if what in STORES else "postgres"
