"""Traces: one tree of spans from the request through Postgres and Kafka to the payout (W3C Trace Context).

Whether a request is traced is decided once, where it enters: by its own `traceparent`, or by chance
(`trace_sample`). From there the decision travels as the string `traceparent`: in the outbox row, in the Kafka
header, in the order. Nothing is paid for what is not sampled but a look at the last two characters.
"""

import contextlib
import random
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from reference.config import ServiceConfig

CURRENT: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""The `traceparent` of the request or message that this task works on."""

SPAN_FILE_MAX_BYTES: Final = 256 * 1024 * 1024
"""A process writes no more spans than this into its file."""
EXPORT_EVERY_MS: Final = 1_000
SPANS_WAITING_MAX: Final = 8_192

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Attributes = Mapping[str, str | int | float | bool]


class SpanFile(SpanExporter):
    """Writes spans as one JSON object a line, for places without a collector."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._left = SPAN_FILE_MAX_BYTES - path.stat().st_size
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append the spans; once the file is full they are dropped."""
        with self._lock:
            if self._file.closed:
                return SpanExportResult.FAILURE
            for span in spans:
                line = span.to_json(indent=None) + "\n"
                self._left -= len(line)
                if self._left < 0:
                    return SpanExportResult.FAILURE
                self._file.write(line)
            self._file.flush()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


class Tracing:
    """Makes the spans of one process; does nothing where no exporter is configured."""

    def __init__(self, config: ServiceConfig, process: str) -> None:
        self._sample = config.trace_sample
        exporter: SpanExporter | None = None
        if config.otlp_endpoint is not None:
            # A quarter of a second to load, which every process without a collector would pay at its start.
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

            exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint)
        elif config.trace_folder is not None:
            exporter = SpanFile(Path(config.trace_folder) / f"{process}.jsonl")
        self._provider: TracerProvider | None = None
        if exporter is not None:
            self._provider = TracerProvider(
                resource=Resource.create({"service.name": "ledgerproof", "service.instance.id": process}),
                sampler=ALWAYS_ON,  # whoever asks for a span has decided
            )
            self._provider.add_span_processor(
                BatchSpanProcessor(exporter, max_queue_size=SPANS_WAITING_MAX, schedule_delay_millis=EXPORT_EVERY_MS)
            )
            self._tracer = self._provider.get_tracer("ledgerproof")

    def enter(self, name: str, traceparent: str | None, attributes: Attributes) -> Span | None:
        """Begin the span of a request; None if it is not traced. Its `traceparent` becomes CURRENT either way.

        A header that is not a traceparent is ignored, as the recommendation asks.
        """
        if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
            traceparent = None
        if self._provider is None or (not is_sampled(traceparent) if traceparent else random.random() >= self._sample):  # noqa: S311
            CURRENT.set(traceparent)
            return None
        span = self._tracer.start_span(name, _parent(traceparent), kind=SpanKind.SERVER, attributes=dict(attributes))
        CURRENT.set(traceparent_of(span))
        return span

    def leave(self, span: Span, attributes: Attributes, *, failed: bool) -> None:
        """End the span of a request."""
        span.set_attributes(dict(attributes))
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def record(
        self,
        name: str,
        traceparent: str | None,
        *,
        kind: SpanKind,
        started_ns: int,
        ended_ns: int,
        attributes: Attributes,
    ) -> str | None:
        """Record a span that is over, below a sampled `traceparent`; return its own, or the one given.

        Times are Unix nanoseconds.
        """
        if self._provider is None or not is_sampled(traceparent):
            return traceparent
        span = self._tracer.start_span(
            name, _parent(traceparent), kind=kind, attributes=dict(attributes), start_time=started_ns
        )
        span.end(ended_ns)
        return traceparent_of(span)

    def close(self) -> None:
        """Hand over what is waiting."""
        if self._provider is not None:
            self._provider.shutdown()


@contextlib.contextmanager
def working_on(traceparent: str | None) -> Iterator[None]:
    """Say what this task works on, for its log lines and what it causes."""
    token = CURRENT.set(traceparent)
    try:
        yield
    finally:
        CURRENT.reset(token)


def is_sampled(traceparent: str | None) -> bool:
    """Return whether spans are wanted below a (valid) traceparent."""
    return traceparent is not None and traceparent[-1] in "13579bdf"


def traceparent_of(span: Span) -> str:
    """Return a span's context in the header's form."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id_of(traceparent: str) -> str:
    """Return the trace a traceparent belongs to."""
    return traceparent[3:35]


def span_fields(traceparent: str | None) -> dict[str, Any]:
    """Return the log fields (ECS) that lead from a log line to its trace."""
    if traceparent is None:
        return {}
    return {"trace": {"id": trace_id_of(traceparent)}, "span": {"id": traceparent[36:52]}}


def _parent(traceparent: str | None) -> Context:
    if traceparent is None:
        return Context()
    context = SpanContext(
        trace_id=int(traceparent[3:35], 16),
        span_id=int(traceparent[36:52], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(traceparent[53:55], 16)),
    )
    return trace.set_span_in_context(NonRecordingSpan(context), Context())
