"""Kafka's jars: exactly the locked ones, or a clear word."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from compose import downloads
from compose.downloads import Jar
from compose.errors import DownloadError, FolderError, StackClosing

CONTENT = b"a jar"
JAR = Jar("org.example", "thing", "1.0", hashlib.sha256(CONTENT).hexdigest())


def nothing(_message: str = "") -> None:
    """Neither progress nor a reason to give up."""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A stand-in for the artifact repository: `answer` is the content it sends, or the error it raises."""
    behaviour: dict[str, object] = {"answer": CONTENT, "asked": 0}

    def maven(scratch: Path) -> SimpleNamespace:
        def resolve() -> Path:
            behaviour["asked"] = int(str(behaviour["asked"])) + 1
            answer = behaviour["answer"]
            if isinstance(answer, Exception):
                raise answer
            assert isinstance(answer, bytes)
            path = scratch / "thing.jar"
            path.write_bytes(answer)
            return path

        component = SimpleNamespace(path_prefix=Path("org/example"))
        artifact = SimpleNamespace(resolve=resolve, component=component)
        at_version = SimpleNamespace(at_version=lambda _v: SimpleNamespace(artifact=lambda: artifact))
        return SimpleNamespace(repo_cache=scratch, project=lambda _g, _a: at_version)

    monkeypatch.setattr(downloads, "_maven", maven)
    monkeypatch.setattr(downloads, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(downloads, "read_lock", lambda: [JAR])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return behaviour


def test_every_jar_is_locked_once_and_logging_fits_kafkas_own() -> None:
    jars = downloads.read_lock()
    assert len({(jar.group, jar.artifact) for jar in jars}) == len(jars) >= 40
    assert all(len(jar.sha256) == 64 for jar in jars)
    versions = {jar.artifact: jar.version for jar in jars}
    assert versions["kafka_2.13"] == versions["kafka-clients"] == downloads.KAFKA_VERSION
    assert versions["log4j-slf4j-impl"] == versions["log4j-core"]


def test_lock_file_names_no_host() -> None:
    assert "://" not in downloads.LOCK_FILE.read_text()


def test_jar_is_fetched_once(repository: dict[str, object], tmp_path: Path) -> None:
    expected = [tmp_path / "ledgerproof" / "jars" / "thing-1.0.jar"]
    assert downloads.kafka_jars(nothing, nothing) == expected
    assert downloads.kafka_jars(nothing, nothing) == expected
    assert repository["asked"] == 1
    assert [path.name for path in expected[0].parent.iterdir()] == ["thing-1.0.jar"]


def test_damaged_jar_is_fetched_again(repository: dict[str, object]) -> None:
    (path,) = downloads.kafka_jars(nothing, nothing)
    path.write_bytes(b"half a j")
    assert downloads.kafka_jars(nothing, nothing) == [path]
    assert path.read_bytes() == CONTENT


def test_other_content_than_locked_never_gets_into_the_cache(repository: dict[str, object], tmp_path: Path) -> None:
    repository["answer"] = b"something else"
    with pytest.raises(DownloadError, match=r"org\.example:thing:1\.0: its SHA-256"):
        downloads.kafka_jars(nothing, nothing)
    assert list((tmp_path / "ledgerproof" / "jars").iterdir()) == []


def test_no_network_says_what_is_missing_and_what_to_do(repository: dict[str, object]) -> None:
    repository["answer"] = ConnectionError("unreachable")
    with pytest.raises(DownloadError, match=r"thing:1\.0: no connection.*Connect to the internet"):
        downloads.kafka_jars(nothing, nothing)
    assert repository["asked"] == downloads.TRIES


def test_full_disk_is_not_called_a_network_error(repository: dict[str, object]) -> None:
    repository["answer"] = OSError(28, "No space left on device")
    with pytest.raises(FolderError, match="No space left"):
        downloads.kafka_jars(nothing, nothing)


def test_fetching_can_be_given_up(repository: dict[str, object]) -> None:
    def give_up() -> None:
        raise StackClosing("enough")

    with pytest.raises(StackClosing):
        downloads.kafka_jars(nothing, give_up)
    assert repository["asked"] == 0


def test_leftovers_of_a_killed_fetch_are_removed(repository: dict[str, object], tmp_path: Path) -> None:
    left = tmp_path / "ledgerproof" / "jars" / ".fetch-killed"
    left.mkdir(parents=True)
    downloads.kafka_jars(nothing, nothing)
    assert not left.exists()


def test_cache_that_cannot_be_written_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FolderError, match="XDG_CACHE_HOME"):
        downloads.kafka_jars(nothing, nothing)
