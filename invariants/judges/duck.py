"""The SQL judge: DuckDB decides every code from the run's own Parquet files, by the statements in `sql/`.

It reads the files itself, shares no fold with `invariants.anomalies`, and its statements are written from the
specification of each code. Memory and threads are bounded; what does not fit goes to a folder that is removed.
"""

import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import duckdb
import msgspec
import polars as pl

from invariants import history, timeline
from invariants.files import sha256_of
from invariants.judges.opinion import Opinion
from invariants.run import Run
from invariants.snapshot import ADDED_COLUMNS, ADDED_TABLES, EVIDENCE, TABLES, MissingEvidence, Snapshot
from invariants.subjects import MAX_SUBJECTS, WHOLE_RUN
from reference.commands import BALANCE_TOPIC, TOPIC_OF
from reference.routing import SHARDS

NAME: Final = "sql"
MEMORY_LIMIT_MB: Final = 1_500
"""What DuckDB may hold in memory; beyond, it spills."""
THREADS: Final = 2
MAX_SPILL_MB: Final = 50_000
"""What it may spill. A run that needs more is not decided, and therefore INVALID."""

FILES: Final = (
    "evidence",
    "keys",
    "wallets",
    "sessions",
    "events",
    "settlement",
    "refusals",
    "writers",
    "recovery",
    "validity",
)
"""Files of `sql/`. Blocks with small names make tables, in this order; a block named like a code decides it."""

_log = logging.getLogger(__name__)
_BLOCK: Final = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_CODE: Final = re.compile(r"[AV]\d\d")
_TYPES: Final[dict[pl.DataType, str]] = {
    pl.Int64(): "BIGINT",
    pl.Int32(): "INTEGER",
    pl.Int16(): "SMALLINT",
    pl.Float64(): "DOUBLE",
    pl.String(): "VARCHAR",
    pl.Boolean(): "BOOLEAN",
}


@cache
def blocks() -> dict[str, str]:
    """Return the named blocks of all files, in order. Raises ValueError for a name that is there twice."""
    found: dict[str, str] = {}
    for file in FILES:
        parts = _BLOCK.split((Path(__file__).parent / "sql" / f"{file}.sql").read_text(encoding="utf-8"))
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            if name in found:
                raise ValueError(f"{file}.sql names the block {name} a second time")
            found[name] = text.strip()
    return found


def codes() -> list[str]:
    """Return the codes that this judge decides."""
    return [name for name in blocks() if _CODE.fullmatch(name)]


def judge(run: Run) -> Opinion:
    """Decide every code of `codes`. What cannot be decided is said, never raised.

    Raises duckdb.Error or OSError when not even a temporary folder or an empty database can be had.
    """
    with tempfile.TemporaryDirectory(prefix="ledgerproof-sql-") as place, _opened(Path(place)) as database:
        missing = _lay_out(run, database, Path(place))
        undecided: dict[str, str] = {}
        found: dict[str, frozenset[str]] = {}
        why = {name: "; ".join(sentences) for name, sentences in missing.items()}
        for name, statement in blocks().items():
            if not _CODE.fullmatch(name):
                why |= _made(database, name, statement)
        for code in codes():
            if code == "V05" and missing:
                found[code] = frozenset({WHOLE_RUN})
                continue
            try:
                rows = database.execute(
                    f"SELECT DISTINCT subject FROM ({blocks()[code]}) ORDER BY subject LIMIT {MAX_SUBJECTS}"  # noqa: S608 - our own text
                ).fetchall()
            except duckdb.Error as error:
                _log.warning("%s could not be decided: %s", code, error)
                undecided[code] = _reason(error, why)
            else:
                found[code] = frozenset(str(subject) for (subject,) in rows)
        return Opinion(found, undecided)


def _opened(place: Path) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        ":memory:",
        config={
            "memory_limit": f"{MEMORY_LIMIT_MB}MB",
            "threads": str(THREADS),
            "temp_directory": str(place / "spill"),
            "max_temp_directory_size": f"{MAX_SPILL_MB}MB",
            "default_null_order": "nulls_first",
            # A judge asks nobody: no extension is fetched, no setting changes later.
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        },
    )


def _made(database: duckdb.DuckDBPyConnection, name: str, statement: str) -> dict[str, str]:
    """Make one table; return its name and why it could not be made, if so."""
    try:
        database.execute(statement)
    except duckdb.Error as error:
        return {name: str(error).splitlines()[0]}
    return {}


