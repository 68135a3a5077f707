"""Schemathesis plays the OpenAPI document against the real API: no 5xx, and no answer that is not in the document."""

import re
import subprocess
import sys
from pathlib import Path

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)


EVENTS, BULK = "/v1/wallets/{user_id}/events", "/v1/commands"


def play(base: str, headers: dict[str, str], folder: Path, examples: int, *more: str) -> str:
    """Run Schemathesis and return what it printed; fails with that unless every check passed."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{base}/openapi.json",
        "--url",
        base,
        "--header",
        f"Authorization: {headers['authorization']}",
        "--max-examples",
        str(examples),
        "--seed",
        "4",
        "--phases",
        "examples,coverage,fuzzing",
        # One: Python 3.11's parser of syntax trees, which Hypothesis asks, loses count of its depth among threads.
        "--workers",
        "1",
        "--request-timeout",
        "20",
        "--no-color",
        *more,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-15_000:] + done.stderr[-3_000:]
    return done.stdout


def test_every_answer_to_generated_requests_is_in_the_document(api_bases, operator, tmp_path) -> None:
    # A stream does not end; it has tests of its own.
    without = ("--exclude-path", EVENTS, "--exclude-path", BULK)
    printed = play(api_bases[0], operator, tmp_path, 25, "--checks", ",".join(CHECKS), *without)
    assert re.search(r"Tested: +2\d", printed), printed


def test_every_answer_to_generated_bulks_is_in_the_document(api_bases, operator, tmp_path) -> None:
    # A command that breaks the schema fails alone, inside an answer of 200: that is what a bulk is for.
    checks = ",".join(check for check in CHECKS if check != "negative_data_rejection")
    printed = play(api_bases[0], operator, tmp_path, 25, "--checks", checks, "--include-path", BULK)
    assert re.search(r"Tested: +1\b", printed), printed
