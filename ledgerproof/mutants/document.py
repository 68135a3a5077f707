"""Writes docs/mutants.md from the headers of the planted bugs and the stored matrix."""

from pathlib import Path
from typing import Final

from invariants.anomalies import CHECKS
from ledgerproof.mutants.matrix import STORED, Matrix, NotStored, load, owners
from ledgerproof.mutants.patches import FOLDER, Mutant, load_all

DOCUMENT: Final = Path("docs/mutants.md")
NOT_OWNED: Final[dict[str, str]] = {
    "A06": "whatever takes a wallet below zero is A07 as well, by definition",
    "A07": "a client's debit that does it is A06 as well; an entry of the settler that does it is refused twice before",
    "A32": "a row that a server wrote of a shard it had given up is on the wrong server, so it is A31 as well",
}
"""Codes of which no planted bug can show nothing else, and why."""


def write(root: Path) -> Path:
    """Write the document of a tree and return its path. Raises PatchError, OSError."""
    path = root / DOCUMENT
    path.write_text(text(load_all(root / FOLDER), stored(root)), encoding="utf-8")
    return path


def stored(root: Path) -> Matrix | None:
    """Return the stored matrix of a tree, None if there is none."""
    try:
        return load(root / STORED)
    except NotStored:
        return None


def text(mutants: list[Mutant], matrix: Matrix | None) -> str:
    """Return the document."""
    rows = {row.id: row for row in matrix.rows} if matrix is not None else {}
    harness = [mutant for mutant in mutants if mutant.is_harness]
    pairs = [mutant for mutant in mutants if mutant.is_pair]
    service = [mutant for mutant in mutants if not mutant.is_harness and not mutant.is_pair]
    lines = [
        "# Planted bugs",
        "",
        "Written by `ledgerproof mutants --write` from the patches in `tests/mutants` and `reports/mutants.json`.",
        "",
        "Each bug is a patch that is applied to a copy of the tree. Its trigger is a scenario: the service on real",
        "Postgres servers, Kafka and Redis, with a client that records (`stack`), or made-up evidence for bugs of the",
        "judge (`worlds`). It is killed when exactly the right codes fire, with a witness, and the clean tree is",
        "silent under the same trigger. `make mutants` runs all of them, `ledgerproof mutants --only ID` one,",
        "`ledgerproof mutants --stored` shows the last stored run.",
        "",
    ]
    if matrix is not None:
        lines += [
            f"Stored run: {matrix.made_at}, commit {matrix.commit}: {matrix.killed} of {len(matrix.rows)} killed.",
            "",
        ]
    for title, chosen in (
        (f"## {len(service)} bugs of the service", service),
        (f"## {len(harness)} bugs of the harness", harness),
        (f"## {len(pairs)} pairs of safeguards", pairs),
    ):
        lines += [title, ""]
        if chosen is pairs:
            lines += ["Two safeguards that overlap, removed together; each of them alone keeps the ledger safe.", ""]
        lines += ["| id | layer | what it does wrong | trigger | must | killed |", "|---|---|---|---|---|---|"]
        for mutant in chosen:
            header, row = mutant.header, rows.get(mutant.header.id)
            said = "not run" if row is None else f"yes, {row.seconds:.0f} s" if row.killed else "**no**"
            known = f" (met elsewhere: {header.field})" if header.field else ""
            must = ", ".join(header.must) or header.reason
            lines.append(
                f"| {header.id} | {header.layer} | {header.title}{known} | {header.trigger} | {must} | {said} |"
            )
        lines.append("")
    lines += ["## Codes and the bugs that only they catch", "", "| code | bugs |", "|---|---|"]
    owned = owners(list(rows.values()))
    for code in sorted(CHECKS):
        mine = ", ".join(owned.get(code, [])) or NOT_OWNED.get(code, "none yet")
        lines.append(f"| {code} {CHECKS[code].name} | {mine} |")
    lines.append("")
    survivors = [row for row in rows.values() if not row.killed]
    if survivors:
        lines += ["## Not killed in the stored run", ""]
        lines += [f"- {row.id}: {row.why}" for row in survivors]
        lines.append("")
    return "\n".join(lines)
