"""What one judge says of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Opinion:
    """What one judge says of a run."""

    found: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Code → the subjects of its violations, empty where it is kept; without the codes this judge does not decide."""
    undecided: Mapping[str, str] = field(default_factory=dict)
    """Code → why this judge, which decides it, could not. Not empty: the run is INVALID."""
