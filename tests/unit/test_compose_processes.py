"""Which processes belong to a node, and that no other is ever touched."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compose.postgres import forget_zombie
from compose.processes import (
    Errand,
    Identity,
    Machine,
    Process,
    give_way,
    identify,
    is_alive,
    is_zombie,
    kill_tree,
    members,
    pause_tree,
    place_of,
    process_table,
    resume_tree,
    send,
    spawn,
    this_machine,
    wait_gone,
)

FAMILY = "import os, time\nfor _ in range(2):\n    if os.fork() == 0: break\ntime.sleep(60)"
"""A process with two children."""
ORPHANS = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
"""A process that ends and leaves a child in a session of its own."""


def test_a_zombies_lock_is_removed_and_a_living_servers_is_not(tmp_path: Path) -> None:
    lock = tmp_path / "data" / "postmaster.pid"
    lock.parent.mkdir()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        lock.write_text(f"{child.pid}\n/data\n")
        forget_zombie(tmp_path)
        assert lock.exists()
        child.kill()
        until(lambda: is_zombie(child.pid))
        forget_zombie(tmp_path)
        assert not lock.exists()
        forget_zombie(tmp_path)
    finally:
        child.kill()
        child.wait()


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition; fail if it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Path]:
    """The token of a node; whatever has it is ended after the test."""
    path = tmp_path / "token"
    yield path
    kill_tree(lambda: members(process_table(), path))


def start(code: str, token: Path) -> Identity:
    """Run Python code as a process of a node."""
    return spawn([sys.executable, "-c", code], token=token, log=token.with_name("log"), env=dict(os.environ))


def test_children_belong_to_the_node_of_their_parent(token: Path) -> None:
    start(FAMILY, token)
    until(lambda: len(members(process_table(), token)) == 3)


def test_orphan_in_a_session_of_its_own_is_still_found_by_its_token(token: Path) -> None:
    first = start(ORPHANS, token)
    until(lambda: not is_alive(first))
    left = members(process_table(), token)
    assert len(left) == 1
    assert left[0].parent_pid != first.pid


def test_program_that_closes_what_it_inherits_is_found_by_its_environment(token: Path) -> None:
    program = "import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    first = start(program, token)  # subprocess closes every descriptor of its child above 2
    until(lambda: not is_alive(first) and len(members(process_table(), token)) == 1)


def test_token_proves_its_processes_after_its_folder_was_removed(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    who = start("import time; time.sleep(60)", folder / "token")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    found = members(process_table(), f"{tmp_path}/")
    assert [row.identity for row in found] == [who]
    kill_tree(lambda: members(process_table(), f"{tmp_path}/"))
    assert not is_alive(who)


def test_tokens_of_other_folders_with_the_same_beginning_do_not_count(tmp_path: Path) -> None:
    row = Process(Identity(1, 1), 0, "S", 0.0, (f"{tmp_path}/stack-2/pg0/token",))
    assert members([row], f"{tmp_path}/stack/") == []
    assert members([row], f"{tmp_path}/stack-2/pg0/tok") == []


def test_recycled_pid_is_neither_found_nor_signalled(token: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        now = identify(stranger.pid)
        assert now is not None
        before = Identity(stranger.pid, now.start_ticks - 1)
        assert not is_alive(before)
        assert members(process_table(), token, [before]) == []
        assert send(before, signal.SIGKILL) is False
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_child_older_than_its_parent_is_no_child() -> None:
    parent = Process(Identity(100, 50), 1, "S", 0.0, ("/run/token",))
    older = Process(Identity(101, 40), 100, "S", 0.0, ())
    younger = Process(Identity(102, 60), 100, "S", 0.0, ())
    assert members([parent, older, younger], "/run/token") == [parent, younger]


def test_foreign_process_inside_the_folder_is_left_alone(tmp_path: Path, token: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"], cwd=tmp_path)
    try:
        who = start("import time; time.sleep(60)", token)
        assert [killed.pid for killed in kill_tree(lambda: members(process_table(), f"{tmp_path}/"))] == [who.pid]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_pause_stops_every_process_of_the_tree_and_resume_lets_them_run(token: Path) -> None:
    start(FAMILY, token)
    find: Callable[[], list[Process]] = lambda: members(process_table(), token)  # noqa: E731
    until(lambda: len(find()) == 3)
    assert len(pause_tree(find)) == 3
    until(lambda: {row.state for row in find()} == {"T"})
    assert len(resume_tree(find)) == 3
    until(lambda: {row.state for row in find()} == {"S"})


def test_kill_ends_a_tree_that_keeps_forking(token: Path) -> None:
    forking = "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n"
    forking += "    if os.fork() == 0:\n        time.sleep(0.2)\n        os._exit(0)\n    time.sleep(0.002)\n"
    start(forking, token)
    until(lambda: len(members(process_table(), token)) > 3)
    kill_tree(lambda: members(process_table(), token))
    assert members(process_table(), token) == []


def test_kill_ends_a_paused_tree(token: Path) -> None:
    start(FAMILY, token)
    find: Callable[[], list[Process]] = lambda: members(process_table(), token)  # noqa: E731
    until(lambda: len(find()) == 3)
    pause_tree(find)
    assert len(kill_tree(find)) == 3
    assert find() == []


def test_wait_gone_names_what_is_left(token: Path) -> None:
    from compose.errors import NodeStuck

    who = start("import time; time.sleep(60)", token)
    with pytest.raises(NodeStuck, match=str(who.pid)):
        wait_gone(lambda: members(process_table(), token), timeout_s=0.05)


def test_node_does_not_hold_pipes_of_its_starter(token: Path) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        start("import time; time.sleep(60)", token)
        os.close(writing)
        assert os.read(reading, 1) == b""  # end of file: nobody else has the writing end
    finally:
        os.close(reading)


def test_node_does_not_ignore_signals_that_python_ignores(token: Path) -> None:
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    log = token.with_name("log")
    assert errand(token).run(["/bin/grep", "SigIgn", "/proc/self/status"], timeout_s=20) == 0
    ignored = int(log.read_text().split()[1], 16)
    assert not ignored >> (signal.SIGPIPE - 1) & 1


def errand(token: Path, go_on: Callable[[], None] = lambda: None) -> Errand:
    """An errand of the test's node."""
    return Errand(token, token.with_name("log"), dict(os.environ), go_on, lambda _message: None)


