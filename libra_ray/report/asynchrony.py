"""What happened between a policy's levels, over all its episodes: the records of `report.json`, and how they are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from libra_ray.common.json_text import ABSENT
from libra_ray.runs.results import EpisodeResult, LevelLatencies
from libra_ray.stats.intervals import Percentiles, percentiles, wilson

AGE_GROUPS = 4
"""Of about equally many episodes, where there are enough."""
EPISODES_PER_GROUP = 5
ALIKE_STEPS = 1.0
"""Episodes whose mean ages lie no further apart than this are of one age."""


@dataclass(frozen=True, kw_only=True)
class Replanning(Percentiles):
    """How far fresh intents of a level differed from those that they replaced, over the steps that both covered.

    The percentiles are of the mean absolute difference at each replacement, in classes or in the value's own unit.

    Attributes:
        value: its name in the intent.
        count: replacements.
        share: of the entries that differed; None of real numbers, which always do.
    """

    level: str
    value: str
    count: int
    share: float | None


@dataclass(frozen=True, kw_only=True)
class AgeGroup:
    """Episodes whose intents were of like age: `lowest` and `highest` mean age of an episode's actions, in control steps.

    Attributes:
        success: share of the episodes; `interval`: Wilson's.
    """

    lowest: float
    highest: float
    episodes: int
    successes: int
    success: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class MeanJerk:
    """Means over episodes of `ChunkJerk`, in action units a control step squared.

    Attributes:
        episodes: that have a chunk's boundary.
        ratio: of `boundary` to `within`; None, like `within`, where every step is a boundary or the inside has no jerk.
    """

    episodes: int
    boundary: float
    within: float | None
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class ReactionSteps(Percentiles):
    """Control steps from the goal's move to the first action that knew of it, of the `count` episodes that had one."""

    count: int


@dataclass(frozen=True, kw_only=True)
class Reactions:
    """How soon a moved goal was known; see `GoalReaction`.

    Attributes:
        moved: episodes in which the goal was moved before they ended.
        chunk: to the first action whose chunk was made from a picture of it; `intent`: whose intent was.
    """

    moved: int
    chunk: ReactionSteps
    intent: ReactionSteps


@dataclass(frozen=True, kw_only=True)
class DeadlineMisses:
    """Calls of a level that took longer than what their answers cover lasts: batched, on the machine that evaluated.

    Attributes:
        deadline_ms: how long that is, at the control rate.
        share: of the calls; None without one.
    """

    deadline_ms: float
    count: int
    share: float | None


@dataclass(frozen=True, kw_only=True)
class Asynchrony:
    """What happened between the levels of the policy that the report speaks of; what was not measured is empty or left out.

    Attributes:
        success_by_age: an association, no cause; empty where all episodes are of one age.
        deadline_misses: by level.
    """

    replans: Sequence[Replanning] = ()
    success_by_age: Sequence[AgeGroup] = ()
    jerk: MeanJerk | None = field(default=None, metadata=ABSENT)
    reaction: Reactions | None = field(default=None, metadata=ABSENT)
    deadline_misses: Mapping[str, DeadlineMisses] = field(default_factory=dict)


def measured_asynchrony(
    episodes: Sequence[EpisodeResult], latencies: Mapping[str, LevelLatencies], covered_ms: Mapping[str, float]
) -> Asynchrony | None:
    """The record of one policy's episodes; None where nothing was measured, as of runs of earlier versions.

    Args:
        covered_ms: level -> how long what one of its answers covers lasts.
    """
    found = Asynchrony(
        replans=_replans(episodes),
        success_by_age=success_by_age(episodes),
        jerk=_jerk(episodes),
        reaction=_reaction(episodes),
        deadline_misses={level: _misses(latencies[level].ms, ms) for level, ms in covered_ms.items() if level in latencies},
    )
    return None if found == Asynchrony(replans=[], success_by_age=[]) else found


