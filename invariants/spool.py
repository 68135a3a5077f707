"""Keeps rows on disk by bucket: batches in, buckets out, and in memory one batch or one bucket."""

from collections import defaultdict
from pathlib import Path

import polars as pl

BUCKET = "_bucket"
"""Column that says where a row goes."""


class Spool:
    """The rows of one table, in uncompressed Arrow files."""

    def __init__(self, folder: Path) -> None:
        """Keep the rows in `folder`, which is made. Raises OSError."""
        self._folder = folder
        self._folder.mkdir(parents=True)
        self._files: dict[int, list[Path]] = defaultdict(list)
        self._batches = 0
        self._empty: pl.DataFrame | None = None

    def add(self, frame: pl.DataFrame) -> None:
        """Take some rows; the column `_bucket`, an integer, says where each goes. Raises OSError."""
        if self._empty is None:
            self._empty = frame.clear().drop(BUCKET)
        for (number,), rows in frame.partition_by(BUCKET, as_dict=True, include_key=False, maintain_order=True).items():
            path = self._folder / f"{number}-{self._batches}.arrow"
            rows.write_ipc_stream(path, compression="uncompressed")
            self._files[int(str(number))].append(path)
        self._batches += 1

    @property
    def numbers(self) -> list[int]:
        """Return the buckets that have rows."""
        return sorted(self._files)

    def take(self, number: int) -> pl.DataFrame:
        """Return the rows of one bucket, in the order in which they came, and forget them. Raises OSError, KeyError."""
        if self._empty is None:
            raise KeyError("nothing was ever added")
        files = self._files.pop(number, [])
        rows = [pl.read_ipc_stream(path) for path in files]
        for path in files:
            path.unlink()
        return pl.concat(rows) if rows else self._empty
