"""Where success peaks over the granularity N, and how sure that is: a hierarchical bootstrap over seeds and episodes.

The peak is the best of the measured N, without a fitted curve: a parabola through a flat line has a peak too. Whether there is
an inverted U is asked separately, by two contrasts chosen before looking: a reference N against the smallest and the largest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Outcomes = Sequence[NDArray[np.bool_]]
"""Whether each episode succeeded, an array per task."""

DRAWS = 4000
PUBLISHED_N = 10
"""The paper's Libra point, which the contrasts refer to where it was measured."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its two-sided 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The estimated peak of success over N.

    Attributes:
        n: the N of the highest mean success; its interval holds 95 % of the bootstrap's peaks.
        shares: N -> share of the resamples in which it is the peak.
        reference: the N that the contrasts refer to.
        rise: success at the reference minus success at the smallest N; `fall`: minus success at the largest.
        inverted_u: whether both contrasts are surely positive, at 95 %.
    """

    n: Estimate
    shares: Mapping[int, float]
    reference: int
    rise: Estimate
    fall: Estimate
    inverted_u: bool


def success_draws(seeds: Sequence[Outcomes], rng: np.random.Generator, draws: int = DRAWS) -> NDArray[np.float64]:
    """Bootstrap distribution `(draws,)` of the mean success: seeds are drawn with replacement, then episodes in each.

    Success is the mean over tasks of the share of successful episodes. With one seed only the episodes vary; with few, the
    resampled seeds vary less than new ones would, which the second level makes up for in part.

    Raises:
        ValueError: there is no seed, or seeds differ in the number of their tasks.
    """
    if not seeds or len({len(tasks) for tasks in seeds}) != 1 or not len(seeds[0]):
        raise ValueError(f"seeds with {[len(tasks) for tasks in seeds]} tasks; there must be one, and all of as many tasks")
    counts = np.array([[len(task) for task in tasks] for tasks in seeds])
    rates = np.array([[np.mean(task) for task in tasks] for tasks in seeds])
    drawn = rng.integers(len(seeds), size=(draws, len(seeds)))
    successes = rng.binomial(counts[drawn], rates[drawn])
    means: NDArray[np.float64] = (successes / counts[drawn]).mean(axis=(1, 2))
    return means


def paired_difference(seeds: Sequence[tuple[Outcomes, Outcomes]], seed: int = 0, draws: int = DRAWS) -> Estimate:
    """How much more often the first of two controllers succeeds, who met the same episodes; drawn as in `success_draws`.

    Args:
        seeds: per seed, the outcomes of both, all of equal shape.
        seed: of the bootstrap.
        draws: resamples.

    Raises:
        ValueError: there is no seed, or the outcomes differ in shape.
    """
    shapes = {tuple(len(task) for task in outcomes) for pair in seeds for outcomes in pair}
    if len(shapes) != 1 or len(set(*shapes)) != 1:
        raise ValueError(f"outcomes of shapes {sorted(shapes)}; pairs need one, with equally many episodes of every task")
    pairs = np.array([np.subtract(first, second, dtype=float) for first, second in seeds])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(pairs), size=(draws, len(pairs), 1, 1))
    episodes = rng.integers(pairs.shape[2], size=(draws, *pairs.shape))
    return estimate(float(pairs.mean()), pairs[drawn, np.arange(pairs.shape[1])[:, None], episodes].mean(axis=(1, 2, 3)))


def estimate_peak(cells: Mapping[int, Sequence[Outcomes]], seed: int = 0, draws: int = DRAWS) -> Peak:
    """The peak over N.

    Args:
        cells: N -> per seed, the outcomes per task.
        seed: of the bootstrap.
        draws: resamples.

    Raises:
        ValueError: fewer than three N, which no peak can lie between.
    """
    if len(cells) < 3:
        raise ValueError(f"{len(cells)} values of N ({', '.join(map(str, cells))}); a peak needs at least three")
    rng = np.random.default_rng(seed)
    ordered = sorted(cells)
    resampled = np.stack([success_draws(cells[n], rng, draws) for n in ordered])
    observed = np.array([np.mean([np.mean([task.mean() for task in tasks]) for tasks in cells[n]]) for n in ordered])
    wins = resampled == resampled.max(axis=0)
    weights = wins / wins.sum(axis=0)
    logs = np.log(ordered)
    # Of several equally good N the geometric middle: the peak of a plateau is in its middle, not at its first N.
    peaks = np.exp(logs @ weights).round(6)
    best = observed == observed.max()
    middle = round(float(np.exp(logs[best].mean())), 6)
    reference = PUBLISHED_N if PUBLISHED_N in ordered[1:-1] else ordered[len(ordered) // 2]
    at = ordered.index(reference)
    rise = estimate(float(observed[at] - observed[0]), resampled[at] - resampled[0])
    fall = estimate(float(observed[at] - observed[-1]), resampled[at] - resampled[-1])
    return Peak(
        n=estimate(middle, peaks),
        shares={n: float(share) for n, share in zip(ordered, weights.mean(axis=1), strict=True)},
        reference=reference,
        rise=rise,
        fall=fall,
        inverted_u=rise.above_zero and fall.above_zero,
    )


def estimate(value: float, draws: NDArray[np.float64]) -> Estimate:
    """A value with the interval of its bootstrap draws."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=value, low=float(low), high=float(high))