def figures(found: Asynchrony | None) -> dict[str, float | None]:
    """The record's figures by names that a tracker takes."""
    if found is None:
        return {}
    named: dict[str, float | None] = {}
    for row in found.replans:
        stem = f"replan_{row.level}_{row.value}"
        named |= {f"{stem}_share": row.share, f"{stem}_difference_mean": row.mean, f"{stem}_difference_p95": row.p95}
    if found.jerk is not None:
        named |= {f"jerk_{name}": getattr(found.jerk, name) for name in ("boundary", "within", "ratio")}
    if found.reaction is not None:
        steps = {"chunk": found.reaction.chunk, "intent": found.reaction.intent}
        named |= {f"reaction_{name}_steps_{mark}": getattr(of, mark) for name, of in steps.items() for mark in ("p50", "p95")}
    return named | {f"deadline_misses_{level}": misses.share for level, misses in found.deadline_misses.items()}


def _replans(episodes: Sequence[EpisodeResult]) -> list[Replanning]:
    shares: dict[tuple[str, str], list[float]] = {}
    differences: dict[tuple[str, str], list[float]] = {}
    for episode in episodes:
        for found in () if episode.asynchrony is None else episode.asynchrony.replans:
            shares.setdefault((found.level, found.value), []).extend(found.shares)
            differences.setdefault((found.level, found.value), []).extend(found.differences)
    return [
        Replanning(
            **vars(percentiles(apart)),
            level=level,
            value=value,
            count=len(apart),
            share=float(np.mean(shares[level, value])) if shares[level, value] else None,
        )
        for (level, value), apart in differences.items()
    ]


def success_by_age(episodes: Sequence[EpisodeResult]) -> list[AgeGroup]:
    """Success by the mean age of the intents that an episode's actions were executed under, lowest ages first.

    Empty where there are too few episodes for two groups, or all of them are of one age.
    """
    known = [episode for episode in episodes if len(episode.intent_age_steps)]
    aged = sorted((float(np.mean(episode.intent_age_steps)), episode.succeeded) for episode in known)
    count = min(AGE_GROUPS, len(aged) // EPISODES_PER_GROUP)
    if count < 2 or aged[-1][0] - aged[0][0] < ALIKE_STEPS:
        return []
    ages = np.array([age for age, _ in aged])
    # Episodes of the same age are never torn apart.
    borders = np.unique(np.searchsorted(ages, ages[[len(aged) * i // count for i in range(count)]]))
    groups = [aged[first:end] for first, end in zip(borders, [*borders[1:], len(aged)], strict=True)]
    return [_group(group) for group in groups] if len(groups) > 1 else []


def _group(aged: Sequence[tuple[float, bool]]) -> AgeGroup:
    successes = sum(succeeded for _, succeeded in aged)
    interval = wilson(successes, len(aged))
    assert interval is not None, "a group has episodes"
    return AgeGroup(
        lowest=aged[0][0],
        highest=aged[-1][0],
        episodes=len(aged),
        successes=successes,
        success=successes / len(aged),
        interval=(interval.low, interval.high),
    )


def _jerk(episodes: Sequence[EpisodeResult]) -> MeanJerk | None:
    found = [episode.asynchrony.jerk for episode in episodes if episode.asynchrony is not None]
    both = [jerk for jerk in found if jerk is not None and jerk.boundary is not None]
    if not both:
        return None
    boundary = float(np.mean([jerk.boundary for jerk in both]))
    inside = [jerk.within for jerk in both if jerk.within is not None]
    within = float(np.mean(inside)) if inside else None
    return MeanJerk(episodes=len(both), boundary=boundary, within=within, ratio=boundary / within if within else None)


def _reaction(episodes: Sequence[EpisodeResult]) -> Reactions | None:
    found = [episode.asynchrony.reaction for episode in episodes if episode.asynchrony is not None]
    reactions = [reaction for reaction in found if reaction is not None]
    if not reactions:
        return None
    return Reactions(
        moved=len(reactions),
        chunk=_steps([reaction.chunk_steps for reaction in reactions]),
        intent=_steps([reaction.intent_steps for reaction in reactions]),
    )


def _steps(found: Sequence[int | None]) -> ReactionSteps:
    known = [steps for steps in found if steps is not None]
    return ReactionSteps(**vars(percentiles(known)), count=len(known))


def _misses(ms: Sequence[float], deadline_ms: float) -> DeadlineMisses:
    late = sum(took > deadline_ms for took in ms)
    return DeadlineMisses(deadline_ms=deadline_ms, count=late, share=late / len(ms) if len(ms) else None)
