"""The live audit: look at every store again and again, feed what is new to the folds, and name what they find.

    Redis and Kafka first → each server in one snapshot: entries, outbox, projection, some wallets as wholes
    → ask for what could not be told → compare Redis, look for what is overdue

Redis and the topics are written after the ledger, so they are read before it: what they tell that the ledger does not
have is then wrong and not merely early. What cannot be read now is caught up with later, from where it was left.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from invariants.anomalies.common import Witness
from invariants.live import readmodel
from invariants.live.flow import Flow
from invariants.live.ledger import Ledger, Sums, TooManyWallets
from invariants.live.rows import Entry, Record, Told
from ledgerproof.live.findings import Findings
from ledgerproof.live.others import Cached, Topics, Unseen
from ledgerproof.live.server import ROUND_POLLS, ROWS_MAX, Delta, Partition, Server, sums_of
from ledgerproof.live.suspects import Suspects
from reference.config import ServiceConfig
from reference.errors import LedgerError
from reference.routing import SHARDS
from reference.store import DRIVER_ERRORS

SWEEP_ROWS: Final = 400
"""Entries of a server that one look verifies as part of whole wallets."""
PAGE_ROWS: Final = 200_000
"""The same where a whole shard is verified."""


Take = Callable[[Server, list[Sums]], Awaitable[None]]


class Auditor:
    """One audit of one service. `poll` looks once; its state is only in memory and begins anew with each audit."""

    def __init__(self, config: ServiceConfig) -> None:
        self.findings = Findings()
        self.ledger, self.flow = Ledger(), Flow()
        self.servers = [Server(config, server) for server in config.servers]
        self.topics = Topics(config)
        self.cached = Cached(config, ROUND_POLLS)
        self.suspects = Suspects(self)
        self.polls = 0
        self.verified = 0
        """Entries that were read a second time, as part of a whole wallet, and were the same."""
        self.rounds = 0
        """How often every wallet was verified so."""
        self.told = 0
        self.holder: list[str | None] = [None] * SHARDS
        """Server of each shard, as of this poll."""
        self.money_known = True
        """False after a rewrite: what the accounts hold is not known by addition any more."""
        self._off = 0
        """By how much money was not conserved when that was last said."""
        self._place: dict[str, tuple[int, int]] = {}
        self._reading = False

    async def poll(self) -> None:
        """Look at everything once. What cannot be read is said in `findings` and read the next time."""
        began_s = time.monotonic()
        if not self._reading:
            await self._begin_topics()
        told, cache_read = await self._read_cache()
        records, updates = await self._read_topics()
        self.findings.add(self.flow.feed_records(records))
        seen: set[str] = set()
        before, self.holder = self.holder, [None] * SHARDS
        for server in self.servers:
            if await self._audited(server):
                seen.add(server.name)
        self._note_moves(before)
        if cache_read:
            await self._compare("redis", told, seen)
        await self._compare("user.balance.updated", updates, seen)
        if len(seen) == len(self.servers):
            await self.suspects.examine()
            if self.money_known and None not in self.holder and self.ledger.off != self._off:
                self._off = self.ledger.off
                self.findings.add([self.ledger.money()] if self._off else [])
        self.polls += 1
        self._measure(time.monotonic() - began_s)

    def close(self) -> None:
        """Give up every connection."""
        for server in self.servers:
            server.close()
        self.topics.close()
        self.cached.close()

    # -- Kafka and Redis

    async def _begin_topics(self) -> None:
        try:
            await asyncio.to_thread(self.topics.begin)
        except Unseen as error:
            self.findings.cannot_see("kafka", str(error))
            if self.polls:
                return
            # Records from before cannot be told from lost ones later: nothing is begun before Kafka is there.
            raise
        self._reading = True

    async def _read_topics(self) -> tuple[list[Record], list[Told]]:
        try:
            records, told, _ = await asyncio.to_thread(self.topics.read)
        except Unseen as error:
            self.findings.cannot_see("kafka", str(error))
            return [], []
        self.findings.sees("kafka")
        self.findings.metrics.rows.labels("records").inc(len(records))
        return records, told

    async def _read_cache(self) -> tuple[list[Told], bool]:
        try:
            told = await asyncio.to_thread(self.cached.read)
        except Unseen as error:
            self.findings.cannot_see("redis", str(error))
            return [], False
        self.findings.sees("redis")
        for text in self.cached.malformed:
            self.findings.add([Witness("A11", f"redis holds a value that is no balance: {text}")])
        self.cached.malformed.clear()
        return told, True

    async def _compare(self, source: str, told: list[Told], seen: set[str]) -> None:
        """A11: compare what was read before the servers with what they have; wallets of unseen servers are left out."""
        judged = [row for row in told if self.holder[row.user % SHARDS] in seen]
        self.told += len(judged)
        found, unsure = readmodel.compare(self.ledger, source, judged)
        self.findings.add(found)
        await self.suspects.look_up(source, unsure)

    # -- one server

    async def _audited(self, server: Server) -> bool:
        """Look at a server; return whether that succeeded."""
        try:
            async with server.snapshot():
                if not server.started:
                    await self._baseline(server)
                else:
                    await self._look(server)
        except (LedgerError, *DRIVER_ERRORS) as error:
            self.findings.cannot_see(server.name, f"{type(error).__name__}: {error}")
            return False
        except TooManyWallets as error:
            self.findings.missed(str(error))
            return False
        self.findings.sees(server.name)
        return True

    async def _baseline(self, server: Server) -> None:
        """Take over all wallets as they are; those that are wrong already are replayed for their witnesses.

        A server that breaks off meanwhile is taken over from the beginning the next time: wallets without what they
        moved, or what they moved twice, would look like money from nowhere.
        """
        partitions, first = await server.beginning()
        here = [part.shard for part in partitions if part.here]
        wallets: list[Sums] = []

        async def keep(_server: Server, page: list[Sums]) -> None:
            wallets.extend(page)

        for shard in here:
            await self._each_wallet(server, shard, keep)
        accounts = await server.long("accounts", here)
        # Nothing is waited for between here and the end of the taking over.
        server.begin(partitions, first)
        wrong = [sums.user for sums in wallets if not self.ledger.adopt(sums)]
        for row in accounts:
            self.ledger.adopt_account(row["contra"], row["match_id"], int(row["amount"]))
        for shard in here:
            self.holder[shard] = server.name
        for user in wrong:
            await self._replay(server, user)

    async def _each_wallet(self, server: Server, shard: int, take: Take) -> list[int]:
        """Give every wallet of a shard to `take(server, sums)`, in pages; return their numbers."""
        after = 0
        users: list[int] = []
        while True:
            rows = [sums_of(row) for row in await server.long("wallet_sums", shard, after, PAGE_ROWS)]
            cut = sum(sums.rows for sums in rows) >= PAGE_ROWS
            if cut and len(rows) > 1:
                rows.pop()
            elif cut:
                rows = [await self._whole(server, rows[0])]
            if not rows:
                return users
            await take(server, rows)
            users += [sums.user for sums in rows]
            after = rows[-1].user

    async def _whole(self, server: Server, part: Sums) -> Sums:
        """Return the sums of one wallet with more entries than a page; its chain is then only verified by its sums."""
        (row,) = await server.long("prefix_sums", [part.user], [2**62])
        sums = sums_of(row)
        newest = await server.fetchrow("head", part.user)
        return sums._replace(seq=newest["seq"], balance=newest["balance"], broken=part.broken)

    async def _look(self, server: Server) -> None:
        delta = await server.look()
        here = {part.shard for part in delta.partitions if part.here}
        for shard in here:
            self.holder[shard] = server.name
        rows = self.findings.metrics.rows
        rows.labels("entries").inc(len(delta.entries))
        rows.labels("events").inc(len(delta.events))
        rows.labels("projection").inc(len(delta.projection))
        self.suspects.stray(entry for entry in delta.entries if entry.shard not in here)
        fresh = [entry for entry in delta.entries if entry.shard in here]
        self._feed([*fresh, *await self._gaps(server, fresh)])
        await self._verify_again(server)
        await self._verify_shards(server, delta.partitions)
        self.findings.add(self.flow.feed_events(delta.events, time.monotonic()))
        await self.suspects.of_server(server, here, delta)
        await self._projection(server, delta)
        await self._sweep(server, sorted(here))
        server.done(delta)

    def _feed(self, entries: Iterable[Entry]) -> None:
        """Replay entries and let their events be looked for."""
        self.findings.add(self.ledger.feed(entries))
        self.findings.add(self.flow.feed_entries(self.ledger.fresh))
        self.ledger.fresh.clear()

    async def _gaps(self, server: Server, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries between those known and those just read: rows that the look at the ends did not show."""
        seqs: dict[int, list[int]] = {}
        for entry in entries:
            seqs.setdefault(entry.user, []).append(entry.seq)
        spans = []
        for user, read in seqs.items():
            wallet = self.ledger.wallets.get(user)
            after = wallet.seq if wallet else 0
            if (newest := max(read)) > after and newest - after > len({seq for seq in read if seq > after}):
                spans.append((user, after + 1, newest))
        if not spans:
            return []
        known = {(entry.user, entry.seq) for entry in entries}
        return [entry for entry in await server.entries_between(spans) if (entry.user, entry.seq) not in known]

    # -- prefixes that must stay as they are

    async def _verify_again(self, server: Server) -> None:
        """A33: rows came again that are not known: either they are what was read long ago, or they were rewritten."""
        users = sorted({entry.user for entry in self.ledger.again})
        self.ledger.again.clear()
        if users:
            seqs = [self.ledger.wallets[user].seq for user in users]
            await self._judge_sums(server, [sums_of(row) for row in await server.fetch("prefix_sums", users, seqs)])

    async def _verify_shards(self, server: Server, partitions: Sequence[Partition]) -> None:
        """A33: verify every wallet of a partition that is new here, or in which rows were changed or removed."""
        for part in partitions:
            known = server.partitions.get(part.shard)
            if not part.here or (
                known is not None and known.here and known.file == part.file and part.rewrites <= known.rewrites
            ):
                continue
            there = set(await self._each_wallet(server, part.shard, self._judge_page))
            gone = [user for user in self.ledger.wallets if user % SHARDS == part.shard and user not in there]
            await self._judge_sums(server, [Sums(user, 0, 0, 0, 0, 0, 0) for user in gone])

    async def _judge_page(self, server: Server, page: list[Sums]) -> None:
        """Bring wallets up to what a server has of them, then compare them as wholes."""
        spans = []
        for sums in page:
            wallet = self.ledger.wallets.get(sums.user)
            if sums.seq > (known := wallet.seq if wallet else 0):
                spans.append((sums.user, known + 1, sums.seq))
        if spans:
            self._feed(await server.entries_between(spans))
        await self._judge_sums(server, page)

    async def _judge_sums(self, server: Server, page: list[Sums]) -> None:
        for sums in page:
            witness = self.ledger.rewritten(sums)
            if witness is None:
                self.verified += sums.rows
                continue
            changed = await server.fetch("rewritten_rows", sums.user, witness.seq, server.horizon)
            if changed:
                rows = "; ".join(f"seq {r['seq']}: {r['type']} {r['amount']}, balance {r['balance']}" for r in changed)
                witness = Witness("A33", f"{witness.text}; written again: {rows}", None, sums.user, changed[0]["seq"])
            self.findings.add([witness])
            self.money_known = False
            await self._replay(server, sums.user)

    async def _replay(self, server: Server, user: int) -> None:
        """Replay all entries of a wallet that is not right, for what else they prove, and go on from what is there."""
        scratch = Ledger()
        self.findings.add(scratch.feed(await server.entries_between([(user, 1, 2**62)])))
        replayed = scratch.wallets.get(user)
        if replayed is None or replayed.rows >= ROWS_MAX:
            (row,) = await server.fetch("prefix_sums", [user], [2**62])
            self.ledger.adopt(sums_of(row)._replace(seq=self.ledger.wallets[user].seq))
            return
        self.ledger.held += replayed.balance - self.ledger.wallets[user].balance
        self.ledger.wallets[user] = replayed

    async def _sweep(self, server: Server, shards: list[int]) -> None:
        """A33: verify the next wallets of a server as wholes, in turn."""
        if not shards:
            return
        shard, after = self._place.get(server.name, (shards[0], 0))
        rows = [sums_of(row) for row in await server.fetch("wallet_sums", shard, after, SWEEP_ROWS)]
        cut = sum(sums.rows for sums in rows) >= SWEEP_ROWS
        if cut and len(rows) > 1:
            rows.pop()
        elif cut:
            rows = [await self._whole(server, rows[0])]
        await self._judge_page(server, rows)
        if rows:
            self._place[server.name] = (shard, rows[-1].user)
            return
        later = [number for number in shards if number > shard]
        if not later and server is self.servers[0]:
            self.rounds += 1
        self._place[server.name] = (later[0] if later else shards[0], 0)

    async def _projection(self, server: Server, delta: Delta) -> None:
        """A11: changed rows of the projection, read in one snapshot with the ledger."""
        self.told += len(delta.projection)
        found, unsure = readmodel.compare(self.ledger, "projection", delta.projection)
        self.findings.add(found)
        if unsure:
            balances = await server.balances_at(unsure)
            self.findings.add(readmodel.settle("projection", unsure, balances))

    # -- what happened

    def _note_moves(self, before: list[str | None]) -> None:
        for shard, (old, new) in enumerate(zip(before, self.holder, strict=True)):
            if old is not None and new is not None and old != new:
                self.findings.note(f"shard {shard} moved from {old} to {new}")

    def _measure(self, took_s: float) -> None:
        metrics = self.findings.metrics
        metrics.polls.inc()
        metrics.poll_s.set(took_s)
        metrics.last_poll.set_to_current_time()
        metrics.waiting.labels("unsent").set(len(self.flow.unsent))
        metrics.waiting.labels("strangers").set(len(self.flow.strangers))
        metrics.round_s.labels("redis").set(self.cached.lasted_s)
        for kind in ("outbox", "projection"):
            metrics.round_s.labels(kind).set(max(getattr(server, kind).lasted_s for server in self.servers))
        if self.flow.dropped:
            self.findings.missed(f"{self.flow.dropped} rows waited for their counterpart and were too many to keep")
