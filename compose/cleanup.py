"""Taking stacks down: end what provably belongs to them, remove their folders, and find those left behind.

A stack is left behind if the process that started it died without taking it down and did not start it to be
kept. The proof that a process belongs to a stack is in `compose.processes`.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from compose import nodes, ports, postgres, processes, state
from compose.errors import FolderError, LockHeld, NodeError, StackError, StackNotFound
from compose.state import NodeRecord, StackState

DEFAULT_ROOT = Path(".ledgerproof")
DOWN_TIMEOUT_S = 6.0
"""Nodes that are taken down end by themselves within this time, or are killed."""
LOCK_TIMEOUT_S = 60.0

Progress = Callable[[str], None]


class DownReport(msgspec.Struct, frozen=True):
    """What `down_all` did: names of stacks, and what is left of them."""

    stopped: list[str]
    skipped: list[str]
    """Each with the reason, fit to show."""
    residue: list[str]


def find_stacks(root: Path = DEFAULT_ROOT) -> list[StackState]:
    """Return the stacks below `root`, oldest first."""
    found = []
    for path in sorted(state.stacks_folder(root.resolve()).glob(f"*/{state.STATE_FILE}")):
        with contextlib.suppress(StackNotFound):
            found.append(state.load(path.parent))
    return sorted(found, key=lambda item: item.created_unix_s)


def sweep(root: Path, progress: Progress | None = None) -> DownReport:
    """Clean up after owners that died: their stacks below `root`, and those the register of ports knows.

    Leaves alone what was started to be kept, and everything whose owner lives or cannot be judged.
    """
    return _clean(root, progress or silent, also_kept=False)


def down_all(root: Path = DEFAULT_ROOT, progress: Progress | None = None) -> DownReport:
    """Take down the stacks below `root`: those kept, and those whose owner died or is this process."""
    return _clean(root, progress or silent, also_kept=True)


def _clean(root: Path, progress: Progress, *, also_kept: bool) -> DownReport:
    stopped: list[str] = []
    skipped: list[str] = []
    residue: list[str] = []
    root = root.resolve()
    below = state.stacks_folder(root)
    folders = {path for path in below.glob("*") if not path.name.startswith(".")}
    book = {Path(entry.folder): entry for entry in ports.reservations()}
    for folder in sorted(folders | set(book)):
        try:
            found = state.load(folder)
        except StackNotFound as error:
            entry = book.get(folder)
            if entry is None:
                skipped += _remove_husk(folder, str(error))
            elif processes.place_of(entry.machine) == "here" and not processes.is_alive(entry.owner):
                # The folder is gone but its processes may not be: their tokens still name it.
                residue += take_down(folder, progress)
            continue
        wanted = also_kept and folder in folders
        if found.place == "elsewhere":
            reason = f"its processes are on {found.machine.host}, which is not here"
        elif found.owner_is_alive and not (wanted and found.owner.pid == os.getpid()):
            reason = f"in use by {processes.describe(found.owner.pid)}"
        elif found.spec.keep and found.ready and not wanted:
            reason = "was started to be kept"
        else:
            residue += take_down(folder, progress, found)
            stopped.append(found.name)
            continue
        if folder in folders:
            skipped.append(f"{found.name}: {reason}")
    _remove_unfinished(below)
    return DownReport(stopped, skipped, residue)


def take_down(folder: Path, progress: Progress, expected: StackState | None = None) -> list[str]:
    """End what provably belongs to the stack in `folder` and remove it; return what is left.

    If another stack than `expected` is there by now, it is left alone. One clean-up runs at a time per user:
    two of the same stack could otherwise remove a new one that took its name in between.
    """
    try:
        with state.held(ports.register_folder() / "down.lock", LOCK_TIMEOUT_S):
            return _take_down(folder, progress, expected)
    except LockHeld as error:
        return [f"stack {folder.name}: {error}"]
    except FolderError:
        # The disk of the register is full or read-only: better to end the stack without the lock than not at all.
        return _take_down(folder, progress, expected)


def _take_down(folder: Path, progress: Progress, expected: StackState | None) -> list[str]:
    residue: list[str] = []
    found: StackState | None = None
    with contextlib.suppress(StackNotFound):
        found = state.load(folder)
    if expected is not None and not _is_still(expected, found, folder):
        return []
    records: list[NodeRecord] = []
    if found is not None:
        progress(f"taking down stack {found.name}")
        # On a full disk this cannot be written; other controllers are then not told, but all is ended still.
        with contextlib.suppress(StackError), state.change(folder) as found:
            found.closing = True
        records = found.nodes
        if found.place != "here":
            # The machine was started anew since: the numbers mean other processes now.
            for node in records:
                node.process = None

    def left() -> list[processes.Process]:
        recorded = [node.process for node in records]
        return processes.members(processes.process_table(), f"{folder}/", recorded)

    segments: set[int] = set()
    for node in records:
        if node.kind == "postgres" and node.process is not None:
            segments |= postgres.segment_left_by(Path(node.folder), node.process.pid)
    try:
        if proven := left():
            segments |= postgres.segments_in_use({row.identity.pid for row in proven})
            for node in records:
                nodes.discard(node)
            if not records:
                nodes.discard_unrecorded(proven)
            with contextlib.suppress(NodeError):
                processes.wait_gone(left, DOWN_TIMEOUT_S)
            processes.kill_tree(left)
    except NodeError as error:
        residue.append(f"stack {folder.name}: {error}")
    residue += postgres.drop_segments(segments)
    residue += _remove_folder(folder)
    if not residue:
        try:
            ports.release(folder)
        except StackError as error:
            residue.append(f"ports of stack {folder.name}: {error}")
    return residue


def _is_still(expected: StackState, found: StackState | None, folder: Path) -> bool:
    """Return whether the stack is the expected one; if its folder was deleted, the register of ports knows."""
    if found is not None:
        return (found.owner, found.ports) == (expected.owner, expected.ports)
    return any(
        (entry.folder, entry.owner, entry.ports) == (str(folder), expected.owner, expected.ports)
        for entry in ports.reservations()
    )


def _remove_folder(folder: Path) -> list[str]:
    """Remove a stack's folder; return what cannot be removed.

    stack.json goes last: if this is interrupted, the next sweep finds the stack again and goes on.
    """
    problems: list[str] = []
    last = (state.STATE_FILE, "lock")
    try:
        for path in folder.iterdir():
            if path.name not in last:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in last:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        return problems  # removed by somebody else meanwhile
    except OSError as error:
        problems.append(f"{error.filename or folder}: {error.strerror}")
    return problems


def _remove_husk(folder: Path, reason: str) -> list[str]:
    """Remove a folder without a stack if nothing but a lock is in it; return the reason if it stays."""
    try:
        if [path.name for path in folder.iterdir()] in ([], ["lock"]):
            (folder / "lock").unlink(missing_ok=True)
            folder.rmdir()
            return []
    except OSError as error:
        reason = str(error)
    return [f"{folder}: {reason}"]


def _remove_unfinished(below: Path) -> None:
    """Remove folders of stacks that were being created by a process that died."""
    for path in below.glob(f"{state.NEW_PREFIX}*"):
        pid = path.name.rsplit("-", 2)[-2]
        if pid.isdecimal() and processes.identify(int(pid)) is None:
            shutil.rmtree(path, ignore_errors=True)


def silent(_message: str) -> None:
    """Say nothing."""