def _reason(error: duckdb.Error, why: dict[str, str]) -> str:
    """Return why a code is undecided: the tables that are not there, or else what the database says."""
    named = re.search(r"Table with name (\w+) does not exist", str(error))
    seen: set[str] = set()
    text = str(error).splitlines()[0]
    while named is not None and named[1] in why and named[1] not in seen:
        seen.add(named[1])
        text = why[named[1]]
        named = re.search(r"Table with name (\w+) does not exist", text)
    return text


# -- the evidence as tables


def _lay_out(run: Run, database: duckdb.DuckDBPyConnection, place: Path) -> dict[str, list[str]]:
    """Make a view of every table of the run; return table → what is wrong with it, for those that are not whole."""
    _history(run, database, place)
    frames = {
        "timeline": (run.timeline, timeline.TIMELINE_SCHEMA, timeline.TIMELINE_FILE),
        "series": (run.series, timeline.SERIES_SCHEMA, timeline.SERIES_FILE),
    }
    for name, (frame, schema, file) in frames.items():
        path = run.folder / file if run.folder is not None and (run.folder / file).exists() else None
        _view(database, name, [path or _written(frame, place, name)], schema)
    _configuration(run, database)
    database.execute("CREATE SCHEMA first")
    missing: dict[str, list[str]] = {}
    older = run.config.evidence < EVIDENCE
    for name in TABLES:
        problems = [_snapshot_view(database, f"main.{name}", run.final, place, older=older)]
        if run.second is not None:
            problems.append(_snapshot_view(database, f"first.{name}", run.first, place, older=older))
        elif problems == [None]:
            database.execute(f"CREATE VIEW first.{name} AS FROM main.{name}")
        said = [problem for problem in problems if problem is not None]
        if said:
            missing[name] = said
    return missing


def _snapshot_view(
    database: duckdb.DuckDBPyConnection, name: str, snapshot: Snapshot, place: Path, *, older: bool
) -> str | None:
    """Make the view of one table and return None, or why it is not whole; an older run may lack what came later."""
    table = name.split(".")[1]
    schema = TABLES[table]
    source = snapshot.raw(table)
    if source is None and older and table in ADDED_TABLES:
        source = pl.DataFrame(schema=schema)
    if source is None:
        return f"{snapshot.name} has no table {table}"
    if isinstance(source, pl.DataFrame):
        if not source.columns:
            source = pl.DataFrame(schema=schema)
        source = _written(source, place, name)
    try:
        described = database.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(source)]).fetchall()
    except duckdb.Error as error:
        return f"{snapshot.name} table {table} cannot be read: {str(error).splitlines()[0]}"
    absent = schema.keys() - {str(column) for column, *_ in described}
    later = ADDED_COLUMNS.get(table, frozenset()) if older else frozenset()
    if absent - later:
        return f"{snapshot.name} table {table} lacks the columns {', '.join(sorted(absent - later))}"
    _view(database, name, [source], schema, absent)
    return None


def _history(run: Run, database: duckdb.DuckDBPyConnection, place: Path) -> None:
    """Make the view `history` of the whole parts, and the table `broken_parts` of what is wrong with the recording."""
    database.execute("CREATE TABLE broken_parts (problem VARCHAR)")
    if run.folder is None:
        _view(database, "history", [_written(run.recording.frame, place, "history")], history.SCHEMA)
        return
    folder = run.folder / history.FOLDER
    parts, problems = _whole_parts(database, folder)
    absent: frozenset[str] = frozenset()
    if parts:
        described = database.execute(
            "DESCRIBE SELECT * FROM read_parquet(?, union_by_name = true)", [[str(part) for part in parts]]
        ).fetchall()
        absent = history.ADDED - {str(column) for column, *_ in described}
    if problems:
        database.executemany("INSERT INTO broken_parts VALUES (?)", [[problem] for problem in problems])
    if not parts:
        parts = [_written(pl.DataFrame(schema=history.SCHEMA), place, "history")]
    _view(database, "history", parts, history.SCHEMA, absent)


