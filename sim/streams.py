"""Random streams, one per purpose, and the laws of times that are drawn from them.

Two models with the same seed draw the same numbers for the same purpose, whatever else they draw (common random
numbers): give each purpose a name and never let two purposes share a stream.
"""

import hashlib
import math
from typing import Any, Final, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

MIN_FIT_SAMPLES: Final = 200
"""Fewer samples have no body and no tail to tell apart."""
MIN_TAIL_SAMPLES: Final = 20
BODY_POINTS: Final = 201
"""Quantiles that an empirical body keeps: steps of half a percent."""
MAX_TAIL_SHAPE: Final = 0.45
"""A generalised Pareto tail of shape 0.5 or more has no variance, so that no mean of a run would settle."""


def stream(seed: int, replication: int, purpose: str) -> np.random.Generator:
    """Return the random stream of one purpose in one replication.

    The same three give the same numbers in every process and release; others are independent. Raises ValueError for
    a negative seed or replication.
    """
    if seed < 0 or replication < 0:
        raise ValueError("seed and replication must not be negative")
    # Python's own hash of a string differs from process to process.
    name = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(replication, name)))


class Deterministic(msgspec.Struct, frozen=True, tag_field="law", tag="deterministic"):
    """Always the same time."""

    mean_s: float

    def __post_init__(self) -> None:
        _positive(mean_s=self.mean_s)

    @property
    def scv(self) -> float:
        """Squared coefficient of variation: variance / mean²."""
        return 0.0

    def draw(self, _rng: np.random.Generator, n: int) -> NDArray[Any]:
        """Return n times in seconds."""
        return np.full(n, self.mean_s)


class Exponential(msgspec.Struct, frozen=True, tag_field="law", tag="exponential"):
    """Without memory: the gaps of Poisson arrivals."""

    mean_s: float

    def __post_init__(self) -> None:
        _positive(mean_s=self.mean_s)

    @property
    def scv(self) -> float:
        """Squared coefficient of variation: variance / mean²."""
        return 1.0

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[Any]:
        """Return n times in seconds. Another mean stretches the same draws."""
        return rng.standard_exponential(n) * self.mean_s


class Erlang(msgspec.Struct, frozen=True, tag_field="law", tag="erlang"):
    """The sum of `stages` exponential times: varies less than one of them."""

    mean_s: float
    stages: int

    def __post_init__(self) -> None:
        _positive(mean_s=self.mean_s, stages=self.stages)

    @property
    def scv(self) -> float:
        """Squared coefficient of variation: variance / mean²."""
        return 1 / self.stages

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[Any]:
        """Return n times in seconds. Another mean stretches the same draws."""
        return rng.standard_gamma(self.stages, n) * (self.mean_s / self.stages)


class Hyperexponential(msgspec.Struct, frozen=True, tag_field="law", tag="hyperexponential"):
    """One of two exponential times, chosen at random; both contribute equally to the mean ("balanced means").

    Source: Whitt, "Approximating a point process by a renewal process, I", Operations Research 30 (1982).
    """

    mean_s: float
    scv: float
    """Squared coefficient of variation, 1 or more."""

    def __post_init__(self) -> None:
        _positive(mean_s=self.mean_s)
        if not 1 <= self.scv < math.inf:
            raise ValueError(f"a hyperexponential time has an scv of 1 or more, not {self.scv}")

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[Any]:
        """Return n times in seconds. Another mean stretches the same draws."""
        first = (1 + math.sqrt((self.scv - 1) / (self.scv + 1))) / 2
        chosen = np.where(rng.random(n) < first, first, 1 - first)
        times: NDArray[Any] = rng.standard_exponential(n) * self.mean_s / (2 * chosen)
        return times


class Lognormal(msgspec.Struct, frozen=True, tag_field="law", tag="lognormal"):
    """The shape that service times of software usually have."""

    mean_s: float
    scv: float
    """Squared coefficient of variation, above 0."""

    def __post_init__(self) -> None:
        _positive(mean_s=self.mean_s, scv=self.scv)

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[Any]:
        """Return n times in seconds. Another mean stretches the same draws."""
        variance = math.log1p(self.scv)
        times: NDArray[Any] = np.exp(rng.standard_normal(n) * math.sqrt(variance) - variance / 2) * self.mean_s
        return times


