"""The words and number forms of the page: what each code, verdict and phase means to a newcomer.

Thousands are set apart by a narrow no-break space, a number and its unit by a no-break space, so neither
ever breaks over two lines.
"""

import math
import re
from dataclasses import dataclass

THIN = "\u202f"
NBSP = "\u00a0"
NONE = "–"
"""What stands in a table for a value that the run did not record."""


@dataclass(frozen=True)
class VerdictWords:
    """How one verdict is shown and explained."""

    title: str
    tone: str
    meaning: str
    next_steps: tuple[str, ...]


VERDICTS: dict[str, VerdictWords] = {
    "PASS": VerdictWords(
        "PASS",
        "good",
        "Every acknowledged command is in the ledger exactly once, every unknown outcome was resolved, every "
        "fault was measured, and no rule that was checked is broken.",
        (
            "Nothing needs doing. The same command with another seed explores other interleavings.",
            "What this run did not check or did not see is listed under Anomalies and Sometimes.",
        ),
    ),
    "SLA_MISSED": VerdictWords(
        "SLA MISSED",
        "warn",
        "The ledger is correct, but the service was slower or less available than its targets.",
        (
            "Read the rows marked missed under Service levels, then find the same seconds in the latency and "
            "availability figures: a shaded fault explains a peak, an unshaded peak is the service itself.",
            "Look at Load generator first: if it was late, the machine was too small, not the service slow.",
        ),
    ),
    "INVARIANT_VIOLATED": VerdictWords(
        "INVARIANT VIOLATED",
        "bad",
        "The ledger broke at least one of its rules. Each witness names the key, the wallet and the row.",
        (
            "Take the first witness: its key is in history/ (what the client did and was told) and in "
            "snapshot-1/ (what the ledger holds).",
            "Compare the time of its attempt with the faults: most such bugs need a crash between two steps.",
            "Run it again with the same seed before changing anything; keep this folder as evidence.",
        ),
    ),
    "INVALID": VerdictWords(
        "INVALID",
        "doubt",
        "Nothing is proven. The run does not meet the conditions under which its checks mean anything.",
        (
            "The reasons say which condition failed; no number below should be quoted.",
            "If the load generator or the service was saturated, lower the rate or use a larger machine.",
            "If a fault was not measured or outcomes stayed unresolved, the logs of that node say why.",
        ),
    ),
    "ABORTED": VerdictWords(
        "ABORTED",
        "doubt",
        "A stop condition ended the run before the ledger could be judged.",
        ("Remove the cause named in the reasons and run it again.",),
    ),
    "RESIDUE": VerdictWords(
        "RESIDUE",
        "bad",
        "The run left processes or data behind on the machine.",
        (
            "ledgerproof down stops what it can prove to be its own; then look at what remains below.",
            "The other sections of this page are valid; only the cleaning up failed.",
        ),
    ),
}

LIMIT_MISSED_STEPS = (
    "The limits that were not kept stand under Load, each with its measured value and interval.",
    "In the heat map, a few dark columns that reach up are moments at which the service stood still; a whole band that "
    "rises is a service at its capacity: lower the rate, or search for it with ledgerproof load knee.",
    "See how late the generator was: its lag is part of every latency.",
)
"""What to do next after a load that missed a limit of its profile."""

NO_VERDICT = VerdictWords(
    "NO VERDICT",
    "doubt",
    "The run recorded no verdict, so nothing is proven.",
    ("Look for the last lines of the run’s own output and for logs/, then run it again.",),
)

CODES: dict[str, tuple[str, str]] = {
    "A01": ("lost", "an acknowledged key has no entry"),
    "A02": ("duplicate", "more than one effect for a key, or for one bet, kind and version"),
    "A03": ("phantom", "an entry nobody attempted, or with another wallet or amount than the attempt"),
    "A04": ("failed but applied", "answered as certainly not done, and yet an entry exists"),
    "A05": ("replay diverges", "two answers for one key differ, or a key was applied with another body"),
    "A06": ("overdraft", "the replay says the funds were not there at that row"),
    "A07": ("negative", "a balance below zero at some prefix of a wallet"),
    "A08": ("wrong refusal", "at no moment of the attempt would the model have refused as well"),
    "A09": ("broken chain", "a balance is not the previous balance plus the amount"),
    "A10": ("sequence", "a gap, repeat or step back in a wallet’s seq"),
    "A11": ("projection", "the projection differs from the ledger at its own seq, is missing or is ahead"),
    "A12": ("money", "not conserved: users, house and escrow against the outside"),
    "A13": ("torn", "a bet without its stake, a stake without its bet, a fill with one leg"),
    "A14": ("real-time order", "acknowledged before another began on the same wallet, but a later seq"),
    "A15": ("session", "a later read in a session shows a smaller seq"),
    "A16": ("own writes", "a read with min_seq returned less and did not say so"),
    "A17": ("too stale", "older than the bound and not flagged"),
    "A18": ("dishonest flag", "flagged fresh while behind, or the source is wrong"),
    "A19": ("impossible read", "a balance the wallet never had at that seq"),
    "A20": ("fractured", "two reads order two commits oppositely, or half a transaction was seen"),
    "A21": ("event lost", "an entry without outbox row, or an outbox row without Kafka record"),
    "A22": ("effect repeated", "the effect of one event happened twice in a consumer"),
    "A23": ("event order", "a wallet’s seq does not rise in its partition, or a key is in two partitions"),
    "A24": ("phantom event", "an event without a committed entry, or earlier than its commit"),
    "A25": ("event differs", "the payload of an event is not the row"),
    "A26": ("skipped", "an offset passed an event that was neither applied nor set aside"),
    "A27": ("paid twice", "more than one payout or refund for a bet and version"),
    "A28": ("paid wrong", "a winner unpaid, a loser paid, or an amount off by a cent"),
    "A29": ("illegal transition", "of a bet or a match, or a bet accepted after close"),
    "A30": ("escrow leak", "the escrow of a settled or void match is not zero"),
    "A31": ("wrong shard", "a wallet’s rows on two servers, or not on its own"),
    "A32": ("zombie write", "committed by a deposed primary or a retired writer"),
    "A33": ("rewritten", "an entry was changed or deleted, or a prefix changed between two snapshots"),
    "A34": ("no recovery", "after the heal, errors, backlog or lag stayed over their bound"),
    "A35": ("blind reconciliation", "planted drift that the service’s own audit did not report"),
    "V01": ("vacuous: no success", "an operation never succeeded, so nothing about it is shown"),
    "V02": ("vacuous: no doubt", "faults, but not one unknown outcome to resolve"),
    "V03": ("vacuous: no fault", "a fault whose effect was not measured"),
    "V04": ("vacuous: sometimes", "a listed situation that never came up"),
    "V05": ("vacuous: final reads", "the final reads are not complete"),
    "V06": ("vacuous: recording", "a gap or a step back of the clock in the recording"),
}

