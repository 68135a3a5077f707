"""The checks that break nothing: each looks at the stack, and posts at most a few small deposits of its own wallets."""

import asyncio
import math
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import asyncpg
from confluent_kafka import KafkaException
from croniter import croniter

from compose import wire as probe
from ledgerproof.checklist.item import CannotRun, Failed, require
from ledgerproof.checklist.site import AMOUNT_MINOR, Site, answered, quantile_bound
from ledgerproof.collect import GROUPS, consumer_lag, drain, kafka_client
from ledgerproof.drift import load_drift_sql
from ledgerproof.sla import LATENCY_TARGET_MS
from ledgerproof.wire import Reply, get
from reference import operations
from reference.auth import Scope
from reference.bus import topics
from reference.config import ROLES
from reference.dlq import letters
from reference.reconciliation import Kind, Pass
from reference.routing import SHARDS
from reference.sql import load_sql
from reference.store import connect

SEED_PARTITIONS: Final = {"bet.created": 100, "match.settled": 50, "user.balance.updated": 100}
"""What the architecture asks for."""
DRAIN_TIMEOUT_S: Final = 60.0
METADATA_TIMEOUT_S: Final = 15.0
READS: Final = 300
"""Balance reads of the latency check, so that a quantile rests on something."""
P99_SAMPLES_MIN: Final = 100
LAG_MAX: Final = 100_000
STANDBY_LAG_MAX_S: Final = 10.0
ARCHIVE_AGE_MAX_S: Final = 300.0
DRIFT_MINOR: Final = 7
ASKED_BY: Final = "checklist"
PASS_WAIT_S: Final = 60.0
POLL_S: Final = 0.25
FLOOD_EXTRA: Final = 100

_INDEX = re.compile(r"^CREATE (?:UNIQUE )?INDEX (\w+)", re.MULTILINE)


# -- schema ----------------------------------------------------------------------------------------------


async def partitions(site: Site) -> str:
    """Every logical shard has its partition on exactly one server, with the triggers that refuse a rewrite."""
    holders: dict[int, list[str]] = {}
    for server in site.config.servers:
        for row in await site.as_owner(server, "partitions"):
            if not row["here"]:
                continue
            require(row["there"], f"{server.name} holds shard {row['shard']} and has no partition for it")
            require(row["guarded"], f"the partition of shard {row['shard']} on {server.name} lacks a trigger")
            holders.setdefault(row["shard"], []).append(server.name)
    absent = [shard for shard in range(SHARDS) if shard not in holders]
    require(not absent, f"no server holds the shards {_few(absent)}")
    twice = {shard: names for shard, names in holders.items() if len(names) > 1}
    require(not twice, f"shards held by several servers: {twice}")
    counts = ", ".join(
        f"{server.name} {sum(names == [server.name] for names in holders.values())}" for server in site.config.servers
    )
    return f"{SHARDS} shards, each with one partition and its triggers ({counts})"


async def indexes(site: Site) -> str:
    """Every index that the schema declares is there and usable, on each partition of each server."""
    declared = set(_INDEX.findall(load_sql("schema")["schema"])) | set(
        _INDEX.findall(load_sql("reconciliation")["schema"])
    )
    seen = 0
    for server in site.config.servers:
        there = {row["name"]: row["usable"] for row in await site.as_owner(server, "indexes")}
        missing = sorted(declared - there.keys())
        require(not missing, f"{server.name} lacks the indexes {_few(missing)}")
        broken = sorted(name for name, usable in there.items() if not usable)
        require(not broken, f"{server.name} has indexes that are not valid: {_few(broken)}")
        rows = await site.as_owner(server, "partition_indexes")
        gaps = [f"{row['wanted']} of {row['partition']}" for row in rows if not row["usable"]]
        require(not gaps, f"{server.name} lacks {_few(gaps)}")
        seen += len(rows)
    servers = len(site.config.servers)
    return f"{len(declared)} declared indexes on each of {servers} servers and {seen} of partitions, all valid"


async def rights(site: Site) -> str:
    """Every role is there and none may rewrite the ledger; the API's role is refused when it tries."""
    for server in site.config.servers:
        rows = {row["role"]: row for row in await site.as_owner(server, "rights", list(ROLES))}
        missing = [role for role in ROLES if role not in rows]
        require(not missing, f"{server.name} lacks the roles {_few(missing)}")
        strong = [role for role, row in rows.items() if row["powerful"] or row["rewrites"]]
        require(not strong, f"on {server.name} may write the ledger's rows or more: {_few(strong)}")
        connection = await connect(
            server, "ledger_api", site.config.passwords["ledger_api"], statement_timeout_ms=5_000
        )
        refused = False
        try:
            await connection.execute(site.sql["rewrite"])
        except asyncpg.InsufficientPrivilegeError:
            refused = True
        finally:
            connection.terminate()
        require(refused, f"ledger_api may UPDATE wallet_ledger on {server.name}")
    return f"{len(ROLES)} roles on {len(site.config.servers)} servers; an UPDATE of the ledger by ledger_api is refused"


