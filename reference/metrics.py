"""Every metric of the service, under the seed's names; label sets are bounded by configuration."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

# They would double the counters of every scrape and say no more than when the process began.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

HTTP_SECONDS = Histogram(
    "http_request_duration_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=REGISTRY
)
HTTP_REQUESTS = Counter("http_requests_total", "Requests answered", ["route", "status"], registry=REGISTRY)
HTTP_ERRORS = Counter("http_request_errors_total", "Answers of 500 and above", ["route"], registry=REGISTRY)
GRPC_SECONDS = Histogram(
    "grpc_request_duration_seconds", "Time to answer", ["method"], buckets=_SECONDS, registry=REGISTRY
)
GRPC_REQUESTS = Counter("grpc_requests_total", "Calls answered", ["method", "code"], registry=REGISTRY)
WRITER_QUEUE = Gauge("writer_queue", "Commands waiting for a server", ["server"], registry=REGISTRY)

WORKER_JOBS = Counter("worker_jobs_processed_total", "Messages whose effect is done", ["group"], registry=REGISTRY)
WORKER_SECONDS = Histogram(
    "worker_job_duration_seconds", "Time of one batch", ["group"], buckets=_SECONDS, registry=REGISTRY
)
WORKER_ERRORS = Counter("worker_job_errors_total", "Batches that failed", ["group"], registry=REGISTRY)

DB_QUERY_SECONDS = Histogram(
    "db_query_duration_seconds",
    "Time of a statement",
    ["query", "server"],
    buckets=_SECONDS,
    registry=REGISTRY,
)

DB_CONNECTIONS = Gauge("db_connection_active", "Connections to the database of a server", ["server"], registry=REGISTRY)
DB_LOCKS = Gauge(
    "db_locks_active", "Locks of a server that are held, and awaited", ["server", "state"], registry=REGISTRY
)

KAFKA_LAG = Gauge("kafka_consumer_lag", "Latest offset minus committed offset", ["group", "topic"], registry=REGISTRY)
KAFKA_CONSUMED = Counter("kafka_messages_consumed_total", "Messages consumed", ["group", "topic"], registry=REGISTRY)
KAFKA_PRODUCE_ERRORS = Counter("kafka_produce_errors_total", "Records not acknowledged", ["topic"], registry=REGISTRY)
KAFKA_REGRESSIONS = Counter(
    "kafka_regressions_total", "Partitions that numbered backwards: a broker lost events", ["topic"], registry=REGISTRY
)
KAFKA_ASSIGNMENTS = Counter(
    "kafka_assignments_total", "Times partitions were given to this member", ["group"], registry=REGISTRY
)
EVENTS_REPEATED = Counter(
    "events_repeated_total",
    "Messages whose effect had been there before: delivered again, or sent twice",
    ["group"],
    registry=REGISTRY,
)
DEAD_LETTERS = Counter("events_dead_lettered_total", "Messages sent to events.dlq", ["group"], registry=REGISTRY)

OUTBOX_UNPUBLISHED = Gauge(
    "outbox_unpublished", "Events not yet in Kafka (counted up to a bound)", ["server"], registry=REGISTRY
)
EVENTS_PUBLISHED = Counter("events_published_total", "Events acknowledged by Kafka", ["server"], registry=REGISTRY)

SHARD_WAITS = Counter(
    "shard_waits_total", "Calls that found their shard being moved and waited for it", registry=REGISTRY
)
PROJECTION_AGE = Gauge(
    "projection_age_seconds", "Age of the moment up to which the projection is complete", ["server"], registry=REGISTRY
)
CACHE_EPOCHS = Counter("cache_epochs_total", "Times the cache was begun anew", ["server"], registry=REGISTRY)

LEDGER_ENTRIES = Counter("ledger_entries_total", "Entries posted by this process", registry=REGISTRY)
CACHE_READS = Counter("cache_reads_total", "Balance reads by where they ended", ["source"], registry=REGISTRY)
CACHE_FILLS_LOST = Counter(
    "cache_fills_lost_total", "Balances that were not cached because Redis held a newer one", registry=REGISTRY
)
CACHE_ERRORS = Counter("cache_errors_total", "Redis calls that failed", registry=REGISTRY)

RECONCILIATION_MISMATCH = Gauge(
    "reconciliation_mismatch", "Mismatches found since the last full pass began", ["server"], registry=REGISTRY
)
# A count of what a pass finds in the tables, not of events in this process: it may go down once it is repaired.
DUPLICATE_ENTRIES = Gauge(
    "duplicate_ledger_entries", "Entries beyond the first of a business key", ["server"], registry=REGISTRY
)
RECONCILIATION_LAST = Gauge(
    "reconciliation_last_complete_timestamp_seconds",
    "When the last pass that saw everything it had to see began",
    ["server", "kind"],
    registry=REGISTRY,
)
RECONCILIATION_SECONDS = Histogram(
    "reconciliation_duration_seconds",
    "Time of a pass",
    ["kind"],
    buckets=(0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0),
    registry=REGISTRY,
)
RECONCILIATION_INCOMPLETE = Counter(
    "reconciliation_incomplete_total", "Passes that could not see everything", ["kind"], registry=REGISTRY
)
PAYOUTS_PAUSED = Gauge("payouts_paused", "1 while payouts of the server are paused", ["server"], registry=REGISTRY)
RATE_LIMITED = Counter("rate_limited_total", "Requests refused by the rate limit of their user", registry=REGISTRY)
RATE_LIMIT_OPEN = Counter(
    "rate_limit_open_total", "Requests let through because Redis did not answer", registry=REGISTRY
)
EVENT_STREAMS = Gauge("event_streams", "Event streams that are open", registry=REGISTRY)
LOOP_LAG = Gauge("event_loop_lag_seconds", "How late the event loop's last tick came", registry=REGISTRY)


def exposition() -> bytes:
    """Return all metrics in Prometheus's text format."""
    return generate_latest(REGISTRY)
