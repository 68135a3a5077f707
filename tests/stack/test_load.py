"""The load on the real service: every operation over both doors, and a history that agrees with the ledger."""

import asyncio
import subprocess
from pathlib import Path

import asyncpg
import polars as pl

from compose.stack import Stack
from invariants.history import attempts, load
from load.launch import command
from load.result import Result

POSTING = ("bet", "deposit", "withdraw")


async def test_the_history_of_two_workers_is_what_the_ledger_holds(
    stack: Stack, superuser_dsn: list[str], tmp_path: Path
) -> None:
    apis = stack.nodes_of("api")
    options = ["--load-profile", "smoke", "--seed", "11", "--run-name", f"t-{tmp_path.name}"]
    options += ["--targets", ",".join(f"127.0.0.1:{stack.port(name)}" for name in apis), "--prepare"]
    options += ["--grpc-targets", ",".join(f"127.0.0.1:{stack.grpc_port(name)}" for name in apis)]
    options += ["--lag-limit-ms", "1000", "--first-wallet", "7000001"]
    options += ["--result", str(tmp_path / "result.json"), "--history", str(tmp_path)]
    env = {"PATH": "/usr/bin:/bin", "LEDGERPROOF_TOKEN": stack.token()}
    done = await asyncio.to_thread(
        subprocess.run, command(options, workers=2), capture_output=True, text=True, timeout=180, check=False, env=env
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = Result.from_json((tmp_path / "result.json").read_bytes())
    assert result.valid, result.invalid
    for op in ("bet", "grpc_bet", "deposit", "withdraw", "balance", "strong_balance", "entries", "cancel"):
        assert result.total(op=op).ok > 0, op
    assert result.total(op="settle").ok == 4

    report = load(tmp_path)
    assert report.problems() == []
    history = attempts(report.frame)
    assert set(history["cls"]) <= {"ok", "fail"}
    acknowledged = history.filter((pl.col("cls") == "ok") & pl.col("op").is_in(POSTING))
    stored: set[tuple[int, str, int]] = set()
    for dsn in superuser_dsn:
        connection = await asyncpg.connect(dsn)
        rows = await connection.fetch(
            "SELECT user_id, idempotent_key, seq FROM wallet_ledger WHERE idempotent_key LIKE $1",
            f"t-{tmp_path.name}-%",
        )
        stored |= {(row["user_id"], row["idempotent_key"], row["seq"]) for row in rows}
        await connection.close()
    assert {tuple(row) for row in acknowledged.select("user", "key", "seq").iter_rows()} == stored