# -- events ----------------------------------------------------------------------------------------------


async def kafka(site: Site) -> str:
    """Every topic has its partitions, the architecture's at least, with a leader and all replicas in sync."""
    config = site.config
    try:
        found = (await asyncio.to_thread(kafka_client(config).list_topics, timeout=METADATA_TIMEOUT_S)).topics
    except KafkaException as error:
        raise Failed(f"Kafka does not answer: {error}") from error
    few: list[str] = []
    total = 0
    for topic in topics():
        require(topic in found, f"there is no topic {topic}")
        parts = found[topic].partitions
        require(
            len(parts) == config.partitions_of(topic),
            f"{topic} has {len(parts)} partitions, the configuration says {config.partitions_of(topic)}",
        )
        lame = [n for n, part in parts.items() if part.error is not None or part.leader < 0]
        require(not lame, f"{topic} has no leader for the partitions {_few(lame)}")
        behind = [n for n, part in parts.items() if len(part.isrs) < max(len(part.replicas), config.replication_factor)]
        require(not behind, f"{topic} has replicas that are not in sync in the partitions {_few(behind)}")
        total += len(parts)
        if len(parts) < SEED_PARTITIONS.get(topic, 1):
            few.append(f"{topic} {len(parts)} of {SEED_PARTITIONS[topic]}")
    require(not few, f"fewer partitions than the architecture asks for: {', '.join(few)}")
    await _posted(site, "kafka")
    return (
        f"{len(topics())} topics with {total} partitions, each with a leader and {config.replication_factor} in sync; "
        f"the events of {SHARDS} wallets, one a shard, went through"
    )


async def lag_monitored(site: Site) -> str:
    """Each consumer reports its lag, and at rest it is what Kafka itself says."""
    await drain(site.config, DRAIN_TIMEOUT_S, site.show)
    there = await asyncio.to_thread(consumer_lag, site.config, kafka_client(site.config))
    told = await _lag_told(site)
    silent = [group for group in GROUPS if group not in told]
    require(not silent, f"no kafka_consumer_lag of {_few(silent)}")
    wrong = {group: (told[group], there[group]) for group in GROUPS if abs(told[group] - there[group]) > LAG_MAX / 100}
    require(not wrong, f"the metric and Kafka differ (metric, Kafka): {wrong}")
    return "; ".join(f"{group}: metric {told[group]:.0f}, Kafka {there[group]}" for group in GROUPS)


async def lag_bounded(site: Site) -> str:
    """No consumer is 100,000 records behind, by the metric that is watched and by Kafka itself."""
    told = await _lag_told(site)
    require(told, "no process reports kafka_consumer_lag")
    # A metric keeps its last value when Kafka is gone.
    there = await asyncio.to_thread(consumer_lag, site.config, kafka_client(site.config))
    worst = {group: max(told.get(group, 0.0), there.get(group, 0)) for group in {*told, *there}}
    most = max(worst, key=lambda group: worst[group])
    require(worst[most] < LAG_MAX, f"{most} is {worst[most]:.0f} records behind; {LAG_MAX} is the alert")
    return f"largest {worst[most]:.0f} records, by metric and Kafka; {LAG_MAX:,} is the alert"


async def _lag_told(site: Site) -> dict[str, float]:
    """Return the lag that the processes report, by group."""
    told: dict[str, float] = {}
    for labels, value in await site.samples(site.service_nodes(), "kafka_consumer_lag"):
        told[labels["group"]] = told.get(labels["group"], 0.0) + value
    return told


async def outbox(site: Site) -> str:
    """Check that what is posted leaves the outbox, is consumed and projected."""
    replies = await site.deposits(site.wallets[:20], "outbox")
    require(all(reply.status == 202 for reply in replies), _statuses("deposits", replies))
    began = time.monotonic()
    left = await drain(site.config, DRAIN_TIMEOUT_S, site.show)
    require(left.unprojected == 0, f"not projected: {left.unprojected} wallets")
    return f"{len(replies)} deposits published, consumed and projected within {time.monotonic() - began:.1f} s"


