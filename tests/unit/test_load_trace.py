"""A trace: good rows come out as they are, bad rows are named by line and reason and never left out silently."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import polars as pl
import pytest

from load.trace import (
    COLUMNS,
    LINE_MAX,
    SHOWN_MAX,
    SLICE_ROWS,
    Arrival,
    BadRows,
    Trace,
    TraceError,
    read_trace,
    write_synthetic,
)

HEADER = ",".join(COLUMNS)
DEPOSIT = "{time},7,deposit,100,,,,,,,"
ROWS_OF_MEMORY_TEST = 150_000
GROWTH_MAX_KB = 40_000
"""A trace that was held in memory would take ten times as much."""


def csv_file(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return path


def arrivals(trace: Trace) -> list[Arrival]:
    return [arrival for batch in trace.batches() for arrival in batch]


def reason(path: Path) -> str:
    with pytest.raises(BadRows) as raised:
        read_trace(path)
    assert raised.value.problems.total == 1, raised.value.problems.first
    return raised.value.problems.first[0].reason


def test_every_operation_comes_out_with_its_fields(tmp_path: Path) -> None:
    path = csv_file(
        tmp_path,
        "10.5,,create_match,,final,,,,,m-1,",
        "10.5,7,deposit,100,,,,,,d-1,",
        "11,7,bet,,final,HOME,back,250,90,b-1,",
        "12,7,cancel,,,,,,,c-1,b-1",
        "12,7,balance,,,,,,,,",
        "12.25,,settle_match,,final,HOME,,,,,",
    )
    trace = read_trace(path)
    assert trace.rows == 6
    assert trace.operations["bet"] == 1
    assert trace.span_s == 1.75
    assert trace.problems.total == 0
    found = arrivals(trace)
    assert found[0] == Arrival(0.0, 2, "create_match", match="final", key="m-1")
    assert found[1] == Arrival(0.0, 3, "deposit", user=7, amount_minor=100, key="d-1")
    assert found[2] == Arrival(
        0.5, 4, "bet", user=7, match="final", selection="HOME", side="BACK", odds=250, stake_minor=90, key="b-1"
    )
    assert found[3] == Arrival(1.5, 5, "cancel", user=7, key="c-1", bet="b-1")
    assert found[5] == Arrival(1.75, 7, "settle_match", match="final", selection="HOME")


def test_speed_divides_the_times(tmp_path: Path) -> None:
    path = csv_file(tmp_path, DEPOSIT.format(time=5), DEPOSIT.format(time=25))
    trace = read_trace(path, speed=10)
    assert [arrival.at_s for arrival in arrivals(trace)] == [0.0, 2.0]
    assert trace.span_s == 2.0
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="speed"):
            read_trace(path, speed=wrong)


def test_moments_are_times_too(tmp_path: Path) -> None:
    path = csv_file(
        tmp_path, DEPOSIT.format(time="2026-01-01T00:00:00+00:00"), DEPOSIT.format(time="2026-01-01T01:00:02.5+01:00")
    )
    assert [arrival.at_s for arrival in arrivals(read_trace(path))] == [0.0, 2.5]
    assert "UTC offset" in reason(csv_file(tmp_path, DEPOSIT.format(time="2026-01-01T00:00:00")))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (DEPOSIT.format(time=-1), "time '-1' is negative"),
        (DEPOSIT.format(time="nan"), "time 'nan' is not a finite number"),
        (DEPOSIT.format(time="inf"), "time 'inf' is not a finite number"),
        (DEPOSIT.format(time="1e400"), "not a finite number"),
        (DEPOSIT.format(time="1" * 5000), "not a finite number"),
        (DEPOSIT.format(time="1e12"), "too large: it must be in seconds"),
        (DEPOSIT.format(time="1_0"), "not a finite number"),
        (DEPOSIT.format(time=""), "time is missing"),
        (DEPOSIT.format(time="noon"), "neither a number of seconds nor an ISO 8601 moment"),
        ("1,7,depsit,100,,,,,,,", "unknown operation 'depsit'; there are deposit, withdraw, bet"),
        ("1,7,,100,,,,,,,", "operation is missing"),
        ("1,7,deposit,,,,,,,,", "deposit needs amount"),
        ("1,,deposit,100,,,,,,,", "deposit needs user"),
        ("1,7,deposit,-5,,,,,,,", "amount '-5' is not from 1 to"),
        ("1,7,deposit,0,,,,,,,", "amount '0' is not from 1 to"),
        ("1,7,deposit,1.5,,,,,,,", "amount '1.5' is not a whole number"),
        ("1,7,deposit,NaN,,,,,,,", "amount 'NaN' is not a whole number"),
        ("1,7,deposit,1e3,,,,,,,", "amount '1e3' is not a whole number"),
        (f"1,7,deposit,{'9' * 6000},,,,,,,", "is not from 1 to"),
        ("1,7,deposit,٣,,,,,,,", "is not a whole number"),
        (f"1,{2**63},deposit,100,,,,,,,", "user '9223372036854775808' is not from 1 to 9223372036854775807"),
        ("1,7,bet,,m,HOME,BACK,100,90,,", "odds '100' is not from 101 to 100000"),
        ("1,7,bet,,m,HOME,OVER,250,90,,", "side 'OVER' is neither BACK nor LAY"),
        ("1,7,bet,50,m,HOME,BACK,250,90,,", "bet has no amount, but the row gives '50'"),
        ("1,7,cancel,,,,,,,c-1,", "cancel needs bet"),
        (f"1,7,deposit,100,,,,,,{'k' * 256},", "has 256 characters; 255 are allowed"),
        ("1,7,deposit,100,,,,,,a\x00b,", "cannot be printed"),
        ("1,7,deposit,100", "the row has 4 fields, the header 11"),
        ("1,7,deposit,100,,,,,,,,,", "the row has 13 fields, the header 11"),
        ('1,7,deposit,100,,,,,,"never closed,', "a quotation mark is opened and not closed"),
        ('1,7,deposit,100,,,,,,"a"b,', "the fields cannot be told apart"),
        ("x" * (LINE_MAX + 10), f"longer than {LINE_MAX} characters"),
    ],
)
def test_a_bad_row_is_named_by_line_and_reason(tmp_path: Path, line: str, says: str) -> None:
    path = csv_file(tmp_path, DEPOSIT.format(time=0), line)
    with pytest.raises(BadRows) as raised:
        read_trace(path)
    (bad,) = raised.value.problems.first
    assert bad.line == 3
    assert says in bad.reason
    assert len(bad.reason) < 300
    assert "on_bad" in str(raised.value)


def test_times_out_of_order_name_both_lines(tmp_path: Path) -> None:
    path = csv_file(tmp_path, *(DEPOSIT.format(time=time) for time in (1, 5, 4.5, 5)))
    with pytest.raises(BadRows) as raised:
        read_trace(path)
    assert raised.value.problems.first == [
        (4, "time '4.5' is before that of line 3: rows must be in order of time"),
    ]


def test_reported_rows_are_left_out_and_all_listed(tmp_path: Path) -> None:
    many = SHOWN_MAX + 30
    lines = [DEPOSIT.format(time=number) if number % 2 else f"{number},7,steal,1,,,,,,," for number in range(2 * many)]
    path = csv_file(tmp_path, *lines)
    with pytest.raises(BadRows) as raised:
        read_trace(path)
    message = str(raised.value)
    assert f"{many} rows cannot be replayed" in message
    assert message.count("line ") == SHOWN_MAX
    assert f"and {many - SHOWN_MAX} more" in message

    trace = read_trace(path, on_bad="report")
    assert trace.rows == many
    assert trace.problems.total == many
    assert list(trace.problems.lines) == [2 + 2 * number for number in range(many)]
    assert len(trace.problems.first) == SHOWN_MAX
    assert [arrival.line for arrival in arrivals(trace)] == [3 + 2 * number for number in range(many)]


def test_a_file_of_bad_rows_only_is_refused_either_way(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "1,7,steal,1,,,,,,,")
    with pytest.raises(BadRows):
        read_trace(path, on_bad="report")


def test_quoted_fields_byte_order_mark_and_foreign_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    text = f'{HEADER}\r\n0,7,deposit,"100",,,,,,"a ""b"", c",\r\n1,7,balance,,,,,,,,\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = arrivals(read_trace(path))
    assert [arrival.key for arrival in found] == ['a "b", c', None]
    assert [arrival.line for arrival in found] == [2, 3]


def test_nothing_is_trimmed_silently(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "0,7,deposit,100,,,,,, a ,")
    assert arrivals(read_trace(path))[0].key == " a "
    assert reason(csv_file(tmp_path, "0,7, deposit,100,,,,,,,")).startswith("unknown operation ' deposit'")
    assert reason(csv_file(tmp_path, "0,7,deposit, 100,,,,,,,")) == "amount ' 100' is not a whole number"


def test_a_quoted_line_end_does_not_shift_the_lines_after_it(tmp_path: Path) -> None:
    path = csv_file(tmp_path, '0,7,deposit,100,,,,,,"a\nb",', DEPOSIT.format(time=-1))
    with pytest.raises(BadRows) as raised:
        read_trace(path)
    assert [bad.line for bad in raised.value.problems.first] == [2, 4]


def test_blank_lines_between_rows_are_bad_and_at_the_end_are_not(tmp_path: Path) -> None:
    path = csv_file(tmp_path, DEPOSIT.format(time=0), "", "", DEPOSIT.format(time=1), "", "")
    with pytest.raises(BadRows) as raised:
        read_trace(path)
    assert raised.value.problems.first == [(3, "the line is blank, and so are those up to line 4")]
    assert read_trace(csv_file(tmp_path, DEPOSIT.format(time=0), "", "")).rows == 1


def test_what_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(f"{HEADER}\n0,7,deposit,100,,,,,,".encode() + "é".encode("latin-1") + b",\n")
    assert "is not UTF-8" in reason(path)
    path.write_bytes("time,opération\n".encode("latin-1"))
    with pytest.raises(TraceError, match="is not UTF-8"):
        read_trace(path)
    path.write_text(HEADER, encoding="utf-16")
    with pytest.raises(TraceError, match="UTF-16: save it as UTF-8"):
        read_trace(path)


def test_files_that_are_no_trace_are_refused_with_what_to_do(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, says: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TraceError, match=says):
            read_trace(path)

    refused("empty.csv", b"", "is empty: its first line must name the columns")
    refused("header.csv", f"{HEADER}\n".encode(), "has no rows")
    refused("blank.csv", b"\n\n", "the first line is blank")
    refused("data.csv", b"0,7,deposit,100\n", "no column time and no column operation")
    refused("short.csv", b"time,user\n0,7\n", "no column operation")
    refused("twice.csv", b"time,op,operation\n0,balance,balance\n", "two columns for operation")
    refused("wide.csv", ",".join(f"c{n}" for n in range(500)).encode(), "500 columns; 200 are allowed")
    refused("trace.txt", b"x", "a .csv or a .parquet file")
    refused("empty.parquet", b"", "is empty")
    refused("no.parquet", b"not parquet at all", "cannot be read as Parquet")
    refused("parquet.csv", b"PAR1....", "name it .parquet")
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="is not a file"):
        read_trace(tmp_path)


def test_unknown_columns_are_named_and_an_absent_one_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("time,user_id,op,amount_minor,region\n0,7,deposit,100,EU\n")
    trace = read_trace(path)
    assert trace.ignored == ["region"]
    assert arrivals(trace)[0].amount_minor == 100
    path.write_text("time,user,operation\n0,7,deposit\n")
    assert reason(path) == "deposit needs amount, which the file has no column for"


def test_parquet_rows_have_types_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    moments = [datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, 0, 0, 3, tzinfo=UTC)]
    frame = pl.DataFrame({"time": moments, "user": [7, None], "op": ["deposit", "close_match"], "match": [None, 12]})
    frame.with_columns(amount=pl.Series([100.0, None])).write_parquet(path)
    found = arrivals(read_trace(path))
    assert found == [
        Arrival(0.0, 1, "deposit", user=7, amount_minor=100),
        Arrival(3.0, 2, "close_match", match="12"),
    ]
    frame.with_columns(amount=pl.Series([float("nan"), None])).write_parquet(path)
    assert "amount nan is not a whole number" in reason(path)
    frame.with_columns(amount=pl.Series([[1], None])).write_parquet(path)
    assert "amount" in reason(path)
    pl.DataFrame({"time": [1], "operation": [["balance"]], "user": [1]}).write_parquet(path)
    assert "unknown operation" in reason(path)
    pl.DataFrame({"time": [True], "operation": ["balance"], "user": [1]}).write_parquet(path)
    assert "is not a number of seconds" in reason(path)


def test_a_trace_that_changed_is_not_replayed(tmp_path: Path) -> None:
    path = csv_file(tmp_path, DEPOSIT.format(time=0))
    trace = read_trace(path)
    csv_file(tmp_path, DEPOSIT.format(time=0), DEPOSIT.format(time=1))
    with pytest.raises(TraceError, match="has changed"):
        arrivals(trace)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_synthetic_trace_is_the_same_for_the_same_seed(tmp_path: Path, suffix: str) -> None:
    first, second, other = (tmp_path / f"{name}{suffix}" for name in ("a", "b", "c"))
    write_synthetic(first, rows=SLICE_ROWS + 500, seed=3)
    write_synthetic(second, rows=SLICE_ROWS + 500, seed=3)
    write_synthetic(other, rows=500, seed=4)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    trace = read_trace(first)
    assert trace.rows == SLICE_ROWS + 500 == sum(map(len, trace.batches()))
    assert set(trace.operations) == {"create_match", "bet", "deposit", "balance"}
    assert not list(tmp_path.glob("*.parquet.csv"))


def test_both_formats_give_the_same_arrivals(tmp_path: Path) -> None:
    text = write_synthetic(tmp_path / "a.csv", rows=2_000, seed=5)
    table = write_synthetic(tmp_path / "a.parquet", rows=2_000, seed=5)

    def lineless(path: Path) -> list[Arrival]:
        return [msgspec.structs.replace(arrival, line=0) for arrival in arrivals(read_trace(path))]

    assert lineless(text) == lineless(table)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_memory_does_not_grow_with_the_trace(tmp_path: Path, suffix: str) -> None:
    """In a process of its own; tests/benchmarks/trace_memory.py does it with a million rows and says what it took."""
    path = write_synthetic(tmp_path / f"big{suffix}", rows=ROWS_OF_MEMORY_TEST, seed=1)
    # Not ru_maxrss: a new process begins with that of the process which started it.
    code = (
        "import sys; from pathlib import Path; from load.trace import read_trace\n"
        "lines = lambda: Path('/proc/self/status').read_text().splitlines()\n"
        "peak = lambda: next(int(line.split()[1]) for line in lines() if line.startswith('VmHWM'))\n"
        "small = read_trace(Path(sys.argv[1])); sum(map(len, small.batches())); before = peak()\n"
        "print(sum(map(len, read_trace(Path(sys.argv[2])).batches())), peak() - before)"
    )
    small = write_synthetic(tmp_path / f"small{suffix}", rows=1_000, seed=1)
    done = subprocess.run(
        [sys.executable, "-c", code, str(small), str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    rows, growth_kb = map(int, done.stdout.split())
    assert rows == ROWS_OF_MEMORY_TEST
    assert growth_kb < GROWTH_MAX_KB
