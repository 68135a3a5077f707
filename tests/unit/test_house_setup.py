"""tools/setup says what is missing and how to get it, whatever Python the machine has."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = (
    "sh",
    "cat",
    "cksum",
    "date",
    "dirname",
    "flock",
    "grep",
    "head",
    "id",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "tail",
    "uname",
)

# A stand-in for an interpreter: knows its version, whether it has venv, and makes environments of stand-ins.
PYTHON = """#!/bin/sh
case "$*" in
*version_info*) echo {version} ;;
*ensurepip*) exit {no_venv} ;;
"-m venv "*)
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    cp "$0" .venv/bin/uv
    echo "prompt = 'ledgerproof'" > .venv/pyvenv.cfg
    ;;
"-m pip install "*) echo "{pip}" >&2; exit {pip_exit} ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the files that the setup reads, and an empty folder of programs beside it."""
    tree = tmp_path / "tree"
    (tree / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/setup", tree / "tools/setup")
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in (*TOOLS, "cp"):
        found = shutil.which(name)
        assert found, f"the tests need {name}"
        (programs / name).symlink_to(found)
    return tree


def add_python(
    tree: Path, name: str, version: str, *, has_venv: bool = True, pip: str = "", pip_works: bool = True
) -> Path:
    program = tree.parent / "programs" / name
    program.write_text(PYTHON.format(version=version, no_venv=int(not has_venv), pip=pip, pip_exit=int(not pip_works)))
    program.chmod(0o755)
    return program


def run_setup(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": str(tree.parent / "programs"), "HOME": str(tree.parent), **variables}
    return subprocess.run([tree / "tools/setup"], env=env, capture_output=True, text=True, check=False, timeout=60)


def test_without_python_it_says_what_to_install(tree: Path) -> None:
    done = run_setup(tree)
    assert done.returncode == 1
    assert "needs Python 3.11 to 3.14" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.9", "3.15", "4.0"])
def test_an_unsupported_python_is_named(tree: Path, version: str) -> None:
    add_python(tree, "python3", version)
    done = run_setup(tree)
    assert done.returncode == 1
    assert f"python3 is {version};" in done.stderr


def test_python_without_venv_says_which_package_brings_it(tree: Path) -> None:
    add_python(tree, "python3", "3.11", has_venv=False)
    done = run_setup(tree)
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


def test_the_first_fitting_python_is_taken(tree: Path) -> None:
    add_python(tree, "python3", "3.9")
    add_python(tree, "python3.13", "3.13", has_venv=False)
    add_python(tree, "python3.12", "3.12")
    done = run_setup(tree)
    assert done.returncode == 0, done.stderr
    assert "with python3.12 (3.12)" in done.stderr


def test_the_named_python_is_the_only_one_considered(tree: Path) -> None:
    add_python(tree, "python3", "3.11")
    other = add_python(tree, "old", "3.8")
    done = run_setup(tree, PYTHON=str(other))
    assert done.returncode == 1
    assert f"{other} is 3.8;" in done.stderr


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("Temporary failure in name resolution", "could not download"),
        ("Connection to proxy failed", "could not download"),
        ("No space left on device", "the disk is full"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "not the file that requirements.lock names"),
        ("Read-only file system", "not writable"),
        ("something else", "the whole output is in .venv/setup.log"),
    ],
)
def test_a_failed_step_shows_its_output_and_says_what_to_do(tree: Path, output: str, advice: str) -> None:
    add_python(tree, "python3", "3.11", pip=output, pip_works=False)
    done = run_setup(tree)
    assert done.returncode == 1
    assert output in done.stderr
    assert advice in done.stderr
    assert not (tree / ".venv/.ready").exists()


def test_it_does_its_work_once_and_again_when_the_lock_changes(tree: Path) -> None:
    add_python(tree, "python3", "3.11")
    first, second = run_setup(tree), run_setup(tree)
    assert "ready after" in first.stderr
    assert (second.returncode, second.stderr) == (0, "")
    with (tree / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert "bringing .venv up to date" in run_setup(tree).stderr


def test_a_failed_setup_is_begun_anew(tree: Path) -> None:
    add_python(tree, "python3", "3.11", pip="Connection reset", pip_works=False)
    assert run_setup(tree).returncode == 1
    add_python(tree, "python3", "3.11")
    again = run_setup(tree)
    assert again.returncode == 0
    assert "making .venv" in again.stderr


def test_another_python_asked_for_replaces_the_environment(tree: Path) -> None:
    add_python(tree, "python3", "3.11")
    run_setup(tree)
    other = add_python(tree, "other", "3.12")
    assert f"making .venv with {other} (3.12)" in run_setup(tree, PYTHON=str(other)).stderr


def make_foreign_environment(tree: Path, version: str) -> Path:
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/pyvenv.cfg").write_text("include-system-site-packages = false\n")
    for name in ("python", "uv"):
        shutil.copy(add_python(tree, "python3", version), tree / ".venv/bin" / name)
    mine = tree / ".venv/mine"
    mine.write_text("kept")
    return mine


def test_an_environment_that_somebody_else_made_is_used_and_not_emptied(tree: Path) -> None:
    mine = make_foreign_environment(tree, "3.11")
    done = run_setup(tree)
    assert done.returncode == 0, done.stderr
    assert "bringing .venv up to date" in done.stderr
    assert mine.exists()


def test_an_environment_of_somebody_else_that_does_not_fit_is_left_alone(tree: Path) -> None:
    mine = make_foreign_environment(tree, "3.8")
    done = run_setup(tree)
    assert done.returncode == 1
    assert "was not made by this project" in done.stderr
    assert mine.exists()


def test_a_mirror_that_pip_knows_is_told_to_uv(tree: Path) -> None:
    mirror = "https" + "://mirror.invalid/simple"
    program = add_python(tree, "python3", "3.11")
    answers = f"""case "$*" in
"-m pip config list") echo "global.index-url='{mirror}'"; echo "global.cert='/certificates.pem'" ;;
"pip install "*) echo "$UV_DEFAULT_INDEX $SSL_CERT_FILE" >> uv-settings ;;
esac
"""
    program.write_text(program.read_text() + answers)
    done = run_setup(tree)
    assert done.returncode == 0, done.stderr
    assert set((tree / "uv-settings").read_text().splitlines()) == {f"{mirror} /certificates.pem"}
