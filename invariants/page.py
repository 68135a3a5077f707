"""Writes docs/anomalies.md from the docstrings of the checks, so that the page and the checks cannot differ.

python -m invariants.page            prints the page
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, Final

from invariants import sometimes
from invariants.anomalies import CHECKS
from invariants.anomalies.common import Check
from invariants.verdict import DAMAGED_EVIDENCE

_HEAD: Final = """\
# What a run is checked for

This page is made by `python -m invariants.page` from the docstrings of the checks; a test compares the two. Every code
is one function (`invariants/anomalies/`), and its docstring is its specification. A witness names the key, the wallet
and the seq, or the match, bet, event, attempt or fault it is about; `ledgerproof explain RUN CODE` proves it.

A code that *rests on absence* says that something is not there. When the recording or the snapshot has holes
({holes}), such a finding may be one of them, and the run is INVALID instead of violated. *Needs* names what runs of
the first version do not hold; of such a run the code is judged in part only, and the verdict says so.
"""

_ANOMALIES: Final = "## Anomalies"
_VALIDITY: Final = """\
## Validity

These make a run INVALID: however clean it looks, it proves nothing."""
_SOMETIMES: Final = """\
## Sometimes

What a campaign must have shown at least once. `ledgerproof sometimes RUN…` adds up what several runs have shown; what a
single run must show by itself is in its `config.json` (`required_sometimes`), and V04 looks for it."""


def page() -> str:
    """Return the whole page, in Markdown."""
    anomalies = [_of_check(check) for code, check in CHECKS.items() if code.startswith("A")]
    validity = [_of_check(check) for code, check in CHECKS.items() if code.startswith("V")]
    shown = [f"- **{name}**: {_told(counter)}" for name, counter in sometimes.COUNTERS.items()]
    head = _HEAD.format(holes=", ".join(DAMAGED_EVIDENCE))
    parts = [head.rstrip(), _ANOMALIES, *anomalies, _VALIDITY, *validity, _SOMETIMES, "\n".join(shown)]
    return "\n\n".join(parts) + "\n"


def _of_check(check: Check) -> str:
    text = inspect.getdoc(check.find) or ""
    notes = ["Rests on absence."] if check.rests_on_absence else []
    if check.older:
        notes.append(f"Needs {', '.join(f'`{name}`' for name in check.older)}.")
    title, _, rest = text.partition(": ")
    body = rest[:1].upper() + rest[1:]
    return "\n\n".join([f"### {title}", body, *([" ".join(notes)] if notes else [])])


def _told(counter: Callable[..., Any]) -> str:
    text = inspect.getdoc(counter) or ""
    told = " ".join(text.split()).removeprefix("Count ")
    return told[:1].lower() + told[1:] if told else "?"


if __name__ == "__main__":
    sys.stdout.write(page())
