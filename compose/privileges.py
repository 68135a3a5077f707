"""Root may not run Postgres: this module finds the command prefix that runs it as an ordinary user."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from compose.errors import PrivilegeError

USER = "nobody"
TIMEOUT_S = 20.0


def user_id() -> int | None:
    """Return the user id that Postgres and its files get, None if that is the user of this process."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(USER).pw_uid
    except KeyError as error:
        raise PrivilegeError(f"there is no user {USER!r} to run Postgres as: start as an ordinary user") from error


def group_id() -> int:
    """Return the group id that goes with `user_id`."""
    uid = user_id()
    return os.getegid() if uid is None else pwd.getpwuid(uid).pw_gid


def drop_prefix(program: Path, folder: Path) -> list[str]:
    """Return what to put before `program` so that it runs as an ordinary user in `folder`; empty unless root.

    Programs may live where only root can enter (an interpreter below /root): the capability to search
    folders is added then, and only then, for a container may not have it to give.
    """
    uid = user_id()
    if uid is None:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise PrivilegeError(
            "Postgres refuses to run as root and setpriv (package util-linux) is missing to hand it to "
            f"{USER!r}: install it or start as an ordinary user"
        )
    plain = [setpriv, f"--reuid={uid}", f"--regid={group_id()}", "--clear-groups"]
    searching = [*plain, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    reason = ""
    for prefix in (plain, searching):
        trial = [*prefix, "/bin/sh", "-c", 'cd "$1" && exec "$0" --version', str(program), str(folder)]
        done = subprocess.run(  # noqa: S603  our own words
            trial, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd="/"
        )
        if done.returncode == 0:
            return prefix
        reason = done.stderr.strip()
    raise PrivilegeError(
        f"user {USER!r} can run {program} in {folder} in no way: {reason}. Start as an ordinary user, or put the "
        "project and its state below folders that everybody may search"
    )
