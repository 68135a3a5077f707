"""Says on what and from which commit a run was made."""

import os
import platform
import subprocess
from pathlib import Path
from typing import TypedDict

import psutil

GIT_TIMEOUT_S = 5.0
ROOT = Path(__file__).resolve().parent.parent


class Machine(TypedDict):
    """The machine of a run, as verdict.json shows it."""

    cpu: str
    cores: int
    memory_gb: float
    os: str
    python: str


def describe_machine() -> Machine:
    """Return processor, usable cores, memory (GiB), operating system and Python version."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit(root: Path = ROOT, apart_from: Path | None = None) -> str:
    """Return the commit of the source tree, "-dirty" added if it was changed, or "unknown" outside of git.

    Changes of the file `apart_from` do not count.
    """
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        paths = [] if apart_from is None else ["--", ".", f":(exclude){os.path.relpath(apart_from.resolve(), root)}"]
        return f"{head}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=all", *paths) else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
        ["git", "-C", str(root), *arguments],  # noqa: S607 - the user's own git
        capture_output=True,
        text=True,
        timeout=GIT_TIMEOUT_S,
        check=True,
    )
    return done.stdout.strip()
