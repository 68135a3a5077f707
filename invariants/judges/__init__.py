"""Several judges that share no folds decide the same codes from the same evidence, and must agree.

A judge is a function from a run to an `Opinion`: for every code it decides, the subjects (`invariants.subjects`)
of all violations it found. Two opinions agree on a code when these sets are equal; a disagreement says that one of
the judges is wrong, so the run proves nothing.

A judge of one's own: a module with `def judge(run: Run) -> Opinion` (`Opinion` from `invariants.judges.opinion`), and a
line in `_LIST`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from invariants.judges import duck, replay
from invariants.judges.opinion import Opinion
from invariants.run import Run
from invariants.subjects import MAX_SUBJECTS

__all__ = ["COLUMNS", "JUDGES", "Disagreement", "Judge", "Opinion", "disagreements"]

COLUMNS: Final = "columns"
"""The folds of `invariants.anomalies`. They also give counts and witnesses, so they always judge."""

SHOWN: Final = 3
"""Subjects that a sentence about a disagreement names on each side."""


@dataclass(frozen=True)
class Judge:
    """A named judge besides the columns."""

    name: str
    judge: Callable[[Run], Opinion]
    max_records: int | None = None
    """History records of a run beyond which this judge is not asked; None: it judges every run."""


_LIST: Final = (Judge(duck.NAME, duck.judge), Judge(replay.NAME, replay.judge, replay.MAX_RECORDS))

JUDGES: Final[dict[str, Judge]] = {judge.name: judge for judge in _LIST}
"""The judges besides the columns, by name."""


@dataclass(frozen=True)
class Disagreement:
    """Two judges that say different things of one code."""

    code: str
    judges: tuple[str, str]
    text: str


def disagreements(opinions: Mapping[str, Opinion], only: Collection[str] | None = None) -> list[Disagreement]:
    """Return every code, or those of `only`, on which a judge says something else than the first that decided it.

    `opinions` are by the names of the judges, in the order in which they are compared. A code that a judge does not
    decide, or could not, is left out here: the second of these is a defect of its own.
    """
    first: dict[str, tuple[str, frozenset[str]]] = {}
    found: list[Disagreement] = []
    for name, opinion in opinions.items():
        for code, subjects in opinion.found.items():
            if only is not None and code not in only:
                continue
            other, theirs = first.setdefault(code, (name, subjects))
            if theirs != subjects:
                found.append(Disagreement(code, (other, name), _sentence(code, (other, theirs), (name, subjects))))
    return sorted(found, key=lambda item: (item.code, item.judges))


def _sentence(code: str, left: tuple[str, frozenset[str]], right: tuple[str, frozenset[str]]) -> str:
    parts = [
        f"only {name} finds {_listed(mine - theirs)}"
        for (name, mine), (_, theirs) in ((left, right), (right, left))
        if mine - theirs
    ]
    return f"the judges {left[0]} and {right[0]} disagree on {code}: {'; '.join(parts)}"


def _listed(subjects: frozenset[str]) -> str:
    number = str(len(subjects)) if len(subjects) < MAX_SUBJECTS else f"at least {MAX_SUBJECTS}"
    shown = ", ".join(sorted(subjects)[:SHOWN])
    return f"{number} ({shown}{', …' if len(subjects) > SHOWN else ''})"
