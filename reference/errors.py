"""Every exception of the service, and for each whether the command certainly did not happen.

    LedgerError
    ├── InvalidCommand            definite   the caller's fault: 400
    ├── NotAdmitted               definite   refused before anything was sent: 503, x-admitted: 0
    │   ├── QueueFull
    │   ├── DeadlineExceeded
    │   ├── ServerUnavailable     connection refused or never made
    │   └── ShardNotHere          the wallet's shard is being moved, or is on another server by now
    ├── NotPosted                 definite   the database rolled it back: 503, x-admitted: 0
    ├── settler.PaymentRefused    definite   the ledger refused an entry of a settlement: people have to look
    ├── settler.SettlementTaken   definite   another settler moved the settlement on
    └── UnknownOutcome            NOT definite   it may or may not have been posted: 504

A refusal (no funds, match closed) is an answer, not an exception: see `commands.Outcome`.
"""

from typing import ClassVar


class LedgerError(Exception):
    """Base of every error the service raises on purpose."""

    definite: ClassVar[bool] = True
    """True: the command certainly had no effect. False: it may have had its effect."""


class InvalidCommand(LedgerError):
    """The request is malformed; `field` names the part to correct."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class NotAdmitted(LedgerError):
    """The command was refused before anything of it left this process."""


class QueueFull(NotAdmitted):
    """The writer's bounded queue is full."""


class DeadlineExceeded(NotAdmitted):
    """The command's deadline passed while it was still in the queue."""


class ServerUnavailable(NotAdmitted):
    """No connection to the wallet's server could be made."""


class ShardNotHere(NotAdmitted):
    """The server asked does not hold the wallet's shard now: it is being moved, or was."""


class NotPosted(LedgerError):
    """The database answered with an error, so the transaction was certainly rolled back."""


class UnknownOutcome(LedgerError):
    """The connection broke or timed out after the command was sent: it may have been posted."""

    definite = False