async def dead_letters(site: Site) -> str:
    """No event waits in events.dlq."""
    found = await asyncio.to_thread(letters, site.config)
    waiting = [letter for letter in found if letter.resolution is None]
    causes = _few([f"{letter.id}: {letter.cause[:80]}" for letter in waiting])
    require(not waiting, f"{len(waiting)} dead letters wait ({causes}); `ledgerproof dlq list` shows them")
    return f"0 waiting, {len(found)} replayed or dropped before"


# -- reconciliation --------------------------------------------------------------------------------------


async def reconciliation(site: Site) -> str:
    """Run a full pass: it sees everything and finds nothing, or, on a stack of ours, what was made wrong for it."""
    await _posted(site, "reconciliation")
    found = "" if not site.breakable else await _planted_and_found(site)
    report = await Pass(site.config, Kind.FULL, ASKED_BY, show=site.show).run()
    if site.breakable:
        # A pass by the schedule may have read the wrong balance too; passes take turns, so it is over now.
        await _resume(site)
    assert report is not None, "a pass that waits for its turn gets it"
    require(not report.problems, f"the pass could not see everything: {'; '.join(report.problems)}")
    require(not report.findings, f"{report.findings} findings: `ledgerproof reconcile findings` shows them")
    entries = sum(server.entries for server in report.servers)
    require(entries, "the pass read no entry at all, so that it says nothing")
    return f"{found}a full pass over {entries} entries on {len(report.servers)} servers found nothing"


async def _planted_and_found(site: Site) -> str:
    """Make a balance of the read model wrong, let a pass report it, and repair it; always."""
    sql, user = load_drift_sql(), site.first_wallet
    server = site.config.servers[site.config.routing[0]]
    reply = await site.deposit(user, "drift")
    require(reply.status == 202, _statuses("a deposit", [reply]))
    await drain(site.config, DRAIN_TIMEOUT_S, site.show)
    owner = await connect(server, *site.stack.superuser, statement_timeout_ms=30_000)
    try:
        planted = await owner.fetch(sql["plant"], user, DRIFT_MINOR)
        require(planted, f"wallet {user} has no projected balance on {server.name}")
        try:
            report = await Pass(site.config, Kind.FULL, ASKED_BY, show=site.show).run()
        finally:
            await owner.fetch(sql["repair"], user)
            paused = await _resume(site)
    finally:
        owner.terminate()
    assert report is not None, "a pass that waits for its turn gets it"
    codes = {finding.code for item in report.servers for finding in item.findings if finding.user_id == user}
    require(codes, f"the balance of wallet {user} was made wrong by {DRIFT_MINOR}, and a full pass did not report it")
    require(paused, f"payouts of {server.name} were not paused by the finding")
    said = ", ".join(sorted(codes))
    return f"a balance made wrong by {DRIFT_MINOR} was reported ({said}) and paused payouts; after its repair "


async def _resume(site: Site) -> bool:
    """Resume the payouts if the balance that we made wrong has paused them; return whether it had."""
    index, user = site.config.routing[0], site.first_wallet
    gate = await operations.gate_of(site.config, index)
    if not gate.paused or f"wallet {user}," not in (gate.reason or ""):
        return False
    return await operations.resume(site.config, index, ASKED_BY, "the drift that the checklist planted is repaired")


async def reconciliation_scheduled(site: Site) -> str:
    """Check that the daily pass is planned, the reconciler ready, and that it has passed by its schedule."""
    config = site.config
    require(config.reconcile_full_at, "reconcile_full_at is empty: no full pass is planned")
    require(croniter.is_valid(config.reconcile_full_at), f"{config.reconcile_full_at!r} is no cron line")
    line = croniter(config.reconcile_full_at, datetime.now(UTC))
    first, second = line.get_next(datetime), line.get_next(datetime)
    hours = (second - first).total_seconds() / 3600
    require(hours <= 24, f"full passes are {hours:g} hours apart; a day is the most")
    nodes = site.stack.nodes_of("reconciler")
    require(nodes, "the stack has no reconciler")
    unready = [node for node in nodes if _status(site, node, "/readyz") != 200]
    require(not unready, f"not ready: {_few(unready)}")
    deadline = time.monotonic() + PASS_WAIT_S + config.reconcile_every_s
    while True:
        passes = [len(await _scheduled(site, index)) for index in range(len(config.servers))]
        if all(passes):
            break
        require(
            time.monotonic() < deadline, f"no pass by the schedule within {PASS_WAIT_S + config.reconcile_every_s:g} s"
        )
        site.show("waiting for a pass by the schedule")
        await asyncio.sleep(POLL_S)
    return (
        f"full at {config.reconcile_full_at!r} UTC, next {first:%Y-%m-%d %H:%M}; incremental each "
        f"{config.reconcile_every_s:g} s, {min(passes)} passes by schedule on each server"
    )


