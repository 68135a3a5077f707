"""Keeps the rows of all blocks on disk until each file can be written in its own order, a bucket at a time."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from invariants.files import publish

ROW_GROUP: Final = 262_144


class Spool:
    """Rows of one table, block by block in, bucket by bucket out."""

    def __init__(self, folder: Path) -> None:
        """Keep the rows in `folder`, which is made. Raises OSError."""
        self._folder = folder
        self._folder.mkdir(parents=True)
        self._offsets: list[dict[int, tuple[int, int]]] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Take the rows of one block; the column `_bucket` says where each goes. Raises OSError."""
        ordered = frame.sort("_bucket")
        ordered.drop("_bucket").write_ipc(self._folder / f"{len(self._offsets)}.arrow")
        numbers, starts = np.unique(ordered["_bucket"].to_numpy(), return_index=True)
        ends = np.append(starts[1:], ordered.height)
        self._offsets.append(
            {int(n): (int(s), int(e - s)) for n, s, e in zip(numbers, starts, ends, strict=True)}
        )

    def buckets(self) -> Iterator[pl.DataFrame]:
        """Return the rows of each bucket, of all blocks, in no order within it. Raises OSError."""
        for number in sorted({number for offsets in self._offsets for number in offsets}):
            pieces = []
            for block, offsets in enumerate(self._offsets):
                if number in offsets:
                    whole = pl.scan_ipc(self._folder / f"{block}.arrow")
                    pieces.append(whole.slice(*offsets[number]).collect())
            yield pl.concat(pieces)


def write_table(
    spool: Spool, targets: dict[Path, Callable[[pl.DataFrame], pl.DataFrame]], shape: Callable[[pl.DataFrame], pl.DataFrame]
) -> dict[Path, int]:
    """Write the buckets of a table, each in the form that `shape` gives it, to Parquet files.

    `targets` says which rows of a bucket each file gets. Returns the rows of each file. Raises OSError.
    """
    folders = {path: path.with_name(path.name + ".pieces") for path in targets}
    sizes = dict.fromkeys(targets, 0)
    for folder in folders.values():
        folder.mkdir()
    pieces: dict[Path, list[Path]] = {path: [] for path in targets}
    for number, bucket in enumerate(spool.buckets()):
        shaped = shape(bucket)
        for path, choose in targets.items():
            rows = choose(shaped)
            piece = folders[path] / f"{number:05d}.arrow"
            rows.write_ipc(piece)
            pieces[path].append(piece)
            sizes[path] += rows.height
    for path, files in pieces.items():
        temporary = path.with_name(path.name + ".tmp")
        pl.scan_ipc(files).sink_parquet(temporary, compression="zstd", row_group_size=ROW_GROUP)
        publish(temporary, path)
        shutil.rmtree(folders[path])
    return sizes
