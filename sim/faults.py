"""What may happen to a part of the service while the model runs."""

from typing import Literal

import msgspec

Kind = Literal["kill", "pause"]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the service is not there for a time. Raises ValueError if a value is out of range."""

    kind: Kind
    """kill: what waits there fails; pause: it waits."""
    target: str
    """`pg0`, `kafka`, `redis`, `relay`, `matcher` or `projector`."""
    at_s: float
    lasts_s: float

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.at_s < 0 or self.lasts_s < 0:
            raise ValueError("at_s and lasts_s must not be negative")
