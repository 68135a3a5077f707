"""Dead letters: what consumers could not apply, why, and what people did about it.

`events.dlq` is a journal. A consumer appends a *letter*: the message as it was, behind headers that tell cause, group
and origin. Replaying or dropping a letter appends a *resolution* that names it. Nothing is ever changed, so what was
done stays known as long as the letter itself.
"""

from collections.abc import Collection
from typing import Any

import msgspec

from reference.bus import Headers, Publisher, Record, read_to_end
from reference.commands import DLQ_TOPIC
from reference.config import ServiceConfig

LETTER_HEADERS = ("cause", "group", "origin")
"""What a consumer puts in front of the message's own headers."""
REPLAYED = "replayed"
DROPPED = "dropped"
LETTERS_MAX = 100_000
"""Letters that one call lists; their contents are not held."""
BATCH = 500


class Letter(msgspec.Struct):
    """One dead letter. `id` is its place in events.dlq."""

    id: str
    cause: str
    group: str
    origin: str
    """Topic, partition and offset of the message."""
    event_id: str
    event_type: str
    key: str
    buried_at_ms: int
    resolution: str | None = None
    """None while it waits; replayed or dropped."""
    resolved_at_ms: int | None = None
    replays: int = 0


class Opened(msgspec.Struct):
    """A letter with its content, as text with what is no UTF-8 escaped."""

    letter: Letter
    headers: list[tuple[str, str]]
    """The message's own headers."""
    value: str
    value_bytes: int


class UnknownLetter(Exception):
    """There is no letter of this id."""


class NotReplayed(Exception):
    """The broker did not take a letter back; nothing is recorded of those it did not take."""


def letters(config: ServiceConfig) -> list[Letter]:
    """Return all letters, oldest first, with what became of them. Raises KafkaException or TimeoutError."""
    found: dict[str, Letter] = {}
    resolutions: list[tuple[str, str, int]] = []
    for record in read_to_end(config, DLQ_TOPIC):
        headers = _named(record)
        if "resolution" in headers:
            resolutions.append((headers["letter"], headers["resolution"], record.timestamp()[1]))
        elif len(found) < LETTERS_MAX:
            letter = _letter(record)
            found[letter.id] = letter
    for letter_id, resolution, at_ms in resolutions:
        known = found.get(letter_id)
        if known is None:
            continue
        known.replays += resolution == REPLAYED
        if known.resolved_at_ms is None or at_ms >= known.resolved_at_ms:
            known.resolution, known.resolved_at_ms = resolution, at_ms
    return sorted(found.values(), key=lambda letter: (letter.buried_at_ms, letter.id))


def open_letter(config: ServiceConfig, letter_id: str) -> Opened:
    """Return one letter with its content. Raises UnknownLetter, KafkaException or TimeoutError."""
    by_id = {letter.id: letter for letter in letters(config)}
    if letter_id not in by_id:
        raise UnknownLetter(letter_id)
    for record in read_to_end(config, DLQ_TOPIC):
        if _id(record) == letter_id:
            value: bytes = record.value() or b""
            own = [(name, _shown(text)) for name, text in _own_headers(record)]
            return Opened(by_id[letter_id], own, _shown(value), len(value))
    raise UnknownLetter(letter_id)


async def replay(config: ServiceConfig, wanted: Collection[str], name: str = "dlq-replay") -> int:
    """Send letters to the topics they came from, with key, headers and event id, and record that; return how many.

    Consumers apply an event once whatever arrives, so a letter that is sent again harms nobody; one whose cause is
    not repaired comes back as a new letter. Raises NotReplayed if the broker does not take them.
    """
    return await _resolve(config, wanted, REPLAYED, name)


async def drop(config: ServiceConfig, wanted: Collection[str], name: str = "dlq-drop") -> int:
    """Record that letters need not be replayed; return how many. They stay in the topic. Raises NotReplayed."""
    return await _resolve(config, wanted, DROPPED, name)


async def _resolve(config: ServiceConfig, wanted: Collection[str], resolution: str, name: str) -> int:
    publisher = Publisher(config, name)
    done = 0
    try:
        batch: list[Any] = []
        for record in read_to_end(config, DLQ_TOPIC):
            if _id(record) in wanted and "resolution" not in _named(record):
                batch.append(record)
            if len(batch) == BATCH:
                done += await _send(publisher, batch, resolution)
                batch = []
        return done + await _send(publisher, batch, resolution)
    finally:
        publisher.close()


async def _send(publisher: Publisher, batch: list[Any], resolution: str) -> int:
    if resolution == REPLAYED:
        places = await publisher.publish([_original(record) for record in batch])
        taken = [record for record, place in zip(batch, places, strict=True) if place is not None]
    else:
        taken = batch
    marks = await publisher.publish([_mark(record, resolution) for record in taken])
    if len(taken) < len(batch) or None in marks:
        raise NotReplayed(f"the broker took {len(taken)} of {len(batch)} letters; try again")
    return len(taken)


def _original(record: Any) -> Record:
    topic = _named(record)["origin"].split("/")[0]
    headers: Headers = [*_own_headers(record), ("replayed-from", _id(record).encode())]
    return topic, record.key(), record.value() or b"", headers


def _mark(record: Any, resolution: str) -> Record:
    event_id = _named(record).get("event-id", "")
    headers: Headers = [
        ("resolution", resolution.encode()),
        ("letter", _id(record).encode()),
        ("event-id", event_id.encode()),
    ]
    return DLQ_TOPIC, record.key(), b"", headers


def _letter(record: Any) -> Letter:
    headers = _named(record)
    return Letter(
        id=_id(record),
        cause=headers.get("cause", ""),
        group=headers.get("group", ""),
        origin=headers.get("origin", ""),
        event_id=headers.get("event-id", ""),
        event_type=headers.get("event-type", ""),
        key=_shown(record.key() or b""),
        buried_at_ms=record.timestamp()[1],
    )


def _id(record: Any) -> str:
    return f"{record.partition()}-{record.offset()}"


def _own_headers(record: Any) -> Headers:
    """Return the message's own headers: a consumer puts exactly LETTER_HEADERS in front of them."""
    return list(record.headers() or [])[len(LETTER_HEADERS) :]


def _named(record: Any) -> dict[str, str]:
    return {name: _shown(value) for name, value in reversed(record.headers() or [])}


def _shown(value: bytes | str | None) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else (value or "")
