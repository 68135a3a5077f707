"""Renders the matrix of planted bugs as one page without a script."""

from collections.abc import Iterable
from html import escape
from typing import Final

from invariants.anomalies import CHECKS
from ledgerproof.mutants.document import NOT_OWNED
from ledgerproof.mutants.matrix import Matrix, owners
from ledgerproof.mutants.outcome import Row

_STYLE: Final = """
:root { color-scheme: light dark; --line: #d0d7de; --bad: #b42318; --good: #1a7f37; --soft: #656d76; --head: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --line: #30363d; --bad: #ff7b72; --good: #3fb950; --soft: #8b949e; --head: #161b22; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .5rem; text-align: left; vertical-align: top; }
th { background: var(--head); position: sticky; top: 0; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
.soft { color: var(--soft); } code { font-size: .85rem; white-space: nowrap; }
details summary { cursor: pointer; }
"""


def render(matrix: Matrix) -> str:
    """Return the page."""
    rows = sorted(matrix.rows, key=lambda row: row.id)
    service = [row for row in rows if row.layer != "harness" and not row.pair]
    harness = [row for row in rows if row.layer == "harness"]
    pairs = [row for row in rows if row.pair]
    machine = ", ".join(str(matrix.machine[name]) for name in ("cpu", "cores", "os") if name in matrix.machine)
    parts = [
        f"<h1>Planted bugs: {matrix.killed} of {len(rows)} killed</h1>",
        f'<p class="soft">Commit {escape(matrix.commit)}, {escape(matrix.made_at)}; {escape(machine)}</p>',
        "<p>Each row is a bug that was put into a copy of the program. Killed means that exactly the right codes"
        " fired, with a witness, and that the unchanged program was silent under the same trigger.</p>",
        _table("Bugs of the service", service),
        _table("Bugs of the harness", harness),
        _table("Pairs of safeguards, removed together", pairs),
        _owners(rows),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Planted bugs</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(title: str, rows: Iterable[Row]) -> str:
    rows = list(rows)
    killed = sum(row.killed for row in rows)
    lines = "\n".join(_line(row) for row in rows)
    return (
        f"<h2>{escape(title)}: {killed} of {len(rows)}</h2>\n"
        '<div class="wide"><table><thead><tr><th>bug</th><th>layer</th><th>killed</th><th>codes</th>'
        f"<th>seconds</th><th>control</th><th>witness</th></tr></thead><tbody>\n{lines}\n</tbody></table></div>"
    )


def _line(row: Row) -> str:
    mark = '<span class="yes">yes</span>' if row.killed else f'<span class="no">no</span><br>{escape(row.why)}'
    codes = ", ".join(f"<code>{escape(code)}</code>" for code in row.codes) or escape(row.verdict)
    alone = "".join(
        f'<br><span class="soft">hunks {", ".join(str(number) for number in half.hunks)} alone: '
        f"{escape(half.shown)}</span>"
        for half in row.alone
    )
    return (
        f"<tr><td><code>{escape(row.id)}</code><br>{escape(row.title)}"
        f'<br><span class="soft">trigger {escape(row.trigger)}, {escape(row.tier)}</span></td>'
        f"<td>{escape(row.layer)}</td><td>{mark}</td><td>{codes}</td>"
        f'<td class="n">{row.seconds:.1f}</td><td>{escape(row.control)}</td>'
        f"<td>{escape(row.witness)}{alone}</td></tr>"
    )


def _owners(rows: list[Row]) -> str:
    owned = owners(rows)
    lines = "\n".join(
        f"<tr><td><code>{code}</code> {escape(CHECKS[code].name if code in CHECKS else '')}</td><td>"
        + (", ".join(f"<code>{escape(name)}</code>" for name in names) or escape(NOT_OWNED.get(code, "none yet")))
        + "</td></tr>"
        for code, names in owned.items()
    )
    return (
        "<h2>Codes and the bugs that only they catch</h2>\n"
        f'<div class="wide"><table><thead><tr><th>code</th><th>bugs</th></tr></thead><tbody>\n{lines}\n'
        "</tbody></table></div>"
    )
