"""Reads the spans that the processes of a stack wrote, and puts them together to traces."""

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One span. Times are Unix microseconds."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    process: str
    started_us: int
    ended_us: int
    failed: bool
    attributes: dict[str, Any]


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The spans of one request, in the order in which they began."""

    trace_id: str
    spans: list[Span]

    @property
    def root(self) -> Span:
        """Return the span that began first."""
        return self.spans[0]

    @property
    def took_us(self) -> int:
        """Return the time from the beginning of the first span to the end of the last, in microseconds."""
        return max(span.ended_us for span in self.spans) - self.root.started_us

    @property
    def processes(self) -> list[str]:
        """Return the processes that took part, in order of their first span."""
        return list(dict.fromkeys(span.process for span in self.spans))

    def depth_of(self, span: Span) -> int:
        """Return how many of a span's ancestors are in this trace."""
        by_id = {other.span_id: other for other in self.spans}
        depth, parent = 0, span.parent_id
        while parent in by_id and depth < len(by_id):
            depth, parent = depth + 1, by_id[parent].parent_id
        return depth


class _Context(msgspec.Struct, frozen=True):
    trace_id: str
    span_id: str


class _Status(msgspec.Struct, frozen=True):
    status_code: str = "UNSET"


class _Resource(msgspec.Struct, frozen=True):
    attributes: dict[str, Any] = {}


class _Line(msgspec.Struct, frozen=True):
    """A span as the SDK writes it."""

    name: str
    context: _Context
    start_time: str
    end_time: str
    parent_id: str | None = None
    status: _Status = _Status()
    attributes: dict[str, Any] = {}
    resource: _Resource = _Resource()


def read_traces(folder: Path) -> list[Trace]:
    """Return the traces of a folder of span files, newest first.

    A line that is cut off (its process was killed) is left out. Raises OSError if a file cannot be read.
    """
    spans: dict[str, list[Span]] = {}
    decode = msgspec.json.Decoder(_Line).decode
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                try:
                    span = _span(decode(line), path.stem)
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                    continue
                spans.setdefault(span.trace_id, []).append(span)
    traces = [
        Trace(trace_id=trace_id, spans=sorted(own, key=lambda span: (span.started_us, span.ended_us)))
        for trace_id, own in spans.items()
    ]
    return sorted(traces, key=lambda trace: -trace.root.started_us)


def _span(line: _Line, process: str) -> Span:
    return Span(
        trace_id=line.context.trace_id.removeprefix("0x"),
        span_id=line.context.span_id.removeprefix("0x"),
        parent_id=line.parent_id.removeprefix("0x") if line.parent_id else None,
        name=line.name,
        process=str(line.resource.attributes.get("service.instance.id", process)),
        started_us=_micros(line.start_time),
        ended_us=_micros(line.end_time),
        failed=line.status.status_code == "ERROR",
        attributes=line.attributes,
    )


def _micros(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1e6)
