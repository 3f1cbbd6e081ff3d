"""The granularity study in words and tables: what docs/granularity.md is written from."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from libra_ray.report.sweep.plots import BINS
from libra_ray.report.sweep.records import ConfigurationRow, CurveRow
from libra_ray.report.sweep.report import peak_words, signed
from libra_ray.runs.trials import PLAN_RESOLVED, VARIANCE_EXPLAINED
from libra_ray.stats.granularity_peak import Estimate, Peak

MEASURES = {
    "val_token_entropy": "token entropy",
    "val_token_entropy_task": "given the instruction",
    "val_loss_plan": "planner CE",
    "val_plan_accuracy": "accuracy",
    PLAN_RESOLVED: "entropy resolved",
    "val_residual_share": "variance left",
    "val_explained_truth": "of it explained",
    VARIANCE_EXPLAINED: "variance explained",
    "grad_norm_loss_plan": "gradient, planner",
    "grad_norm_loss_diff": "gradient, refiner",
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One encoder under one controller."""

    configurations: Sequence[ConfigurationRow]
    curve: CurveRow | None


def by_bins(side: Side) -> dict[int, ConfigurationRow]:
    """The configurations that finished, by N."""
    rows = {int(row.values[BINS]): row for row in side.configurations if row.success is not None}
    return dict(sorted(rows.items()))


def curve_table(policy: Side, coarse: Side, gain: Mapping[int, Estimate]) -> str:
    """Success per N with its interval, the refined policy beside the planner alone, and what the refiner adds."""
    lines = ["| N | success | coarse only | the refiner adds | seeds | ms per step |", "|---|---|---|---|---|---|"]
    planner = by_bins(coarse)
    for n, row in by_bins(policy).items():
        alone, added = _cell(planner[n]) if n in planner else "–", signed(gain[n]) if n in gain else "–"
        lines.append(f"| {n} | **{_cell(row)}** | {alone} | {added} | {len(row.seeds)} | {row.latency_ms:.2f} |")
    return "\n".join(lines)


def _cell(row: ConfigurationRow) -> str:
    assert row.interval is not None, "it finished"
    low, high = row.interval
    return f"{row.success:.2f} ({low:.2f}–{high:.2f})"


def difficulty_table(policy: Side) -> str:
    """What was hard for whom: entropies and cross-entropy in nats per token, shares of variance, norms of the gradients."""
    rows = by_bins(policy)
    known = [name for name in MEASURES if any(name in row.measures for row in rows.values())]
    lines = [f"| N | {' | '.join(MEASURES[name] for name in known)} |", "|---" * (len(known) + 1) + "|"]
    for n, row in rows.items():
        values = [row.measures.get(name) for name in known]
        lines.append(f"| {n} | {' | '.join('–' if value is None else f'{value:.3g}' for value in values)} |")
    return "\n".join(lines)


def reading(policy: Side) -> list[str]:
    """The sentences that follow from the numbers alone."""
    if policy.curve is None or policy.curve.peak is None:
        return ["Fewer than three N have finished: there is no curve yet."]
    peak = policy.curve.peak
    likely = sorted(peak.shares, key=lambda n: -peak.shares[n])[:3]
    words = ", ".join(f"N = {n} in {peak.shares[n]:.0%}" for n in likely)
    sentences = ["The " + peak_words(peak) + ".", f"Of the bootstrap's resamples the highest success is at {words}."]
    rows = by_bins(policy)
    ends = [
        (n, resolved, explained)
        for n, row in rows.items()
        if (resolved := row.measures.get(PLAN_RESOLVED)) is not None
        and (explained := row.measures.get(VARIANCE_EXPLAINED)) is not None
    ]
    if len(ends) > 1:
        bins, planner, refiner = zip(*ends, strict=True)
        sentences.append(_crossing_words(crossings(bins, planner, refiner), peak))
    return sentences


def crossings(bins: Sequence[int], planner: Sequence[float], refiner: Sequence[float]) -> list[float]:
    """The N at which two curves cross, linear in log N between the measured ones."""
    found = []
    gaps = np.subtract(planner, refiner)
    for (n, gap), (following, next_gap) in itertools.pairwise(zip(np.log(bins), gaps, strict=True)):
        if gap == 0 or gap * next_gap < 0:
            found.append(float(np.exp(n + (following - n) * (abs(gap) / (abs(gap) + abs(next_gap)) if gap else 0))))
    if gaps[-1] == 0:
        found.append(float(bins[-1]))
    return found


def _crossing_words(found: Sequence[float], peak: Peak) -> str:
    what = "The share of the tokens' entropy that the planner resolves and the share of the variance that the refiner explains"
    if not found:
        return f"{what} do not cross at any N: by this measure the two systems' difficulties are never equal."
    low, high = peak.n.low, peak.n.high
    inside = [n for n in found if low <= n <= high]
    place = "inside" if inside else "outside"
    where = " and ".join(f"N = {n:.3g}" for n in found)
    return f"{what} cross at {where}, {place} the peak's interval ({low:.3g} to {high:.3g})."
