"""What a synthetic run is asked to be, and how it is cut into blocks that fit in memory.

A block is a set of wallets and matches that deal only with each other. All blocks play at the same time, so in the
finished files their rows lie between each other, as those of a real run do.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reference.routing import even_routing

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Texts = NDArray[np.bytes_]

MIN_ROWS: Final = 10_000
MAX_ROWS: Final = 100_000_000
BLOCK_ATTEMPTS: Final = 125_000
"""Attempts of one block; a block takes some hundred bytes of memory an attempt."""
PART_ROWS: Final = 50_000
"""History records of one part, about."""
ATTEMPTS_PER_S: Final = 2_000.0
MIN_LOAD_S: Final = 24.0
SEED_S: Final = 8.0
LOAD_FROM_S: Final = 10.0
REST_S: Final = 12.0
"""From the last arrival to the retries of unknown keys: every time-out has run out."""
FINAL_S: Final = 5.0
ORIGIN_UNIX_S: Final = 1_700_000_000.0
ROUNDS: Final = 6
"""Generations of matches that a block plays one after another."""
BETS_PER_MATCH: Final = 300
ATTEMPTS_PER_WALLET: Final = 40
POPULARITY: Final = 0.8
"""The wallet of rank r bets r^-0.8 as often as the first."""
SERVERS: Final = 4
COMMISSION_BPS: Final = 200
PARTITIONS: Final = 8
APIS: Final = 2
OUTCOMES: Final = ("HOME", "DRAW", "AWAY")
FAULT: Final = (0.45, 0.47)
"""The part of the load in which a server is down."""
LATENCY_MAX_S: Final = 0.035

_AS_PROVE_SENDS: Final = {
    "bet": 0.62,
    "deposit": 0.025,
    "withdraw": 0.025,
    "retry": 0.015,
    "race": 0.012,
    "other_body": 0.006,
    "beyond": 0.010,
    "late": 0.006,
    "rolled_back": 0.003,
    "entries": 0.012,
    "cancel": 0.040,
}
_SITE: Final = 0.4
"""What is left of each command's share when there are so many reads."""
MIXES: Final = {
    "prove": _AS_PROVE_SENDS,
    "site": {kind: share * _SITE for kind, share in _AS_PROVE_SENDS.items()} | {"entries": 0.1},
}
"""Attempts of each kind per attempt; what is left are reads of balances. `prove`: about what `prove` sends, a bet in
two of three attempts and a read in five. `site`: three reads for a bet, and per bet the same commands."""


@dataclass(frozen=True)
class Shape:
    """A synthetic run."""

    rows: int
    """Records of the history: two an attempt."""
    seed: int
    mix: str = "site"
    plant: str | None = None
    """Code of the one violation to plant; None: an honest run."""

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of each kind of attempt."""
        return MIXES[self.mix]

    @property
    def attempts(self) -> int:
        """Return the attempts of the whole run."""
        return self.rows // 2

    @property
    def blocks(self) -> int:
        """Return into how many blocks the run is cut."""
        return max(1, round(self.attempts / BLOCK_ATTEMPTS))

    @property
    def load_s(self) -> float:
        """Return how long the load takes."""
        return max(MIN_LOAD_S, self.attempts / ATTEMPTS_PER_S)

    @property
    def load_to_s(self) -> float:
        """Return when the load ends."""
        return LOAD_FROM_S + self.load_s

    @property
    def final_s(self) -> float:
        """Return when the first unknown key is sent again."""
        return self.load_to_s + REST_S

    @property
    def fault_s(self) -> tuple[float, float]:
        """Return from when to when a server is down."""
        return LOAD_FROM_S + FAULT[0] * self.load_s, LOAD_FROM_S + FAULT[1] * self.load_s

    def attempts_of(self, block: int) -> int:
        """Return the attempts of one block."""
        whole, left = divmod(self.attempts, self.blocks)
        return whole + (block < left)

    def generator(self, block: int) -> np.random.Generator:
        """Return the source of everything random in one block."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, block])))


ROUTING: Final = even_routing(SERVERS)
SERVER_NAMES: Final = tuple(f"pg{number}" for number in range(SERVERS))
_SERVER_OF_SHARD: Final = np.array([SERVER_NAMES[holder] for holder in ROUTING])
_HEX: Final = np.frombuffer("".join(f"{number:02x}" for number in range(256)).encode(), np.uint8).reshape(256, 2)
"""The two digits of every octet."""


def server_of_user(user: Ints) -> NDArray[Any]:
    """Return the names of the servers that hold these wallets."""
    return _SERVER_OF_SHARD[user % len(ROUTING)]


def server_of_match(low: NDArray[np.uint64]) -> NDArray[Any]:
    """Return the names of the home servers of matches, by the low 64 bits of their ids."""
    return _SERVER_OF_SHARD[(low % np.uint64(len(ROUTING))).astype(np.int64)]


def low_bits(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """Return the low 64 bits of `count` random UUIDs, the variant's two set."""
    bits = rng.integers(0, 2**62, size=count, dtype=np.uint64)
    return bits | np.uint64(1 << 63)


def uuids(rng: np.random.Generator, low: NDArray[np.uint64], at_s: Floats) -> Texts:
    """Return UUIDs of version 7 as text: the time in front, `low` behind, 12 random bits between."""
    milliseconds = ((ORIGIN_UNIX_S + at_s) * 1000).astype(np.uint64)
    high = (milliseconds << np.uint64(16)) | np.uint64(0x7000) | rng.integers(0, 2**12, size=len(low), dtype=np.uint64)
    octets = np.stack([high, low], axis=1).astype(">u8").view(np.uint8).reshape(len(low), 16)
    digits = _HEX[octets].reshape(len(low), 32)
    text = np.full((len(low), 36), ord("-"), dtype=np.uint8)
    for start, stop, to in ((0, 8, 0), (8, 12, 9), (12, 16, 14), (16, 20, 19), (20, 32, 24)):
        text[:, to : to + stop - start] = digits[:, start:stop]
    return np.ascontiguousarray(text).view("S36").reshape(len(low))


def hashes(rng: np.random.Generator, count: int) -> Texts:
    """Return `count` random hashes of payloads: 16 hexadecimal digits each."""
    octets = rng.integers(0, 256, size=(count, 8), dtype=np.uint8)
    return np.ascontiguousarray(_HEX[octets].reshape(count, 16)).view("S16").reshape(count)
