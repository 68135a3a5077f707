"""Reads the planted bugs: a header in TOML, a line of equals signs, and a unified diff; applies the diff exactly.

A hunk is found by its text and not by its line number, so that changes elsewhere in a file do not matter, and it
must fit at one place only. A patch that does not is an error: a planted bug that is not planted proves nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

FOLDER: Final = Path("tests/mutants")
"""Below the project's folder."""
FENCE: Final = "====="
LAYERS: Final = (
    "writer",
    "ledger",
    "relay",
    "matcher",
    "settler",
    "projector",
    "cache",
    "api",
    "routing",
    "reconciliation",
    "recovery",
    "harness",
)
TIERS: Final = ("worlds", "stack", "plan")
"""From cheap to dear: made-up evidence only; the service in one process on real servers; processes and a plan file."""
_HUNK: Final = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")
_ID: Final = re.compile(r"[a-z][a-z0-9-]{3,60}")
_CODE: Final = re.compile(r"[AV]\d\d")


class PatchError(Exception):
    """A planted bug cannot be read or does not fit the tree any more; the message names it and what to do."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a planted bug is, and what must happen where it is planted."""

    id: str
    layer: str
    title: str
    """What the program does wrong, in one sentence."""
    trigger: str
    """The scenario (or the plan file, below tests/mutants/plans) in which it shows."""
    must: list[str]
    """Codes that must fire."""
    may: list[str] = []
    """Further codes that may fire."""
    control: str = "silent"
    """What the clean tree does under the same trigger."""
    tier: str = "stack"
    owns: str | None = None
    """The code that only this catches: no other fires."""
    verdict: str = "INVARIANT_VIOLATED"
    """What the run must be called."""
    reason: str = ""
    """A part of one of the reasons that the verdict must give."""
    halves: list[list[int]] = []
    """For a pair of safeguards: the hunks (from 0) that remove each of them. One half alone must change nothing."""
    field: str = ""
    """How such a bug was met elsewhere, if it was."""


@dataclass(frozen=True)
class Hunk:
    """One place of one file: the lines that are there, and those that are to be there."""

    path: str
    line: int
    """Where it was when the patch was made; it only decides between nothing."""
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    header: Header
    hunks: tuple[Hunk, ...]
    file: str

    @property
    def is_harness(self) -> bool:
        """Whether it is a bug of the harness and not of the service."""
        return self.header.layer == "harness"

    @property
    def is_pair(self) -> bool:
        """Whether it removes two safeguards that overlap."""
        return bool(self.header.halves)

    @property
    def paths(self) -> list[str]:
        """The files it changes."""
        return sorted({hunk.path for hunk in self.hunks})


def load_all(folder: Path) -> list[Mutant]:
    """Read every planted bug of a folder, by id. Raises PatchError for one that makes no sense."""
    found = [parse(path.read_text(encoding="utf-8"), path.name) for path in sorted(folder.glob("*.patch"))]
    if not found:
        raise PatchError(f"there are no planted bugs in {folder}")
    return sorted(found, key=lambda mutant: mutant.header.id)


def parse(text: str, file: str) -> Mutant:
    """Read one planted bug. Raises PatchError."""
    top, fence, diff = text.partition(f"\n{FENCE}\n")
    if not fence:
        raise PatchError(f"{file}: a line {FENCE} must stand between header and diff")
    try:
        header = msgspec.toml.decode(top, type=Header)
    except msgspec.DecodeError as error:
        raise PatchError(f"{file}: the header is wrong: {error}") from error
    hunks = tuple(_hunks(diff.splitlines(), file))
    _check(header, len(hunks), file)
    return Mutant(header, hunks, file)


def _check(header: Header, hunks: int, file: str) -> None:
    wrong = [
        text
        for bad, text in (
            (not _ID.fullmatch(header.id), "id is not of small letters, digits and hyphens"),
            (file != f"{header.id}.patch", f"the file should be named {header.id}.patch"),
            (header.layer not in LAYERS, f"layer is none of {', '.join(LAYERS)}"),
            (header.tier not in TIERS, f"tier is none of {', '.join(TIERS)}"),
            (not (header.title and header.trigger and header.control), "title, trigger or control is empty"),
            (not header.must and header.layer != "harness", "must names no code"),
            (not header.must and not header.reason, "without a code it must give a reason"),
            (bool(set(header.must) & set(header.may)), "a code is in must and in may"),
            (not all(_CODE.fullmatch(code) for code in [*header.must, *header.may]), "a code has another form"),
            (header.owns is not None and header.must != [header.owns], "owns is not the only code in must"),
            (not hunks, "there is no change in it"),
            (bool(header.halves) and sorted(n for half in header.halves for n in half) != list(range(hunks)),
             "halves do not have each hunk once"),
            (len(header.halves) not in (0, 2), "halves are two"),
        )
        if bad
    ]  # fmt: skip
    if wrong:
        raise PatchError(f"{file}: {'; '.join(wrong)}")


def _hunks(lines: Sequence[str], file: str) -> Iterable[Hunk]:
    path, number = "", 0
    before: list[str] = []
    after: list[str] = []

    def taken() -> Iterable[Hunk]:
        if before or after:
            if not path:
                raise PatchError(f"{file}: a change before the first file")
            yield Hunk(path, number, tuple(before), tuple(after))
            before.clear()
            after.clear()

    for line in lines:
        if line.startswith("--- "):
            yield from taken()
        elif line.startswith("+++ "):
            path = line[4:].split("\t")[0].removeprefix("b/")
        elif match := _HUNK.match(line):
            yield from taken()
            number = int(match[1])
        elif line[:1] == "-":
            before.append(line[1:])
        elif line[:1] == "+":
            after.append(line[1:])
        elif line[:1] == " " or not line:
            before.append(line[1:])
            after.append(line[1:])
        elif not line.startswith("\\"):
            raise PatchError(f"{file}: not a line of a diff: {line[:60]!r}")
    yield from taken()


def patched(hunks: Sequence[Hunk], files: Mapping[str, str]) -> dict[str, str]:
    """Return the new text of every file that the hunks change. Raises PatchError where one does not fit exactly.

    `files` has the present texts by path. A hunk fits where its old lines stand, and they must stand once.
    """
    changed: dict[str, list[str]] = {}
    for hunk in hunks:
        if hunk.path not in files:
            raise PatchError(f"there is no file {hunk.path}")
        lines = changed.setdefault(hunk.path, files[hunk.path].split("\n"))
        size = len(hunk.before)
        places = [at for at in range(len(lines) - size + 1) if tuple(lines[at : at + size]) == hunk.before]
        if not hunk.before or len(places) != 1:
            raise PatchError(
                f"the change at line {hunk.line} of {hunk.path} fits {len(places)} places: write it anew for the text"
                " that is there now"
            )
        lines[places[0] : places[0] + size] = hunk.after
    return {path: "\n".join(lines) for path, lines in changed.items()}


def apply(mutant: Mutant, root: Path, hunks: Sequence[Hunk] | None = None) -> list[Path]:
    """Change the files of a tree by a planted bug (or some of its hunks); return them. Raises PatchError."""
    chosen = mutant.hunks if hunks is None else hunks
    try:
        texts = {hunk.path: (root / hunk.path).read_text(encoding="utf-8") for hunk in chosen}
        changed = patched(chosen, texts)
    except (OSError, PatchError) as error:
        raise PatchError(f"{mutant.file}: {error}") from error
    for path, text in changed.items():
        (root / path).write_text(text, encoding="utf-8")
    return [root / path for path in changed]
