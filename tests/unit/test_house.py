"""Rules of the house that no linter knows: the lock file, the menu, the documents."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = {"prove", "test", "check", "up", "down", "load", "chaos", "sim", "bench", "report", "clean", "lock", "help"}


def tracked_files() -> list[Path]:
    """Files that git tracks, or would track; outside a clone, every file of the tree that is text."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.fail(f"this test reads the files of a git clone: {listed.stderr}")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The text of a file; empty if it is not text."""
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def requirements() -> list[str]:
    dependencies: list[str] = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    return dependencies


def locked_versions(name: str) -> list[tuple[int, ...]]:
    found = re.findall(rf"^{re.escape(name)}==([\d.]+)", LOCK, re.MULTILINE)
    return [tuple(map(int, version.split("."))) for version in found]


# --- requirements.lock ------------------------------------------------------------------------------------


def test_the_lock_names_no_address() -> None:
    for sign in ("://", "http:", "https:", "--index", "--find-links", "--extra-index", " @ "):
        assert sign not in LOCK


def test_every_locked_package_has_hashes() -> None:
    packages = re.split(r"\n(?=[a-z0-9])", LOCK)[1:]
    assert len(packages) > 50
    assert [p.split(" ")[0] for p in packages if "--hash=sha256:" not in p] == []


@pytest.mark.parametrize("requirement", requirements())
def test_every_dependency_is_locked_at_or_above_its_bound(requirement: str) -> None:
    match = re.match(r"([a-z0-9-]+)>=([\d.]+)(;|$)", requirement)
    assert match, f"{requirement} needs a lower bound"
    versions = locked_versions(match[1])
    assert versions, "run `make lock`"
    assert min(versions) >= tuple(map(int, match[2].split(".")))


def test_no_tracked_file_names_a_package_index() -> None:
    setting = re.compile(r"(index-url|index_url|find-links|find_links|default-index)[ =:\"']+[a-z]+://", re.IGNORECASE)
    assert [str(path.relative_to(ROOT)) for path in tracked_files() if setting.search(text_of(path))] == []


def test_no_lock_of_a_tool_that_records_addresses_is_tracked() -> None:
    assert [
        p.name for p in tracked_files() if p.name in {"uv.lock", "poetry.lock", "Pipfile.lock", "package-lock.json"}
    ] == []


# --- the menu ---------------------------------------------------------------------------------------------


def make(*arguments: str) -> str:
    """What make prints. It must not inherit the flags of the make that runs the tests."""
    env = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS"}
    }
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def menu_lines() -> list[re.Match[str]]:
    """Target and description of each line of the menu that `make` alone prints."""
    return list(re.finditer(r"^  ([a-z]+) +(\S.*)$", make(), re.MULTILINE))


def test_make_alone_prints_every_target_aligned() -> None:
    lines = menu_lines()
    assert {line[1] for line in lines} >= TARGETS
    assert len({line.start(2) - line.start() for line in lines}) == 1


def test_every_target_of_the_menu_has_a_recipe() -> None:
    for line in menu_lines():
        assert make("-n", line[1]).strip(), line[1]


def test_arguments_are_passed_on() -> None:
    assert "ledgerproof prove --seed 7" in make("-n", "prove", "ARGS=--seed 7")


# --- documents --------------------------------------------------------------------------------------------


def linked_files(document: Path) -> list[Path]:
    """The files of the repository that a Markdown document links to."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    return [(document.parent / link).resolve() for link in links if "://" not in link]


@pytest.mark.parametrize("document", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_documents_link_to_files_that_exist(document: Path) -> None:
    assert [str(path) for path in linked_files(document) if not path.exists()] == []


def test_decisions_are_numbered_without_gap_and_have_every_section() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for number, page in enumerate(pages, start=1):
        text = page.read_text()
        assert text.startswith(f"# {number}. "), page.name
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert headings == ["Context", "Options", "Decision", "Consequences"], page.name
        assert re.search(r"^Status: (accepted|superseded by \d{4})$", text, re.MULTILINE), page.name
        assert len(text.splitlines()) <= 70, f"{page.name} is more than a page"


def errata_rows() -> list[list[str]]:
    lines = (ROOT / "docs/errata.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| \d", line)]


def test_errata_are_numbered_and_complete() -> None:
    rows = errata_rows()
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    for row in rows:
        assert len(row) == 5, row
        assert all(row), row


def test_every_test_that_the_errata_name_exists() -> None:
    defined: dict[str, set[str]] = {}
    named = 0
    for row in errata_rows():
        evidence = row[4]
        for file, test in re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", evidence):
            path = file or "tests/stack/test_errata_sql.py"
            if path not in defined:
                defined[path] = set(re.findall(r"def (test_\w+)", (ROOT / path).read_text()))
            assert test in defined[path], f"row {row[0]}: {path}::{test}"
            named += 1
        if "`test_" not in evidence and "::" not in evidence:
            assert re.match(r"\*Pending: |Arithmetic|Read from", evidence), f"row {row[0]} shows nothing"
    assert named > 30
