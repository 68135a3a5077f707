"""Nothing is left behind, whoever is killed whenever, and nothing foreign is touched.

These stacks have owners in processes of their own, to be interrupted and killed.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from compose import downloads, ports
from compose import stack as controller
from compose.errors import DownloadError, FolderError, PortTaken, StackExists, StackNotFound
from compose.processes import members, process_table
from compose.stack import Stack, down_all, find_stacks, sweep
from compose.state import StackSpec

PROJECT = Path(__file__).parents[2]
PATIENCE_S = 120.0
SMALL = StackSpec(servers=1, only="infra")

OWNER = """
import sys
from pathlib import Path
from compose.stack import Stack
from compose.state import StackSpec

spec = StackSpec(servers=1, only="infra", keep=sys.argv[2] == "keep")
with Stack.start(spec, Path(sys.argv[1]), "owned", progress=lambda text: print(text, flush=True)) as stack:
    print("ready", flush=True)
    sys.stdin.read()
print("left:", stack.residue, flush=True)
"""


class Owner(NamedTuple):
    """A process that owns a stack named `owned` below `root`."""

    process: subprocess.Popen[str]
    root: Path

    @property
    def folder(self) -> Path:
        """The stack's folder."""
        return self.root / "stacks" / "owned"

    def wait_line(self, beginning: str) -> None:
        """Wait until the owner printed a line that begins so."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if line.startswith(beginning):
                return
        raise AssertionError("".join(seen))

    def kill(self) -> None:
        """SIGKILL the owner."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A state folder; all that belongs to it is ended after the test."""
    yield tmp_path / "state"
    report = down_all(tmp_path / "state")
    assert report.residue == []
    assert _processes_of(tmp_path) == []


@pytest.fixture
def owner(root: Path) -> Iterator[Owner]:
    """An owner whose stack is to be taken down with it."""
    made = _own(root, "not")
    yield made
    made.kill()


def _own(root: Path, keep: str) -> Owner:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(root), keep],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Owner(process, root)


def _processes_of(folder: Path) -> list[int]:
    return [row.identity.pid for row in members(process_table(), f"{folder.resolve()}/")]


def _reserved(folder: Path) -> bool:
    return any(entry.folder.startswith(str(folder.resolve())) for entry in ports.reservations())


def test_stacks_side_by_side_share_nothing(stack: Stack, root: Path) -> None:
    with Stack.start(SMALL, root) as one:
        assert not set(one.state.ports) & set(stack.state.ports)
        one.kill("pg0")
        one.pause("kafka")
        assert {status.state for status in stack.status(memory=False)} == {"running"}
        # The port of a dead node is still its own.
        with pytest.raises(PortTaken, match=str(one.port("pg0"))):
            Stack.start(StackSpec(servers=1, only="infra", base_port=one.port("pg0")), root)
        one.heal(PATIENCE_S)
    assert one.residue == []
    assert list((root / "stacks").iterdir()) == []
    assert _processes_of(root) == []
    assert not _reserved(root)
    assert {status.state for status in stack.status(memory=False)} == {"running"}


def test_killed_owner_leaves_nothing_after_the_next_down_and_foreign_processes_live(owner: Owner) -> None:
    owner.wait_line("ready")
    stranger = subprocess.Popen(["sleep", "600"], cwd=owner.folder / "pg0")
    try:
        Stack.attach(owner.folder).pause("redis", lease_s=600)
        owner.kill()
        assert len(_processes_of(owner.root)) > 5
        report = down_all(owner.root)
        assert (report.stopped, report.skipped, report.residue) == (["owned"], [], [])
        assert _processes_of(owner.root) == []
        assert not owner.folder.exists()
        assert not _reserved(owner.root)
        assert stranger.poll() is None
        assert down_all(owner.root).stopped == []  # harmless to repeat
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("moment", ["taking", "redis ready", "pg0 ready"])
def test_owner_killed_while_starting_leaves_nothing_after_the_next_down(owner: Owner, moment: str) -> None:
    if moment == "taking":
        deadline = time.monotonic() + PATIENCE_S
        while not _processes_of(owner.root):  # the very first process
            assert time.monotonic() < deadline
    else:
        owner.wait_line(moment)
    owner.kill()
    down_all(owner.root)
    assert _processes_of(owner.root) == []
    assert list((owner.root / "stacks").iterdir()) == []
    assert not _reserved(owner.root)


