"""The history of a load: written by a process of its own, whole or visibly cut."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import polars as pl
import pytest

from invariants.history import attempts, load
from load import requests
from load.observer import Observer, ObserverError
from load.records import Hello, frame
from load.requests import Answer

BET = requests.Command("bet", "/v1/wallets/1/bets", "k", b"{}", user=1, match_id="m", odds=200, amount=5)


@contextmanager
def writer(folder: Path, workers: int) -> Iterator[tuple[str, list[str]]]:
    """The real process; give its address and, once it has ended, what it said last."""
    address = str(folder / "s.sock")
    process = subprocess.Popen(
        [sys.executable, "-m", "load.recording", str(folder), address, "run", str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield address, said
    finally:
        out, problems = process.communicate(timeout=60)
        said.append(out.strip() or problems)


def test_two_workers_make_one_history_without_a_gap(tmp_path: Path) -> None:
    with writer(tmp_path, 2) as (address, said):
        observers = [Observer(address, index, 100.0) for index in range(2)]
        for number in range(300):
            observer = observers[number % 2]
            begun = observer.invoke(BET, number % 2, 100.5, 101.0)
            if number == 299:
                continue  # stays open, as that of a client that was killed
            record = "info" if number % 50 == 0 else "ok"
            answer = Answer(outcome="ACCEPTED", seq=number, bet_id="b", as_of_ms=5000)
            observer.complete(begun, record, 202, answer, 101.5, error="timeout")
        for observer in observers:
            observer.close()
    assert said == ["closed"]
    report = load(tmp_path)
    assert report.problems() == []
    found = attempts(report.frame)
    assert sorted(found["attempt"]) == list(range(1, 301))
    assert dict(found.group_by("cls").len().iter_rows()) == {"ok": 293, "info": 7}
    row = found.filter(pl.col("cls") == "ok").row(0, named=True)
    assert (row["op"], row["key"], row["user"], row["odds"], row["t_invoke"], row["t_return"]) == (
        *("bet", "k", 1, 200, 1.0, 1.5),
    )
    assert (row["intended"], row["as_of"], row["answer_bet_id"], row["error"]) == (0.5, 5.0, "b", None)
    # A client whose request may still be open is not used again, and no client is two workers'.
    per_client = report.frame.filter(pl.col("record") == "invoke").group_by("client").agg(pl.col("api").n_unique())
    assert per_client["api"].to_list() == [1] * len(per_client)


def test_a_worker_that_dies_leaves_the_history_cut(tmp_path: Path) -> None:
    with writer(tmp_path, 2) as (address, said):
        whole = Observer(address, 0, 0.0)
        whole.complete(whole.invoke(BET, 0, 1.0, 1.0), "ok", 202, Answer(), 2.0)
        whole.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dying:
            dying.connect(address)
            dying.sendall(frame(msgspec.msgpack.encode(Hello(1))) + b"\0\0\0\x20cut")
    assert said == ["cut"]
    assert load(tmp_path).problems() == ["the history was never closed: the harness ended before its last flush"]


def test_a_worker_that_never_came_leaves_the_history_cut(tmp_path: Path) -> None:
    with writer(tmp_path, 2) as (address, said):
        Observer(address, 0, 0.0).close()
    assert said == ["cut"]


def test_an_attempt_that_is_missing_leaves_the_history_cut(tmp_path: Path) -> None:
    with writer(tmp_path, 1) as (address, said):
        observer = Observer(address, 0, 0.0)
        observer.invoke(BET, 0, 1.0, 1.0)
        observer._attempts += 1  # as if a record had been lost on its way
        observer.invoke(BET, 0, 1.0, 1.0)
        observer.close()
    assert said == ["cut"]


def test_a_writer_that_is_gone_is_noticed(tmp_path: Path) -> None:
    with writer(tmp_path, 1) as (address, _):
        observer = Observer(address, 0, 0.0)
    for _ in range(2):
        observer.invoke(BET, 0, 1.0, 1.0)
        observer._flush()
    with pytest.raises(ObserverError, match="gone"):
        observer.close()
