"""A study's table: policies compared over training seeds and episodes, every figure with its 95 % bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libra_ray.report.interval_plot import Mark
from libra_ray.stats.granularity_peak import DRAWS, Outcomes, estimate, success_draws

EPISODES = "seeds × episodes"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was measured of one line.

    Attributes:
        label: what it is called.
        outcomes: per training seed, whether each episode succeeded, an array per task.
        errors_mm: per training seed, the final position error of every episode; empty where the tasks have none.
        facts: further columns, as they shall be shown.
    """

    label: str
    outcomes: Sequence[Outcomes]
    errors_mm: Sequence[NDArray[np.float64]] = ()
    facts: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Line:
    """A sample with its figures.

    Attributes:
        success: mean over tasks of the share of successful episodes.
        difference: of that, against the first line; None in the first.
        error_mm: median final position error over all episodes, failed ones included; None where there is none.
    """

    sample: Sample
    success: Mark
    difference: Mark | None
    error_mm: Mark | None


def summarise(samples: Sequence[Sample], draws: int = DRAWS) -> list[Line]:
    """The lines of a table; seeds are resampled first, then the episodes of each.

    Raises:
        ValueError: a sample has no seed (see `success_draws`).
    """
    lines: list[Line] = []
    reference: NDArray[np.float64] = np.zeros(0)
    for number, sample in enumerate(samples):
        # Independent draws: two lines share evaluation seeds, but not their policies.
        rng = np.random.default_rng([0, number])
        drawn = success_draws(sample.outcomes, rng, draws)
        seeds = [float(np.mean([task.mean() for task in tasks])) for tasks in sample.outcomes]
        success = _mark(sample.label, float(np.mean(seeds)), drawn, seeds)
        apart = _mark(sample.label, success.value - lines[0].success.value, drawn - reference) if lines else None
        error = _error_mark(sample, rng, draws) if sample.errors_mm else None
        lines.append(Line(sample=sample, success=success, difference=apart, error_mm=error))
        reference = reference if len(lines) > 1 else drawn
    return lines


def _mark(label: str, value: float, drawn: NDArray[np.float64], seeds: Sequence[float] = ()) -> Mark:
    found = estimate(value, drawn)
    return Mark(label=label, value=value, low=found.low, high=found.high, seeds=seeds)


def _error_mark(sample: Sample, rng: np.random.Generator, draws: int) -> Mark:
    errors = sample.errors_mm
    medians = np.empty(draws)
    for draw in range(draws):
        chosen = [errors[i] for i in rng.integers(len(errors), size=len(errors))]
        medians[draw] = np.median(np.concatenate([rng.choice(found, len(found)) for found in chosen]))
    return _mark(sample.label, float(np.median(np.concatenate(errors))), medians, [float(np.median(e)) for e in errors])


def markdown(lines: Sequence[Line], facts: Sequence[str] = ()) -> str:
    """The table; `facts` are the names of the samples' further columns. Errors are shown where any line has them."""
    with_errors = any(line.error_mm for line in lines)
    names = ["policy", "success", "against the first", *(["median final error, mm"] if with_errors else []), EPISODES, *facts]
    rows = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for line in lines:
        counts = sorted({sum(map(len, tasks)) for tasks in line.sample.outcomes})
        cells = [line.sample.label, _words(line.success, ".2f"), _words(line.difference, "+.2f")]
        cells += [_words(line.error_mm, ".1f")] if with_errors else []
        cells += [f"{len(line.sample.outcomes)} × {'/'.join(map(str, counts))}", *line.sample.facts]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def short(line: Line) -> str:
    """The line as success and error alone."""
    return f"| {line.sample.label} | {_words(line.success, '.2f')} | {_words(line.error_mm, '.1f')} |"


def _words(mark: Mark | None, form: str) -> str:
    return "–" if mark is None else f"{mark.value:{form}} ({mark.low:{form}} to {mark.high:{form}})"