def _whole_parts(database: duckdb.DuckDBPyConnection, folder: Path) -> tuple[list[Path], list[str]]:
    """Return the parts that are as the manifest says, in its order, and a sentence for everything that is not."""
    manifest = folder / history.MANIFEST
    lines = manifest.read_bytes().splitlines() if manifest.exists() else []
    parts: list[Path] = []
    problems: list[str] = []
    rows_read, rows_taken = 0, None
    for line in lines:
        try:
            said = msgspec.json.decode(line, type=dict[str, object])
        except msgspec.DecodeError:
            problems.append("a line of the manifest is damaged")
            continue
        if said.get("closed"):
            rows_taken = said.get("rows")
            continue
        part = folder / str(said.get("file"))
        if not part.exists() or sha256_of(part) != said.get("sha256"):
            problems.append(f"{part.name} is not as it was written")
            continue
        counted = database.execute("SELECT sum(num_rows)::BIGINT FROM parquet_file_metadata(?)", [str(part)]).fetchone()
        if counted is None or counted[0] != said.get("rows"):
            problems.append(f"{part.name} has other rows than the manifest says")
            continue
        parts.append(part)
        rows_read += int(counted[0])
    if rows_taken is None:
        problems.append("the history was never closed")
    elif rows_taken != rows_read:
        problems.append(f"{rows_taken} records were taken and {rows_read} can be read")
    if {part.name for part in folder.glob("part-*")} - {part.name for part in parts}:
        problems.append("there are parts of which the manifest does not know")
    return parts, problems


def _configuration(run: Run, database: duckdb.DuckDBPyConnection) -> None:
    """Make small tables of what the run's configuration and the service's vocabulary say."""
    config = run.config
    database.execute(
        "CREATE TABLE config AS SELECT ?::BIGINT AS commission_bps, ?::DOUBLE AS stale_after_s,"
        " ?::INTEGER AS snapshots, ?::VARCHAR AS balance_topic, ?::BOOLEAN AS lists_servers,"
        " ?::BIGINT AS max_amount_minor, ?::DOUBLE AS recover_within_s, ?::DOUBLE AS origin_unix,"
        " ?::INTEGER AS evidence",
        [
            config.commission_bps,
            config.stale_after_s,
            1 if run.second is None else 2,
            BALANCE_TOPIC,
            run.final.lists_servers,
            config.max_amount_minor,
            config.recover_within_s,
            config.origin_unix,
            config.evidence,
        ],
    )
    _table(database, "topics (event_type VARCHAR, topic VARCHAR)", [[str(e), t] for e, t in TOPIC_OF.items()])
    _table(database, "operations (op VARCHAR)", [[op] for op in config.operations])
    _table(database, "servers (server VARCHAR)", [[server] for server in config.servers])
    read = [[name, server] for name in ("first", "final") for server in _servers_read(getattr(run, name))]
    _table(database, "servers_read (snapshot VARCHAR, server VARCHAR)", read)
    if len(config.routing) == SHARDS and config.servers:
        # Without a routing table nobody can say where a wallet belongs; the codes that need it stay undecided.
        routing = [[shard, config.servers[holder]] for shard, holder in enumerate(config.routing)]
        _table(database, "initial_routing (shard BIGINT, server VARCHAR)", routing)


def _servers_read(snapshot: Snapshot) -> list[str]:
    try:
        return sorted(snapshot.servers_read())
    except MissingEvidence:
        return []  # The table that is missing is V05.


def _table(database: duckdb.DuckDBPyConnection, form: str, rows: Sequence[Sequence[object]]) -> None:
    database.execute(f"CREATE TABLE {form}")
    if rows:
        name = form.split(maxsplit=1)[0]
        database.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(rows[0]))})", rows)  # noqa: S608


def _written(frame: pl.DataFrame, place: Path, name: str) -> Path:
    """Write a frame that was never on disk, so that there is one way to read evidence."""
    path = place / f"{name}.parquet"
    frame.write_parquet(path, compression="uncompressed")
    return path


def _view(
    database: duckdb.DuckDBPyConnection,
    name: str,
    files: Iterable[Path],
    schema: dict[str, pl.DataType],
    absent: Collection[str] = (),
) -> None:
    """Make a view of Parquet files with the columns of `schema` and the place of each row: part and line.

    Columns that are `absent` are null.
    """
    listed = ", ".join(_quoted(os.fspath(file)) for file in files)
    columns = ", ".join(
        f"{'NULL' if column in absent else _named(column)}::{_TYPES[kind]} AS {_named(column)}"
        for column, kind in schema.items()
    )
    place = "filename AS part, file_row_number AS line" if name == "history" else "file_row_number AS line"
    database.execute(
        f"CREATE VIEW {name} AS SELECT {columns}, {place}"  # noqa: S608 - names of our own, and quoted paths
        f" FROM read_parquet([{listed}], filename = true, file_row_number = true, union_by_name = true)"
    )


def _named(column: str) -> str:
    return f'"{column}"'


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
