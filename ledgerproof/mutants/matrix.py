"""The matrix of planted bugs as it is stored: which were killed, by which codes, and which codes own one."""

from pathlib import Path
from typing import Any, Final

import msgspec

from invariants.anomalies import CHECKS
from ledgerproof.mutants.outcome import Row
from ledgerproof.output import write_json

STORED: Final = Path("reports/mutants.json")
PAGE: Final = Path("reports/mutants.html")
FORMAT: Final = 1


class Matrix(msgspec.Struct):
    """A run of planted bugs."""

    commit: str
    machine: dict[str, Any]
    made_at: str
    """When the newest row was made, UTC."""
    rows: list[Row]
    format: int = FORMAT

    @property
    def killed(self) -> int:
        """How many were noticed."""
        return sum(row.killed for row in self.rows)

    @property
    def survivors(self) -> list[Row]:
        """Those that were not noticed, or not run."""
        return [row for row in self.rows if not row.killed]


class NotStored(Exception):
    """There is no stored matrix, or none of this version; the message says what to do."""


def load(path: Path) -> Matrix:
    """Read a stored matrix. Raises NotStored."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Matrix)
    except OSError as error:
        raise NotStored(f"there is no matrix in {path} ({error.strerror}): make one with `make mutants`") from error
    except msgspec.DecodeError as error:
        raise NotStored(f"{path} is of another version ({error}): make it again with `make mutants`") from error


def store(matrix: Matrix, path: Path) -> None:
    """Write a matrix, by id of its rows. Raises OSError."""
    matrix.rows.sort(key=lambda row: row.id)
    write_json(path, matrix)


def merged(old: Matrix | None, new: Matrix) -> Matrix:
    """Return the new rows, and the old ones of planted bugs that were not run now."""
    fresh = {row.id for row in new.rows}
    kept = [row for row in old.rows if row.id not in fresh] if old is not None else []
    return msgspec.structs.replace(new, rows=sorted([*kept, *new.rows], key=lambda row: row.id))


def owners(rows: list[Row]) -> dict[str, list[str]]:
    """Return for every code the killed bugs of the service that only it catches: no other code fired."""
    found: dict[str, list[str]] = {code: [] for code in sorted(CHECKS)}
    for row in rows:
        if row.killed and len(row.codes) == 1:
            found.setdefault(row.codes[0], []).append(row.id)
    return found
