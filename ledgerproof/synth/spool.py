"""Writes the file of a table bucket by bucket, each in its own order."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import polars as pl

from invariants.files import publish
from invariants.spool import Spool

ROW_GROUP: Final = 262_144
"""Rows of one group: what the collector's files have."""


def write_table(
    spool: Spool,
    targets: Mapping[Path, Callable[[pl.DataFrame], pl.DataFrame]],
    shape: Callable[[pl.DataFrame], pl.DataFrame],
) -> dict[Path, int]:
    """Write the buckets of a table, each in the form that `shape` gives it, to Parquet files.

    `targets` says which rows of a bucket each file gets. Returns the rows of each file. Raises OSError.
    """
    folders = {path: path.with_name(path.name + ".pieces") for path in targets}
    sizes = dict.fromkeys(targets, 0)
    for folder in folders.values():
        folder.mkdir()
    pieces: dict[Path, list[Path]] = {path: [] for path in targets}
    for number in spool.numbers:
        shaped = shape(spool.take(number))
        for path, choose in targets.items():
            rows = choose(shaped)
            piece = folders[path] / f"{number:05d}.arrow"
            rows.write_ipc(piece)
            pieces[path].append(piece)
            sizes[path] += rows.height
    for path, files in pieces.items():
        temporary = path.with_name(path.name + ".tmp")
        pl.scan_ipc(files).sink_parquet(temporary, compression="zstd", compression_level=1, row_group_size=ROW_GROUP)
        publish(temporary, path)
        shutil.rmtree(folders[path])
    return sizes