def test_errand_returns_how_its_program_ended(token: Path) -> None:
    assert errand(token).run([sys.executable, "-c", "raise SystemExit(7)"], timeout_s=20) == 7
    ended_by = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert errand(token).run(ended_by, timeout_s=20) == -9


def test_errand_that_takes_too_long_is_killed(token: Path) -> None:
    with pytest.raises(TimeoutError):
        errand(token).run([sys.executable, "-c", FAMILY], timeout_s=0.3)
    assert members(process_table(), token) == []


def test_errand_that_is_given_up_is_killed(token: Path) -> None:
    class GivenUp(Exception):
        pass

    calls = []

    def go_on() -> None:
        calls.append(1)
        if len(calls) > 5:
            raise GivenUp

    with pytest.raises(GivenUp):
        errand(token, go_on).run([sys.executable, "-c", FAMILY], timeout_s=20)
    assert members(process_table(), token) == []


def test_processes_of_another_container_or_host_are_not_judged() -> None:
    here = this_machine()
    assert place_of(here) == "here"
    assert place_of(Machine("renamed", here.boot, here.pid_namespace)) == "here"
    assert place_of(Machine(here.host, here.boot, "pid:[1]")) == "elsewhere"
    assert place_of(Machine(here.host, "another boot", here.pid_namespace)) == "before this boot"
    assert place_of(Machine("another", "another boot", here.pid_namespace)) == "elsewhere"


def test_a_process_that_gives_way_does_so_with_its_children_and_threads(token: Path) -> None:
    code = "import os, threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n" + FAMILY
    who = start(code, token)
    until(lambda: len(members(process_table(), token)) == 3 and len(list(Path(f"/proc/{who.pid}/task").iterdir())) == 2)
    give_way(who, 7)
    for row in members(process_table(), token):
        for thread in Path(f"/proc/{row.identity.pid}/task").iterdir():
            assert os.getpriority(os.PRIO_PROCESS, int(thread.name)) == 7
    grouped = Path(f"/proc/{who.pid}/autogroup")
    if grouped.exists():
        assert grouped.read_text().split()[-1] == "7"
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0, "the caller itself does not"


def test_giving_way_for_a_process_that_has_ended_is_no_error(token: Path) -> None:
    who = start("pass", token)
    until(lambda: not is_alive(who))
    give_way(who, 7)