def test_next_start_anywhere_ends_processes_whose_folder_was_deleted(owner: Owner, tmp_path: Path) -> None:
    owner.wait_line("ready")
    owner.kill()
    shutil.rmtree(owner.root)
    assert len(_processes_of(owner.root)) > 5
    sweep(tmp_path / "another project")
    assert _processes_of(owner.root) == []
    assert not _reserved(owner.root)


def test_down_ends_processes_although_the_folder_was_deleted_meanwhile(root: Path) -> None:
    with Stack.start(SMALL, root) as one:
        shutil.rmtree(root)
        assert len(_processes_of(root)) > 5
    assert one.residue == []
    assert _processes_of(root) == []
    assert not _reserved(root)


def test_down_of_a_stack_that_is_gone_leaves_its_successor_alone(root: Path) -> None:
    first = Stack.start(SMALL, root, "same")
    assert first.down() == []
    assert first.down() == []  # harmless to repeat
    with Stack.start(SMALL, root, "same") as second:
        assert first.down() == []
        assert {status.state for status in second.status()} == {"running"}


@pytest.mark.parametrize("moment", ["redis ready", "ready"])
def test_interrupted_owner_takes_its_stack_down(owner: Owner, moment: str) -> None:
    owner.wait_line(moment)
    owner.process.send_signal(signal.SIGINT)
    owner.process.send_signal(signal.SIGINT)  # an impatient user
    output, _none = owner.process.communicate(timeout=PATIENCE_S)
    assert "KeyboardInterrupt" in output
    assert _processes_of(owner.root) == []
    assert list((owner.root / "stacks").iterdir()) == []


def test_stack_of_a_living_owner_is_left_alone(owner: Owner) -> None:
    owner.wait_line("ready")
    report = down_all(owner.root)
    assert report.stopped == []
    assert f"owned: in use by pid {owner.process.pid}" in report.skipped[0]
    with pytest.raises(StackExists, match="owned"):
        Stack.start(SMALL, owner.root, "owned")
    assert _reserved(owner.root)
    assert {status.state for status in Stack.attach(owner.folder).status()} == {"running"}
    owner.process.communicate("", timeout=PATIENCE_S)
    assert not owner.folder.exists()


def test_kept_stack_outlives_its_owner_until_it_is_taken_down(root: Path) -> None:
    owner = _own(root, "keep")
    owner.wait_line("ready")
    owner.process.communicate("", timeout=PATIENCE_S)
    assert sweep(root).stopped == []
    (found,) = find_stacks(root)
    kept = Stack.attach(owner.folder)
    assert {status.state for status in kept.status()} == {"running"}
    kept.kill("redis")
    kept.start_node("redis", PATIENCE_S)
    assert found.spec.keep
    assert down_all(root).stopped == ["owned"]
    with pytest.raises(StackNotFound):
        Stack.attach(owner.folder)


def test_failed_start_removes_everything_keeps_the_logs_and_says_why(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_arguments: object) -> None:
        while not (root / "stacks" / "failing" / "pg0" / "log").exists():
            time.sleep(0.01)
        raise DownloadError("could not fetch kafka")

    monkeypatch.setattr(downloads, "kafka_jars", no_network)
    with pytest.raises(DownloadError, match="could not fetch kafka"):
        Stack.start(SMALL, root, "failing")
    assert _processes_of(root) == []
    assert list((root / "stacks").iterdir()) == []
    assert (root / "failed" / "failing" / "pg0.log").exists()
    assert not _reserved(root)


def test_taken_port_ends_the_start_before_it_began(root: Path) -> None:
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        port = foreign.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} is in use by pid {os.getpid()}"):
            Stack.start(StackSpec(servers=1, only="infra", base_port=port - 2), root)
    assert list((root / "stacks").iterdir()) == []


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(FolderError, match="run in a folder that can be written"):
            Stack.start(SMALL, place)


def test_full_disk_is_noticed_before_anything_is_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "FREE_SPACE_MIN_BYTES", 1 << 60)
    with pytest.raises(FolderError, match="MB are free"):
        Stack.start(SMALL, root)
    assert list((root / "stacks").iterdir()) == []