async def _scheduled(site: Site, index: int) -> list[str]:
    rows = await operations.runs_of(site.config, index, 100)
    return [row["state"] for row in rows if row["requested_by"] == "schedule" and row["state"] != "INCOMPLETE"]


async def duplicates(site: Site) -> str:
    """Check that the metric of duplicate entries is there and 0, and so is a count of the rows themselves."""
    await _posted(site, "duplicates")
    told = await site.samples(site.stack.nodes_of("reconciler"), "duplicate_ledger_entries")
    require(told, "no process reports duplicate_ledger_entries")
    counted, entries = 0, 0
    for server in site.config.servers:
        row = await site.as_auditor(server, "duplicates")
        counted, entries = counted + int(row["duplicates"]), entries + int(row["entries"])
    require(entries, "there is no entry to look at")
    require(not counted, f"{counted} duplicate entries in the tables")
    above = {labels["server"]: value for labels, value in told if value}
    require(not above, f"duplicate_ledger_entries is not 0: {above}")
    return f"metric 0 on {len(told)} servers; 0 among {entries} rows counted here"


# -- interface -------------------------------------------------------------------------------------------


async def endpoints(site: Site) -> str:
    """Every process is alive, ready and gives metrics."""
    series = 0
    for node in site.service_nodes():
        for path in ("/livez", "/readyz"):
            status = await asyncio.to_thread(_status, site, node, path)
            require(status == 200, f"{node} answers {path} with {status}")
        text = await asyncio.to_thread(site.scrape, node)
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        require(lines, f"the metrics of {node} are empty")
        series += len(lines)
    return f"{len(site.service_nodes())} processes alive and ready, {series} series"


def _status(site: Site, node: str, path: str) -> int:
    try:
        return probe.http_status(site.stack.port(node), path, 5.0)
    except probe.NoAnswer as error:
        raise Failed(f"{node} does not answer {path}: {error}") from error


