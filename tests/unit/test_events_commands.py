"""The commands that look after events, as far as they need no service."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

from ledgerproof.events_commands import parse_time

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("15m", NOW - timedelta(minutes=15)),
        ("2h", NOW - timedelta(hours=2)),
        ("1d", NOW - timedelta(days=1)),
        ("2026-01-31T11:00:00Z", NOW - timedelta(hours=1)),
        ("2026-01-31T12:00:00+01:00", NOW - timedelta(hours=1)),
    ],
)
def test_a_time_is_a_moment_or_a_while_ago(text: str, moment: datetime) -> None:
    assert parse_time(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "s", "-5m", "yesterday", "2026-01-31T12:00:00", "2026-13-01T00:00:00Z"])
def test_a_time_that_could_mean_several_moments_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        parse_time(text, NOW)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dlq", "list"], "start one with `ledgerproof up`"),
        (["dlq", "list", "--stack", "x"], "there is no stack 'x'"),
        (["projection", "rebuild", "--config", "missing.json"], "cannot read the configuration"),
        (["events", "replay"], "--from"),
    ],
)
def test_without_a_service_a_command_says_what_to_do(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ledgerproof", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
