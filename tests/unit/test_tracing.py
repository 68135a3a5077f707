"""Traces and log lines: what is sampled, where spans go, and that one leads to the other."""

import json
import logging
from pathlib import Path

import pytest
from opentelemetry.trace import SpanKind

from reference.config import ServerConfig, ServiceConfig
from reference.routing import even_routing
from reference.service import EcsLines
from reference.tracing import CURRENT, Tracing, is_sampled, trace_id_of, working_on

SAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-01"
UNSAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-00"


def _config(folder: Path | None, sample: float) -> ServiceConfig:
    return ServiceConfig(
        servers=[ServerConfig("pg0", "127.0.0.1", 1)],
        routing=even_routing(1),
        passwords={},
        kafka_bootstrap="127.0.0.1:1",
        redis_host="127.0.0.1",
        redis_port=1,
        trace_sample=sample,
        trace_folder=None if folder is None else str(folder),
    )


def _spans(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "api0.jsonl").read_text().splitlines()]


def test_a_caller_decides_whether_its_request_is_traced(tmp_path) -> None:
    tracing = Tracing(_config(tmp_path, sample=1.0), "api0")
    with working_on(None):
        assert tracing.enter("bets", UNSAMPLED, {}) is None
        assert CURRENT.get() == UNSAMPLED
        span = tracing.enter("bets", SAMPLED, {"user": 7})
        assert span is not None
        assert trace_id_of(CURRENT.get()) == "ab" * 16
        assert CURRENT.get() != SAMPLED
        tracing.leave(span, {"status": 202}, failed=False)
    tracing.close()
    (found,) = _spans(tmp_path)
    assert found["parent_id"] == "0x" + "cd" * 8
    assert found["attributes"] == {"user": 7, "status": 202}


@pytest.mark.parametrize(("sample", "traced"), [(0.0, 0), (1.0, 50)])
def test_without_a_header_chance_decides(tmp_path, sample, traced) -> None:
    tracing = Tracing(_config(tmp_path, sample), "api0")
    with working_on(None):
        spans = [span for _ in range(50) if (span := tracing.enter("bets", None, {})) is not None]
    assert len(spans) == traced
    for span in spans:
        tracing.leave(span, {}, failed=True)
    tracing.close()
    assert [line["status"]["status_code"] for line in _spans(tmp_path)] == ["ERROR"] * traced


@pytest.mark.parametrize(
    "header",
    [
        "",
        "rubbish",
        SAMPLED + "-more",
        SAMPLED.upper(),
        f"00-{'0' * 32}-{'cd' * 8}-01",
        f"ff-{'ab' * 16}-{'cd' * 8}-01",
    ],
)
def test_a_header_that_is_no_traceparent_is_as_none(tmp_path, header) -> None:
    tracing = Tracing(_config(tmp_path, sample=0.0), "api0")
    with working_on("before"):
        assert tracing.enter("bets", header, {}) is None
        assert CURRENT.get() is None


def test_what_is_over_is_recorded_below_its_cause_and_passes_the_cause_on(tmp_path) -> None:
    tracing = Tracing(_config(tmp_path, sample=0.0), "api0")
    own = tracing.record(
        "post", SAMPLED, kind=SpanKind.CLIENT, started_ns=10_000, ended_ns=30_000, attributes={"batch": 3}
    )
    again = tracing.record("send", own, kind=SpanKind.PRODUCER, started_ns=30, ended_ns=31, attributes={})
    for unwanted in (UNSAMPLED, None):
        kept = tracing.record("post", unwanted, kind=SpanKind.CLIENT, started_ns=1, ended_ns=2, attributes={})
        assert kept == unwanted
    tracing.close()
    first, second = _spans(tmp_path)
    assert is_sampled(again)
    assert trace_id_of(again) == trace_id_of(SAMPLED)
    assert second["parent_id"] == first["context"]["span_id"]
    assert first["start_time"] < first["end_time"]


def test_no_exporter_no_spans() -> None:
    tracing = Tracing(_config(None, sample=1.0), "api0")
    with working_on(None):
        assert tracing.enter("bets", SAMPLED, {}) is None
        assert CURRENT.get() == SAMPLED  # others may trace: the header goes on
    tracing.close()


def test_a_log_line_leads_to_its_trace() -> None:
    record = logging.LogRecord("ledgerproof.api", logging.WARNING, __file__, 1, "late by %d ms", (7,), None)
    with working_on(SAMPLED):
        line = json.loads(EcsLines("api0").format(record))
    assert line["message"] == "late by 7 ms"
    assert (line["log.level"], line["log"]["logger"]) == ("warning", "ledgerproof.api")
    assert line["service"] == {"name": "ledgerproof", "node": {"name": "api0"}}
    assert (line["trace"]["id"], line["span"]["id"]) == ("ab" * 16, "cd" * 8)
    assert "trace" not in json.loads(EcsLines("api0").format(record))