async def latency(site: Site) -> str:
    """Check that the latency histogram can be scraped, resolves the target, and has its p99 below it."""
    await site.deposits(site.wallets, "latency")
    for _ in range(READS // SHARDS):
        replies = await asyncio.gather(*(site.read(f"/v1/wallets/{user}/balance") for user in site.wallets))
        require(all(reply.status == 200 for reply in replies), _statuses("balance reads", replies))
    buckets = await site.samples(site.apis, "http_request_duration_seconds_bucket")
    target_s = LATENCY_TARGET_MS / 1000
    edges = {float(labels["le"]) for labels, _ in buckets}
    require(target_s in edges, f"the histogram has no bucket up to {target_s:g} s: the alert could not be told")
    bound_s, count = quantile_bound(buckets, 0.99)
    require(count >= P99_SAMPLES_MIN, f"only {count} requests were observed; {P99_SAMPLES_MIN} are needed for a p99")
    require(bound_s <= target_s, f"p99 of {count} requests is above {_edge_below(edges, bound_s) * 1000:g} ms")
    return f"p99 at most {bound_s * 1000:g} ms by the histogram of {count} requests; target {LATENCY_TARGET_MS:g} ms"


def _edge_below(edges: set[float], edge: float) -> float:
    return max((other for other in edges if other < edge), default=0.0)


async def idempotency(site: Site) -> str:
    """Send a key twice, to two processes: money moves once, and another body under the key is refused."""
    user = site.first_wallet
    first = await site.deposit(user, "again")
    require(first.status == 202, _statuses("a deposit", [first]))
    second = await site.deposit(user, "again", api=site.apis[-1])
    said, again = answered(first), answered(second)
    require(second.status == 202 and again.get("replayed") is True, f"the same key was not replayed: {again}")
    require(said["seq"] == again["seq"], f"the same key has two entries: seq {said['seq']} and {again['seq']}")
    other = await site.deposit(user, "again", AMOUNT_MINOR + 1)
    require(other.status == 409, f"another body under a used key was answered {other.status}, not 409")
    server = site.config.servers[site.config.routing[user % SHARDS]]
    count = (await site.as_auditor(server, "entries_of_key", user, f"{site.run_id}-again"))[0]
    require(count == 1, f"the key has {count} entries")
    return f"seq {said['seq']} replayed by {site.apis[-1]}, 1 entry, another body refused with 409"


async def rate_limit(site: Site) -> str:
    """Flood with one user's own token: it is refused with 429 beyond its burst, and another user is not."""
    hasty, patient = site.wallets[1], site.wallets[2]
    await site.deposits([hasty, patient], "limit")
    token = site.stack.token(Scope.WALLET, user_id=hasty)
    path = f"/v1/wallets/{hasty}/balance"
    count = site.config.rate_limit_burst + FLOOD_EXTRA
    wires = list(site.wires.values())
    request = get(path, token)
    replies = await asyncio.gather(*(wires[n % len(wires)].exchange(request) for n in range(count)))
    refused = sum(reply.status == 429 for reply in replies)
    served = sum(reply.status == 200 for reply in replies)
    require(refused + served == count, _statuses("reads of one user", replies))
    require(refused, f"{count} reads of one user at once were all answered; {site.config.rate_limit_burst} are allowed")
    calm = await site.read(f"/v1/wallets/{patient}/balance", token=site.stack.token(Scope.WALLET, user_id=patient))
    require(calm.status == 200, f"another user was answered {calm.status} meanwhile")
    return f"of {count} reads at once {served} were answered and {refused} refused with 429; another user was served"


# -- durability ------------------------------------------------------------------------------------------


async def durability(site: Site) -> str:
    """Check that a commit is on disk when it is acknowledged."""
    for server in site.config.servers:
        (row,) = await site.as_owner(server, "durability")
        require(row["fsync"] == "on", f"fsync is {row['fsync']} on {server.name}")
        require(row["full_page_writes"] == "on", f"full_page_writes is {row['full_page_writes']} on {server.name}")
        require(
            row["synchronous_commit"] in ("on", "remote_apply"),
            f"synchronous_commit is {row['synchronous_commit']} on {server.name}",
        )
    return f"fsync, full_page_writes and synchronous_commit are on, on {len(site.config.servers)} servers"


async def replication(site: Site) -> str:
    """Each server has a synchronous standby that is not more than 10 s behind."""
    lags = []
    idle = 0
    for server in site.config.servers:
        (row,) = await site.as_owner(server, "standbys")
        if not row["wanted"] and not row["streaming"]:
            idle += 1
            continue
        require(row["synchronous"], f"no synchronous standby follows {server.name} (wanted {row['wanted']!r})")
        require(row["lag_s"] <= STANDBY_LAG_MAX_S, f"a standby of {server.name} is {row['lag_s']:.1f} s behind")
        lags.append(row["lag_s"])
    servers = len(site.config.servers)
    if idle == servers:
        raise CannotRun(
            f"replication is off: none of {servers} servers names or has a standby (pg_stat_replication is empty)"
        )
    require(not idle, f"{idle} of {servers} servers have no standby")
    return f"a synchronous standby for each of {servers} servers, at most {max(lags):.1f} s behind"


async def backups(site: Site) -> str:
    """Each server archives its log, and did so within the recovery point."""
    off, ages = 0, []
    for server in site.config.servers:
        (row,) = await site.as_owner(server, "archive")
        if row["mode"] == "off":
            off += 1
            continue
        require(not row["failing"], f"the newest attempt of {server.name} to archive its log failed")
        age_s = math.inf if row["age_s"] is None else row["age_s"]
        require(
            age_s <= ARCHIVE_AGE_MAX_S, f"{server.name} archived nothing for {age_s:.0f} s; {ARCHIVE_AGE_MAX_S:g} s"
        )
        ages.append(age_s)
    servers = len(site.config.servers)
    if off == servers:
        raise CannotRun(
            f"no server archives its log (archive_mode is off on {servers}), so there is no backup to look at"
        )
    require(not off, f"{off} of {servers} servers do not archive their log")
    return f"{servers} servers archive their log, the oldest {max(ages):.0f} s ago"


async def _posted(site: Site, key: str) -> None:
    """Deposit into one wallet of each shard and wait until that is in every store. Raises Failed and NotDrained."""
    replies = await site.deposits(site.wallets, key)
    require(all(reply.status == 202 for reply in replies), _statuses("deposits into one wallet a shard", replies))
    await drain(site.config, DRAIN_TIMEOUT_S, site.show)


# -- shared ----------------------------------------------------------------------------------------------


def _few(items: list[str] | list[int], most: int = 5) -> str:
    more = len(items) - most
    return ", ".join(map(str, items[:most])) + (f" and {more} more" if more > 0 else "")


def _statuses(what: str, replies: list[Reply]) -> str:
    return f"{what}: {statuses(replies)}"


def statuses(replies: Sequence[Reply]) -> str:
    """Return how many answers had which status, as "202 98 times, 503 2 times"."""
    counts: dict[int, int] = {}
    for reply in replies:
        counts[reply.status] = counts.get(reply.status, 0) + 1
    return ", ".join(f"{status} {count} times" for status, count in sorted(counts.items()))
