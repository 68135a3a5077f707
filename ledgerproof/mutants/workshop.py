"""Copies of the source tree, to plant a bug in; a process started for a copy imports nothing of ours from elsewhere."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ledgerproof.mutants.patches import Hunk, Mutant, apply

PACKAGES: Final = ("chaos", "compose", "invariants", "ledgerproof", "load", "reference", "reports", "sim")
SOURCE: Final = Path(__file__).resolve().parents[2]
"""The tree that this code is imported from."""
_LEFT_OUT: Final = shutil.ignore_patterns("runs", "*.tmp", "mutants.json", "mutants.html")


@contextmanager
def copy_of(
    target: Path, mutant: Mutant | None = None, hunks: Sequence[Hunk] | None = None, source: Path = SOURCE
) -> Iterator[Path]:
    """Make a copy of the tree at `target`, plant a bug in it if one is given, and remove it after the block.

    Raises PatchError if the bug does not fit, OSError if the copy cannot be written.
    """
    target.mkdir(parents=True)
    try:
        for package in PACKAGES:
            # With what was compiled: a process then starts as fast as from the tree itself.
            shutil.copytree(source / package, target / package, ignore=_LEFT_OUT)
        shutil.copytree(source / "tests" / "unit", target / "tests" / "unit", ignore=_LEFT_OUT)
        shutil.copytree(source / "tests" / "mutants", target / "tests" / "mutants", ignore=_LEFT_OUT)
        if mutant is not None:
            for path in apply(mutant, target, hunks):
                # Compiled code is told apart by time and size; a change within a second could be missed.
                for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                    compiled.unlink()
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def environment(copy: Path) -> dict[str, str]:
    """Return the environment of a process that is to import the copy, before whatever is installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LEDGERPROOF_", "PYTHON"))}
    path = os.pathsep.join([str(copy), str(copy / "tests" / "unit")])
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0"}


def start(copy: Path, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m` with arguments in a copy, everything that it prints going to `log`; in a session of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and modules
            [sys.executable, "-m", *arguments],
            cwd=copy,
            env=environment(copy),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
