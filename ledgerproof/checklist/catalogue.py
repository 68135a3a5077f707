"""Every item of the architecture's deployment checklist, in its order, and what it asks for in other places."""

from typing import Final

from ledgerproof.checklist import breaking, looking
from ledgerproof.checklist.item import Item

BEFORE: Final = "Before production"
IN: Final = "In production"
BESIDES: Final = "Asked for elsewhere in the architecture"

ITEMS: Final = (
    Item("partitions", BEFORE, "Schema with all partitions created", looking.partitions),
    Item("indexes", BEFORE, "Indexes verified on all shards", looking.indexes),
    Item("kafka", BEFORE, "Kafka cluster tested (100 partitions)", looking.kafka),
    Item("lag-monitored", BEFORE, "Consumer lag monitoring set up", looking.lag_monitored),
    Item("reconciliation", BEFORE, "Reconciliation job tested", looking.reconciliation),
    Item("failover", BEFORE, "Failover tested (kill 1 shard, verify recovery)", breaking.failover),
    Item("load", BEFORE, "Load test: 100k concurrent users", breaking.load),
    Item("chaos", BEFORE, "Chaos test: kill 20% of pods, verify recovery", breaking.chaos),
    Item("rollout", IN, "Gradual rollout (10% → 25% → 50% → 100%)", breaking.rollout),
    Item("latency", IN, "Monitor p99 latency (must stay < 500ms)", looking.latency),
    Item("duplicates", IN, "Monitor duplicate ledger entries (must be 0)", looking.duplicates),
    Item("lag", IN, "Monitor consumer lag (must stay < 100k)", looking.lag_bounded),
    Item("scheduled", IN, "Daily reconciliation running", looking.reconciliation_scheduled),
    Item("on-call", IN, "On-call engineer standby 24/7", breaking.on_call),
    Item("rights", BESIDES, "Roles: nobody can rewrite the ledger", looking.rights),
    Item("outbox", BESIDES, "The outbox drains into Kafka, consumers and projection", looking.outbox),
    Item("dead-letters", BESIDES, "events.dlq is empty", looking.dead_letters),
    Item("endpoints", BESIDES, "Health and metrics of every process answer", looking.endpoints),
    Item("idempotency", BESIDES, "A key sent twice moves money once", looking.idempotency),
    Item("rate-limit", BESIDES, "The gateway's rate limit per user", looking.rate_limit),
    Item("durability", BESIDES, "An acknowledged commit is on disk", looking.durability),
    Item("replication", BESIDES, "Continuous replication to a standby, 10 s behind at most", looking.replication),
    Item("backups", BESIDES, "Backups that keep the recovery point of 5 minutes", looking.backups),
)
"""The titles of the first two sections are the architecture's own words."""
NAMES: Final = tuple(item.id for item in ITEMS)
