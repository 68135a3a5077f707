"""Kafka's jar files: exactly those of `conf/kafka-jars.lock`, fetched once per user and checked every time.

`python -m compose.downloads` fetches what is missing; `python -m compose.downloads --relock` resolves the
lock file anew after the version below was changed.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from compose.errors import DownloadError, FolderError

if TYPE_CHECKING:
    from jgo.maven import MavenContext

KAFKA_VERSION = "4.1.1"
KAFKA = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
LOGGING = "org.apache.logging.log4j:log4j-slf4j-impl:2.24.3"
"""Kafka's own distribution adds this binding to the jars it depends on; without it nothing is logged."""
LOCK_FILE = Path(__file__).parent / "conf" / "kafka-jars.lock"

THREADS = 8
TRIES = 3
RETRY_AFTER_S = 1.0
TIMEOUT_S = 20
LOCK_TIMEOUT_S = 600.0
"""Another process may be fetching on a slow line."""
LOCK_TRY_S = 0.5
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
SCRATCH_PREFIX = ".fetch-"

Progress = Callable[[str], None]
GoOn = Callable[[], None]


class Jar(NamedTuple):
    """One locked file."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """Name of the file in the cache."""
        return f"{self.artifact}-{self.version}.jar"

    @property
    def coordinate(self) -> str:
        """`group:artifact:version`."""
        return f"{self.group}:{self.artifact}:{self.version}"


def cache_folder() -> Path:
    """Return (and make) the user's cache folder of this project; FolderError if it cannot be made."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        # The convention says that a relative path is to be ignored.
        folder = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "ledgerproof"
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError as error:
        raise FolderError("there is no home folder for the cache: set HOME or XDG_CACHE_HOME") from error
    except OSError as error:
        raise FolderError(
            f"cannot make the cache folder {error.filename}: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return folder


@contextlib.contextmanager
def cache_held(go_on: GoOn) -> Iterator[None]:
    """Hold the cache while something is added to it; the kernel frees it if the holder dies.

    `go_on` is called while another process holds it and raises to give up. Raises FolderError.
    """
    lock = FileLock(cache_folder() / "lock")
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while not lock.is_locked:
        go_on()
        try:
            lock.acquire(timeout=LOCK_TRY_S)
        except Timeout as error:
            if time.monotonic() > deadline:
                raise FolderError(
                    f"another process has been filling {cache_folder()} for {LOCK_TIMEOUT_S:g} s: end it"
                ) from error
        except OSError as error:
            raise FolderError(
                f"cannot write {cache_folder()}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
            ) from error
    try:
        yield
    finally:
        lock.release()


def read_lock(path: Path = LOCK_FILE) -> list[Jar]:
    """Return the jars of the lock file."""
    jars = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            coordinate, sha256 = line.split()
            group, artifact, version = coordinate.split(":")
            jars.append(Jar(group, artifact, version, sha256))
    return jars


def kafka_jars(progress: Progress, go_on: GoOn) -> list[Path]:
    """Return the paths of Kafka's jars, after fetching those that are missing or damaged.

    `go_on` is called meanwhile and raises to give up. Raises DownloadError if one cannot be fetched or has
    another checksum than the locked one, FolderError if the cache cannot be written.
    """
    jars = read_lock()
    folder = cache_folder() / "jars"
    if missing(folder, jars):
        with cache_held(go_on):
            fetch(folder, missing(folder, jars), progress, go_on)
    return [folder / jar.filename for jar in jars]


def missing(folder: Path, jars: list[Jar]) -> list[Jar]:
    """Return the jars that are not in `folder` with their locked checksum."""
    with ThreadPoolExecutor(THREADS) as pool:
        good = list(pool.map(lambda jar: _is_good(folder, jar), jars))
    return [jar for jar, is_good in zip(jars, good, strict=True) if not is_good]


def fetch(folder: Path, jars: list[Jar], progress: Progress, go_on: GoOn) -> None:
    """Fetch jars into `folder`, each checked before it appears there; errors as `kafka_jars`."""
    if not jars:
        return
    progress(f"fetching Kafka {KAFKA_VERSION}: {len(jars)} files into {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(left)  # of a process that was killed: whoever comes here holds the cache
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH_PREFIX) as scratch:
            context = _maven(Path(scratch))
            pool = ThreadPoolExecutor(THREADS)
            try:
                for done in [pool.submit(_fetch_one, context, jar, folder, go_on) for jar in jars]:
                    done.result()
            finally:
                pool.shutdown(cancel_futures=True)
    except OSError as error:
        raise FolderError(f"cannot write {error.filename or folder}: {error.strerror}") from error


def relock(path: Path = LOCK_FILE) -> list[Jar]:
    """Resolve Kafka's dependencies anew and write the lock file; return its jars."""
    with tempfile.TemporaryDirectory() as scratch:
        context = _maven(Path(scratch))
        # Resolved together, the binding's version management would drag Kafka's client back to 3.8.
        inputs, needed = context.resolver.resolve([context.create_dependency(KAFKA)])
        wanted = [*inputs, *needed, context.create_dependency(LOGGING)]
        with ThreadPoolExecutor(THREADS) as pool:
            files = list(pool.map(lambda dependency: dependency.artifact.resolve(), wanted))
        jars = sorted(
            Jar(item.groupId, item.artifactId, item.version, _sha256(file))
            for item, file in zip(wanted, files, strict=True)
        )
    names = [(jar.group, jar.artifact) for jar in jars]
    if len(set(names)) != len(names):
        raise DownloadError("one artifact was resolved in two versions: the class path would be ambiguous")
    lines = [f"# {KAFKA} and what it needs; written by `python -m compose.downloads --relock`"]
    lines += [f"{jar.coordinate} {jar.sha256}" for jar in jars]
    path.write_text("\n".join(lines) + "\n")
    return jars


def _maven(scratch: Path) -> "MavenContext":
    """Return access to the artifact repository that keeps its files in `scratch`."""
    from jgo.maven import MavenContext  # noqa: PLC0415  half a second that a start with a full cache need not pay

    return MavenContext(repo_cache=scratch, timeout=TIMEOUT_S)


def _fetch_one(context: "MavenContext", jar: Jar, folder: Path, go_on: GoOn) -> None:
    """Fetch one jar into the context's scratch folder, check it, and only then move it into the cache."""
    artifact = context.project(jar.group, jar.artifact).at_version(jar.version).artifact()
    reason = ""
    for attempt in range(TRIES):
        go_on()
        if attempt:
            time.sleep(RETRY_AFTER_S * attempt)
        try:
            path = Path(artifact.resolve())
        except OSError as error:  # every error of the HTTP library is one too, but without a number
            if error.errno in DISK_ERRORS:
                raise
            reason = f"no connection ({type(error).__name__})"
            shutil.rmtree(context.repo_cache / artifact.component.path_prefix, ignore_errors=True)
            continue
        except RuntimeError as error:
            raise DownloadError(
                f"{jar.coordinate} is not in the artifact repository: look at {LOCK_FILE.name}"
            ) from error
        found = _sha256(path)
        if found == jar.sha256:
            path.replace(folder / jar.filename)
            return
        reason = f"its SHA-256 is {found}, locked is {jar.sha256}"
        path.unlink()
    raise DownloadError(
        f"could not fetch {jar.coordinate}: {reason}. Connect to the internet once (Kafka is kept in {folder} "
        f"afterwards), set HTTPS_PROXY or REQUESTS_CA_BUNDLE if your network needs them, or copy that folder from a "
        "machine that has it"
    )


def _is_good(folder: Path, jar: Jar) -> bool:
    try:
        return _sha256(folder / jar.filename) == jar.sha256
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> int:
    """Fetch or relock; return the exit code."""
    try:
        if arguments == ["--relock"]:
            print(f"{len(relock())} jars locked in {LOCK_FILE}")
        elif not arguments:
            print(f"{len(kafka_jars(print, lambda: None))} jars in {cache_folder() / 'jars'}")
        else:
            print("usage: python -m compose.downloads [--relock]", file=sys.stderr)
            return 2
    except (DownloadError, FolderError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
