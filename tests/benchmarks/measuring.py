"""What the comparing benchmarks share: a throw-away environment, where figures come from, medians with ranges."""

import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median


@contextlib.contextmanager
def python_with(extra: Sequence[str], shared: Sequence[str]) -> Iterator[Path]:
    """Yield a Python that has the pinned requirements of `extra`.

    Without any, it is this one. Otherwise it is a throw-away environment, with the packages of `shared` in the
    versions of this one.
    """
    if not extra:
        yield Path(sys.executable)
        return
    requirements = [*extra, *(f"{package}=={version(package)}" for package in shared)]
    uv = str(Path(sys.executable).with_name("uv"))
    with tempfile.TemporaryDirectory(prefix="ledgerproof-bench-") as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(python), *requirements]
        subprocess.run(install, check=True)
        yield python


def machine() -> dict[str, str]:
    """Return where the figures come from."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "commit": commit or "none",
    }


def described(where: Mapping[str, str]) -> str:
    """Return one line that says where figures come from."""
    return "  ".join(f"{key}: {value}" for key, value in where.items())


def spread(values: Sequence[float]) -> str:
    """Format a median with its range."""
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return each value by the base's value of the same round."""
    return [value / reference for value, reference in zip(values, base, strict=True)]
