"""Every exception of the service, and for each whether the command certainly did not happen.

    LedgerError
    ├── InvalidCommand            definite   the caller's fault: 400
    ├── Unauthenticated           definite   no valid token: 401
    ├── Forbidden                 definite   the token does not allow it: 403
    ├── RateLimited               definite   too many requests of one user: 429, Retry-After
    ├── NotAdmitted               definite   refused before anything was sent: 503, x-admitted: 0
    │   ├── QueueFull
    │   ├── DeadlineExceeded
    │   ├── Draining
    │   ├── ServerUnavailable     connection refused or never made
    │   └── ShardNotHere          the wallet's shard is being moved, or is on another server by now
    ├── NotPosted                 definite   the database rolled it back: 503, x-admitted: 0
    ├── PayoutsPaused             definite   the payouts of this server wait until an operator resumes them
    ├── shards.MoveRefused        definite   the shard was not moved; it is where it was
    ├── shards.MoveUnfinished     definite   the move stopped half way; the command is to be repeated
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


class Unauthenticated(LedgerError):
    """The request has no token, or one that is not valid here and now."""


class Forbidden(LedgerError):
    """The token is valid and does not allow this; `scope` names one that would."""

    def __init__(self, reason: str, scope: str) -> None:
        super().__init__(reason)
        self.scope = scope


class RateLimited(LedgerError):
    """The user has sent too many requests; the next one may come after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"too many requests of this user; try again after {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class NotAdmitted(LedgerError):
    """The command was refused before anything of it left this process."""


class QueueFull(NotAdmitted):
    """The writer's bounded queue is full."""


class DeadlineExceeded(NotAdmitted):
    """The command's deadline passed while it was still in the queue."""


class Draining(NotAdmitted):
    """The process is stopping and takes nothing new."""


class ServerUnavailable(NotAdmitted):
    """No connection to the wallet's server could be made."""


class ShardNotHere(NotAdmitted):
    """The server asked does not hold the wallet's shard now: it is being moved, or was."""


class NotPosted(LedgerError):
    """The database answered with an error, so the transaction was certainly rolled back."""


class PayoutsPaused(LedgerError):
    """Payouts of the server are paused. Nothing is wrong with the entries: they are posted once it is resumed."""


class UnknownOutcome(LedgerError):
    """The connection broke or timed out after the command was sent: it may have been posted."""

    definite = False