PHASES: dict[str, str] = {
    "seed": "wallets are filled",
    "before": "load, nothing broken yet",
    "fault": "load while faults are injected and healed",
    "recovery": "load while the service catches up",
    "after": "load, everything healed",
    "drain": "load stopped, outbox and queues run empty",
    "resolve": "unknown outcomes are looked up and half of them retried",
    "check": "the checker reads the snapshots",
}

OPERATIONS: dict[str, str] = {
    "bet": "Bets",
    "deposit": "Deposits",
    "withdraw": "Withdrawals",
    "cancel": "Cancellations",
    "rollback": "Rollbacks",
    "balance": "Balance reads",
    "entries": "History reads",
    "create_match": "Create match",
    "close_match": "Close match",
    "settle_match": "Settle match",
    "resettle_match": "Settle match again",
    "void_match": "Void match",
}

LOAD_OPERATIONS: dict[str, str] = {
    "bet": "Bets",
    "grpc_bet": "Bets over gRPC",
    "deposit": "Deposits",
    "withdraw": "Withdrawals",
    "cancel": "Cancellations",
    "balance": "Balance reads",
    "strong_balance": "Strong balance reads",
    "entries": "History reads",
    "close": "Close match",
    "settle": "Settle match",
    "all": "All operations",
}
"""What a load calls its operations, in the order of the tables."""


def integer(value: float | None) -> str:
    """Return a whole number with its thousands set apart."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{round(value):,}".replace(",", THIN).replace("-", "−")


def number(value: float | str | None, decimals: int | None = None) -> str:
    """Return a number with about four significant figures, or with exactly `decimals`."""
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return NONE
    if decimals is None:
        if float(value).is_integer() or abs(value) >= 1000:
            return integer(value)
        # 99.986 % and 0.0042 need their digits, 183.4 does not need six.
        whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
        decimals = min(6, 3 if whole == 2 and abs(value) > 99 else max(1, 4 - whole))
        text = f"{value:,.{decimals}f}".rstrip("0").rstrip(".")
    else:
        text = f"{value:,.{decimals}f}"
    return text.replace(",", THIN).replace("-", "−")


def quantity(value: float | str | None, unit: str | None) -> str:
    """Return a number and its unit, kept on one line. A string is taken to carry its own unit."""
    if value is None or isinstance(value, str) or not unit:
        return number(value)
    return f"{number(value)}{'' if unit.startswith('/') else NBSP}{unit}"


_BOUND = re.compile(r"\s*(>=|<=|<|>|=)?\s*(-?\d+(?:\.\d+)?)\s*")
_SIGNS = {">=": "≥", "<=": "≤"}


def bound(value: float | str | None, unit: str | None) -> str:
    """Return a target such as ">= 99.99" with its sign and unit written out; other words stay as they are."""
    match = _BOUND.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return quantity(value, unit)
    sign = match[1] or ""
    return f"{_SIGNS.get(sign, sign)}{NBSP if sign else ''}{quantity(float(match[2]), unit)}"


def seconds(value: float | None, decimals: int = 2) -> str:
    """Return a time or duration in seconds."""
    return NONE if value is None or not math.isfinite(value) else f"{number(value, decimals)}{NBSP}s"


def size(value_bytes: float) -> str:
    """Return a size in bytes, kB, MB or GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value_bytes) < 1000 or unit == "GB":
            return f"{number(value_bytes, 0 if unit == 'B' else 1)}{NBSP}{unit}"
        value_bytes /= 1000
    raise AssertionError("the loop above always returns at GB")


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: 1 fault, 2 faults."""
    return f"{integer(count)}{NBSP}{one if count == 1 else many or one + 's'}"


def sentence(name: str) -> str:
    """Return an identifier as words: `stale_read_flagged` is "stale read flagged"."""
    return name.replace("_", " ").replace("-", " ").strip()


def load_operation(op: str) -> str:
    """Return the name of an operation of a load."""
    return LOAD_OPERATIONS.get(op, sentence(op))