class Empirical(msgspec.Struct, frozen=True, tag_field="law", tag="empirical"):
    """Measured times: their own quantiles up to a threshold, a fitted generalised Pareto law beyond it.

    The tail above a high threshold is nearly generalised Pareto, whatever the law. Source: Pickands, "Statistical
    inference using extreme order statistics", Annals of Statistics 3 (1975).
    """

    body_s: tuple[float, ...]
    """Quantiles of the times up to the threshold, at equal steps of probability; the last is the threshold."""
    tail_share: float
    """Share of times beyond the threshold."""
    tail_shape: float
    """ξ: 0 is an exponential tail, above 0 a heavier one; below 1/2, so that there is a variance."""
    tail_scale_s: float

    def __post_init__(self) -> None:
        ordered = all(a <= b for a, b in zip(self.body_s, self.body_s[1:], strict=False))
        if len(self.body_s) < 2 or not ordered or not self.body_s[0] >= 0:
            raise ValueError("the body needs two or more times of 0 or more, in ascending order")
        if not (0 <= self.tail_share < 1 and self.tail_shape < 0.5 and self.tail_scale_s >= 0):
            raise ValueError("the tail needs a share of 0 to 1, a shape below 0.5 and a scale of 0 or more")

    @classmethod
    def fitted(cls, samples_s: NDArray[Any], tail_share: float = 0.05) -> Self:
        """Return the law of measured times in seconds; the largest `tail_share` of them are the tail.

        The tail is fitted by maximum likelihood; a shape beyond MAX_TAIL_SHAPE is cut there. Raises ValueError for
        fewer than MIN_FIT_SAMPLES samples or a tail of fewer than MIN_TAIL_SAMPLES.
        """
        from scipy.stats import genpareto  # noqa: PLC0415 - slow to import, and only a fit needs it

        times = np.sort(np.asarray(samples_s, dtype=float))
        if len(times) < MIN_FIT_SAMPLES or len(times) * tail_share < MIN_TAIL_SAMPLES:
            raise ValueError(
                f"a law needs {MIN_FIT_SAMPLES} samples and {MIN_TAIL_SAMPLES} in its tail, "
                f"not {len(times)} and {len(times) * tail_share:.0f}"
            )
        if not (np.isfinite(times).all() and times[0] >= 0):
            raise ValueError("times must be finite and not negative")
        threshold = float(np.quantile(times, 1 - tail_share))
        excess = times[times > threshold] - threshold
        body = np.quantile(times[times <= threshold], np.linspace(0, 1, BODY_POINTS))
        body[-1] = threshold
        if len(excess) < MIN_TAIL_SAMPLES:
            # So many times equal the threshold that nothing lies beyond: measured with too coarse a clock.
            raise ValueError("the largest times are all the same: there is no tail to fit")
        shape, _, scale = genpareto.fit(excess, floc=0)
        if shape > MAX_TAIL_SHAPE:
            shape, _, scale = genpareto.fit(excess, f0=MAX_TAIL_SHAPE, floc=0)
        share = len(excess) / len(times)
        return cls(tuple(body.tolist()), share, float(shape), float(scale))

    @property
    def mean_s(self) -> float:
        """Mean in seconds, from body and tail."""
        return self._moment(1)

    @property
    def scv(self) -> float:
        """Squared coefficient of variation: variance / mean²."""
        return self._moment(2) / self._moment(1) ** 2 - 1

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[Any]:
        """Return n times in seconds, by the inverse of the distribution: one uniform number each."""
        uniform = rng.random(n)
        body_share = 1 - self.tail_share
        steps = np.linspace(0, body_share, len(self.body_s))
        times: NDArray[Any] = np.interp(uniform, steps, np.asarray(self.body_s))
        beyond = uniform > body_share
        # 1 − the probability within the tail, above 0 because a uniform number is below 1.
        rest = (1 - uniform[beyond]) / self.tail_share if self.tail_share else uniform[beyond]
        if self.tail_shape:
            excess = self.tail_scale_s * (rest**-self.tail_shape - 1) / self.tail_shape
        else:
            excess = -self.tail_scale_s * np.log(rest)
        times[beyond] = self.body_s[-1] + excess
        return times

    def _moment(self, power: int) -> float:
        """Return E[T] or E[T²]: the body is uniform between its quantiles, the tail has closed forms."""
        low, high = np.asarray(self.body_s[:-1]), np.asarray(self.body_s[1:])
        threshold, scale, shape = self.body_s[-1], self.tail_scale_s, self.tail_shape
        excess = scale / (1 - shape)
        if power == 1:
            body, tail = (low + high) / 2, threshold + excess
        else:
            body = (low**2 + low * high + high**2) / 3
            tail = threshold**2 + 2 * threshold * excess + 2 * scale**2 / ((1 - shape) * (1 - 2 * shape))
        return float((1 - self.tail_share) * body.mean() + self.tail_share * tail)


Law = Deterministic | Exponential | Erlang | Hyperexponential | Lognormal | Empirical
"""Every law has `mean_s`, `scv` and `draw(rng, n)`; the tag `law` names it in TOML and JSON."""


def law_of(mean_s: float, scv: float) -> Law:
    """Return a law by mean and scv: constant for 0, exponential for 1, lognormal otherwise. Raises ValueError."""
    if scv == 0:
        return Deterministic(mean_s)
    return Exponential(mean_s) if scv == 1 else Lognormal(mean_s, scv)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, not {value}")
