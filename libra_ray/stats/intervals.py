"""How sure a measured success rate is, and what a list of durations looks like."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided interval of a success rate, `0 <= low <= high <= 1`."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """What a list of durations or ages looks like; all None where there was no value."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    mean: float | None = None
    max: float | None = None


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Interval | None:
    """Wilson's score interval of `successes` out of `episodes`; None where there was no episode.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212; without
    continuity correction, as `scipy.stats.binomtest` computes it, whose import costs seconds.

    Raises:
        ValueError: `successes` does not lie in `[0, episodes]`.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"successes={successes} must lie in [0, episodes={episodes}]")
    if episodes == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = successes / episodes, 1 + z * z / episodes
    centre = (share + z * z / (2 * episodes)) / scale
    half = z / scale * sqrt(share * (1 - share) / episodes + z * z / (4 * episodes * episodes))
    # Exact where rounding would leave a trace.
    return Interval(
        low=0.0 if successes == 0 else centre - half,
        high=1.0 if successes == episodes else centre + half,
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """The percentiles of the values."""
    if len(values) == 0:
        return Percentiles()
    numbers = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = map(float, np.percentile(numbers, PERCENTILES))
    return Percentiles(p50=p50, p95=p95, p99=p99, mean=float(numbers.mean()), max=float(numbers.max()))
