"""What one look cannot tell: it is asked for, in bounds, and named only when the answer leaves no innocent reading.

Rows of a moved shard lie on two servers, a relay that died sends again what was sent long ago, a record takes its time.
None of that is an anomaly, and none of it is decided from one server alone.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from invariants.anomalies.common import Witness
from invariants.anomalies.events import WALLET_EVENTS
from invariants.live import readmodel
from invariants.live.flow import parsed
from invariants.live.rows import Entry, Event, Told
from ledgerproof.live.others import Unseen
from ledgerproof.live.server import Delta, Server
from reference.errors import LedgerError
from reference.routing import SHARDS
from reference.store import DRIVER_ERRORS

if TYPE_CHECKING:
    from ledgerproof.live.auditor import Auditor

ASKED_MAX: Final = 1_000
"""Suspects of one sort that one poll asks for."""
OVERDUE_S: Final = 3.0
"""An event whose record was not seen for this long is looked for."""
STRAY_POLLS: Final = 8
"""A row on a server that does not hold its shard has this many looks to be found at its own."""
ESCROW_POLLS: Final = 3
"""A match that is settled and whose escrow is not zero is looked at again after so many polls."""
ESCROW_MATCHES_MAX: Final = 5
BETS_MAX: Final = 20_000


class Suspects:
    """The suspects of one audit; `examine` is called when every server was just read."""

    def __init__(self, audit: "Auditor") -> None:
        self._audit = audit
        self.strays: dict[tuple[str, int, int], tuple[Entry, int]] = {}
        """Rows on a server that does not hold their shard, with how many looks were made since."""
        self._silent: dict[tuple[int, int], Entry] = {}
        self._unfounded_since: dict[tuple[int, int], int] = {}
        self._open_escrow: dict[str, tuple[int, int]] = {}
        """Settled match → its escrow, and the poll in which it was first seen so."""
        self._final: dict[str, bool] = {}

    # -- inside of a server's snapshot

    def stray(self, entries: Iterable[Entry]) -> None:
        """Note rows that a server does not hold the shard of."""
        for entry in entries:
            known = self._audit.ledger.recent.get((entry.user, entry.seq))
            if known is None or known[0] != entry.digest:
                self.strays.setdefault((entry.server, entry.user, entry.seq), (entry, 0))

    async def of_server(self, server: Server, here: set[int], delta: Delta) -> None:
        """Look in a server's own snapshot for entries of events, and for events of entries, that were not read."""
        flow = self._audit.flow
        self._final.update(delta.settlements)
        places = [place for place in flow.unfounded if place[0] % SHARDS in here and place[0] > 0][:ASKED_MAX]
        if places:
            # From the wallet's newest known row on, so that the replay misses none.
            wallets = self._audit.ledger.wallets
            spans = [(user, min(seq, wallets[user].seq + 1 if user in wallets else 1), seq) for user, seq in places]
            there = await server.entries_between(spans)
            self._audit.findings.add(self._audit.ledger.feed(there))
            self._audit.ledger.again.clear()
            self._audit.ledger.fresh.clear()
            self._audit.findings.add(flow.feed_entries(there))
            found = {(entry.user, entry.seq) for entry in there}
            for place in places:
                if place not in found:
                    self._audit.findings.add([flow.phantom(place)])
        if delta.all_events and flow.entries:
            await self._events_of(server)
        await self._changed(server, delta, here)

    async def _changed(self, server: Server, delta: Delta, here: set[int]) -> None:
        """A25: outbox rows written again must say what they said or, where that is forgotten, what is stored."""
        flow, findings = self._audit.flow, self._audit.findings
        verdicts = {number: flow.rewritten(server.name, number, digest) for number, digest in delta.changed.items()}
        wanted = [number for number, other in verdicts.items() if other is not False][:ASKED_MAX]
        if not wanted:
            return
        events = [Event(server.name, *row) for row in await server.fetch("late_events", wanted)]
        findings.add([flow.changed(event) for event in events if verdicts[event.id]])
        places = {
            place: event
            for event in events
            if verdicts[event.id] is None and (place := entry_place(event)) is not None and place[0] % SHARDS in here
        }
        entries = await server.entries_between([(user, seq, seq) for user, seq in places]) if places else []
        for entry in entries:
            findings.add(flow.compare(entry, places[(entry.user, entry.seq)]))

    async def _events_of(self, server: Server) -> None:
        """Look for the events of entries left over: what one snapshot showed of ledger and outbox must go together."""
        mine = list(flow_entries(self._audit, server.name))[:ASKED_MAX]
        if not mine:
            return
        recent = server.events_by_poll[0] if server.events_by_poll else server.first_event
        await self._ask_events(server, mine, recent)
        for entry in mine:
            place = (entry.user, entry.seq)
            if place in self._audit.flow.entries:
                # Perhaps written before its shard was moved here, or before the search began.
                self._silent[place] = entry

    async def _ask_events(self, server: Server, entries: list[Entry], after: int) -> None:
        users, seqs = [entry.user for entry in entries], [entry.seq for entry in entries]
        rows = await server.fetch("events_of_entries", users, seqs, after)
        self._audit.findings.add(self._audit.flow.paired_with([Event(server.name, *row) for row in rows]))

    # -- when all servers were read

    async def examine(self) -> None:
        """Decide what can be decided now. What a server does not answer stays a suspect."""
        try:
            await self._silent_entries()
            await self._strangers()
            await self._overdue()
            await self._escrow()
            await self._judge_strays()
        except (LedgerError, *DRIVER_ERRORS) as error:
            self._audit.findings.note(f"suspects could not be asked for: {type(error).__name__}: {error}")
        except Unseen as error:
            self._audit.findings.cannot_see("kafka", str(error))

    async def look_up(self, source: str, unsure: list[Told]) -> None:
        """A11: compare balances with entries that the audit does not remember, or has not seen."""
        for server in self._audit.servers:
            mine = [row for row in unsure if self._audit.holder[row.user % SHARDS] == server.name]
            if not mine:
                continue
            try:
                async with server.snapshot():
                    balances = await server.balances_at(mine)
            except (LedgerError, *DRIVER_ERRORS) as error:
                self._audit.findings.cannot_see(server.name, f"{type(error).__name__}: {error}")
                continue
            self._audit.findings.add(readmodel.settle(source, mine, balances))

    async def _silent_entries(self) -> None:
        """A21: no server has an event of the entry."""
        flow = self._audit.flow
        left = [entry for place, entry in self._silent.items() if place in flow.entries][:ASKED_MAX]
        self._silent.clear()
        if not left:
            return
        for server in self._audit.servers:
            async with server.snapshot():
                await self._ask_events(server, left, 0)
        for entry in left:
            if (entry.user, entry.seq) in flow.entries:
                self._audit.findings.add([flow.silent(entry)])

    async def _strangers(self) -> None:
        """A24: no server has the event of the record."""
        flow = self._audit.flow
        left = list(flow.strangers)[:ASKED_MAX]
        for thorough in (False, True):
            for server in self._audit.servers:
                left = [event_id for event_id in left if event_id in flow.strangers]
                if not left:
                    return
                recent = server.events_by_poll[0] if server.events_by_poll else server.first_event
                async with server.snapshot():
                    rows = await server.fetch("events_by_id", left, 0 if thorough else recent)
                for row in rows:
                    self._audit.findings.add(flow.explained(Event(server.name, *row)))
        for event_id in left:
            if event_id in flow.strangers:
                self._audit.findings.add([flow.unknown(event_id)])

    async def _overdue(self) -> None:
        """A21: an event is marked as published, and its topic, read to its end after that, does not have it.

        A relay marks after it has sent, so an event that was there before the audit, marked or not, may have its record
        before the place where the audit began to read.
        """
        flow = self._audit.flow
        now_s = time.monotonic()
        due = flow.overdue(now_s - OVERDUE_S, ASKED_MAX)
        marked: list[Event] = []
        old: set[str] = set()
        for server in self._audit.servers:
            mine = {event.id: event for event in due if event.server == server.name}
            if not mine:
                continue
            async with server.snapshot():
                published = {row["id"] for row in await server.fetch("published", list(mine))}
            for number, event in mine.items():
                if number in published:
                    marked.append(event)
                    old |= {event.event_id} if number <= server.newest_before else set()
                else:
                    flow.wait_on(event.event_id, now_s)
        if not marked:
            return
        records, told = await asyncio.to_thread(self._audit.topics.read_on)
        self._audit.findings.add(flow.feed_records(records))
        await self.look_up("user.balance.updated", told)
        for event in marked:
            if event.event_id in old:
                flow.forget(event.event_id)
            elif event.event_id in flow.unsent:
                self._audit.findings.add([flow.lost(event)])

    async def _judge_strays(self) -> None:
        """A31: a row on a server that does not hold its shard, and that its holder does not have."""
        for place, (entry, polls) in list(self.strays.items())[:ASKED_MAX]:
            if await self._held_too(entry):
                del self.strays[place]
            elif polls < STRAY_POLLS:
                self.strays[place] = (entry, polls + 1)
            else:
                del self.strays[place]
                text = (
                    f"seq {entry.seq} of user {entry.user} (key {entry.key}) is on {entry.server}, which does not hold"
                    f" shard {entry.shard}; {self._audit.holder[entry.user % SHARDS]} does, and has no such row"
                )
                self._audit.findings.add([Witness("A31", text, entry.key, entry.user, entry.seq)])

    async def _held_too(self, entry: Entry) -> bool:
        """Return whether the holder of its shard has the same row."""
        known = self._audit.ledger.recent.get((entry.user, entry.seq))
        if known is not None:
            return known[0] == entry.digest
        for server in self._audit.servers:
            if server.name == self._audit.holder[entry.user % SHARDS]:
                async with server.snapshot():
                    rows = await server.entries_between([(entry.user, entry.seq, entry.seq)])
                return any(row.digest == entry.digest for row in rows)
        return False

    async def _escrow(self) -> None:
        """A30: a settled match holds money, apart from bets that came too late and are about to be refunded."""
        ledger, polls = self._audit.ledger, self._audit.polls
        held = {match: ledger.escrow.get(match, 0) for match, done in self._final.items() if done}
        suspects: list[str] = []
        for match_id, amount in held.items():
            if amount == 0:
                self._open_escrow.pop(match_id, None)
                continue
            known = self._open_escrow.get(match_id)
            if known is None or known[0] != amount:
                self._open_escrow[match_id] = (amount, polls)
            elif polls - known[1] >= ESCROW_POLLS:
                suspects.append(match_id)
                self._open_escrow[match_id] = (amount, polls)
        for match_id in suspects[:ESCROW_MATCHES_MAX]:
            amount = held[match_id]
            waiting = await self._in_flight(match_id)
            if waiting is not None and waiting != amount and ledger.escrow.get(match_id, 0) == amount:
                text = f"match {match_id} is final and its escrow still holds {amount - waiting}"
                self._audit.findings.add([Witness("A30", text)])

    async def _in_flight(self, match_id: str) -> int | None:
        """Return the reserves of bets that no settlement went through and that are not refunded; None: too many."""
        bets: dict[str, int] = {}
        for server in self._audit.servers:
            here = [part.shard for part in server.partitions.values() if part.here]
            async with server.snapshot():
                rows = await server.fetch("in_flight", match_id, here, BETS_MAX)
            if len(rows) == BETS_MAX:
                return None
            bets |= {row["bet_id"]: row["reserve"] for row in rows}
        for server in self._audit.servers:
            if not bets:
                return 0
            async with server.snapshot():
                for row in await server.fetch("settled_orders", list(bets)):
                    bets.pop(row["bet_id"], None)
        return sum(bets.values())


def entry_place(event: Event) -> tuple[int, int] | None:
    """Return the user and seq that a wallet's event names, None for another event or one that names none."""
    payload = parsed(event.payload)
    user, seq = payload.get("user_id"), payload.get("seq")
    if event.event_type not in WALLET_EVENTS or not isinstance(user, int) or not isinstance(seq, int):
        return None
    return (user, seq) if 0 < user < 2**63 and 0 < seq < 2**63 else None


def flow_entries(audit: "Auditor", server: str) -> Iterable[Entry]:
    """Return the entries of a server whose event was not read yet."""
    return (entry for entry in audit.flow.entries.values() if entry.server == server)
