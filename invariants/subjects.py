"""What a violation is about, as one short text: the common language in which judges compare their findings.

A subject names a place in the evidence (`user 7 seq 3`), so that judges that share no code can say the same. Each
code has a grain: the columns that name its places. Where several are listed, the first whose columns a finding has.
"""

import heapq
from collections.abc import Iterable, Mapping
from typing import Any, Final

import polars as pl

MAX_SUBJECTS: Final = 10_000
"""Subjects compared per code. Of more, the first in the order of their text: the same for every judge."""

WHOLE_RUN: Final = "the run"
"""The subject of a finding that has no place: it is only compared whether there is one."""

_ENTRY: Final = ("user", "seq")
_KEY: Final = ("user", "key")
_ATTEMPT: Final = ("attempt",)
_EVENT: Final = ("event_id",)
_BET: Final = ("bet_id",)
_FILL: Final = ("match_id", "fill_no")
_MATCH: Final = ("match_id",)
_RULING: Final = ("match_id", "settlement_version")
_PAYMENT: Final = ("bet_id", "type", "contra", "settlement_version")

GRAINS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "A01": (_KEY,),
    "A02": (("bet_id", "contra", "settlement_version"), _KEY, _RULING),
    "A03": (_ENTRY, _RULING),
    "A04": (_KEY,),
    "A05": (_KEY,),
    "A06": (_ENTRY,),
    "A07": (_ENTRY,),
    "A08": (_ATTEMPT,),
    "A09": (_ENTRY,),
    "A10": (_ENTRY,),
    "A11": (("user",),),
    "A12": (_MATCH,),
    "A13": (_BET,),
    "A14": (_ENTRY,),
    "A15": (_ATTEMPT,),
    "A16": (_ATTEMPT,),
    "A17": (_ATTEMPT,),
    "A18": (_ATTEMPT,),
    "A19": (_ATTEMPT,),
    "A20": (_ATTEMPT,),
    "A21": (_EVENT, _ENTRY),
    "A22": (_EVENT, _BET, ("back_bet_id", "lay_bet_id"), _FILL),
    "A23": (("topic", "partition", "offset"), ("topic", "record_key")),
    "A24": (_EVENT, _ENTRY),
    "A25": (_EVENT,),
    "A26": (_EVENT, ("user",)),
    "A27": (_PAYMENT,),
    "A28": (_PAYMENT, _FILL, _BET),
    "A29": (_FILL, _BET, _MATCH),
    "A30": (_MATCH,),
    "A31": (("user",), _MATCH, ("shard",)),
    "A32": (("server", "user", "seq"), ("node", "term")),
    "A33": (_ENTRY,),
    "A34": (("fault_id", "name", "node"), ("fault_id",)),
    "A35": (("node", "user"),),
    "V01": (),
    "V02": (),
    "V03": (("fault_id",), ("node", "user")),
    "V04": (),
    "V05": (),
    "V06": (),
}
"""Code → its grains. A code that is not here, or a finding without the columns, has the subject `WHOLE_RUN`."""


def grain_of(code: str, columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that name the places of a finding with these columns; empty for the whole run."""
    there = set(columns)
    return next((grain for grain in GRAINS.get(code, ()) if there.issuperset(grain)), ())


def subject_of(code: str, row: Mapping[str, Any]) -> str:
    """Return the subject of one finding of `code`, whose named values are `row`."""
    grain = grain_of(code, row)
    return " ".join(f"{name} {'none' if row[name] is None else row[name]}" for name in grain) or WHOLE_RUN


def kept(subjects: Iterable[str]) -> frozenset[str]:
    """Return the distinct subjects that are compared: all, or the first `MAX_SUBJECTS` in the order of text."""
    distinct = set(subjects)
    return frozenset(distinct if len(distinct) <= MAX_SUBJECTS else heapq.nsmallest(MAX_SUBJECTS, distinct))


def subjects_of(code: str, rows: pl.DataFrame) -> frozenset[str]:
    """Return the compared subjects of the findings of `code`, one per row."""
    grain = grain_of(code, rows.columns)
    if rows.is_empty() or not grain:
        return frozenset() if rows.is_empty() else frozenset({WHOLE_RUN})
    parts = [part for name in grain for part in (pl.lit(name), pl.col(name).cast(pl.String).fill_null("none"))]
    text = rows.select(pl.concat_str(parts, separator=" ").alias("subject"))["subject"].unique()
    # Polars and Python order text alike: by code point, which is the order of the bytes of UTF-8.
    return frozenset(text.sort().head(MAX_SUBJECTS).to_list())
