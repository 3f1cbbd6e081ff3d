"""What an episode's executed actions tell of its levels: jerk where chunks meet, how soon a moved goal was known, and more."""

from collections.abc import Iterable, Sequence

import numpy as np

from libra_ray.control.disagreement import Replan
from libra_ray.runs.results import ChunkJerk, EpisodeAsynchrony, EpisodeReplans, GoalReaction
from libra_ray.types import Action, Episode

DIGITS = 5
"""Of what is written down, so that an episode stays a short row."""


def asynchrony_of(episode: Episode, replans: Sequence[Replan]) -> EpisodeAsynchrony | None:
    """The record of an episode; None where nothing in it speaks of levels, as where the expert acted."""
    found = EpisodeAsynchrony(
        replans=_by_value(replans),
        jerk=chunk_jerk([step.action for step in episode.steps]),
        reaction=goal_reaction(episode),
    )
    return None if found == EpisodeAsynchrony(replans=[]) else found


def _by_value(replans: Sequence[Replan]) -> list[EpisodeReplans]:
    together: dict[tuple[str, str], list[Replan]] = {}
    for replan in replans:
        together.setdefault((replan.level, replan.value), []).append(replan)
    return [
        EpisodeReplans(
            level=level,
            value=value,
            shares=[round(replan.share, DIGITS) for replan in found if replan.share is not None],
            differences=[round(replan.difference, DIGITS) for replan in found],
        )
        for (level, value), found in together.items()
    ]


def chunk_jerk(actions: Sequence[Action]) -> ChunkJerk | None:
    """The jerk of consecutive executed actions; None where there are no three fresh ones in a row."""
    if len(actions) < 3:
        return None
    values = np.stack([action.value for action in actions]).astype(np.float64)
    jerk = np.linalg.norm(np.diff(values, n=2, axis=0), axis=-1)
    # Not a number is equal to nothing, itself included.
    begins = np.array([np.nan if action.chunk_first_step is None else action.chunk_first_step for action in actions])
    fresh = np.isfinite(begins[2:] + begins[1:-1] + begins[:-2])
    goes_on = begins[1:] == begins[:-1]
    boundary, within = _mean(jerk[fresh & ~goes_on[1:]]), _mean(jerk[goes_on[1:] & goes_on[:-1]])
    return None if boundary is None and within is None else ChunkJerk(boundary=boundary, within=within)


def goal_reaction(episode: Episode) -> GoalReaction | None:
    """When the episode's actions first knew of the moved goal; None where it was not moved, or no policy acted."""
    moved = episode.goal_moved_at
    fresh = [(s.observation.step, s.action) for s in episode.steps if s.action.chunk_first_step is not None]
    if moved is None or not fresh:
        return None
    return GoalReaction(
        moved_at=moved,
        chunk_steps=_until(moved, ((step, action.chunk_first_step) for step, action in fresh)),
        intent_steps=_until(
            moved, ((step, step - action.intent_age_steps) for step, action in fresh if action.intent_age_steps is not None)
        ),
    )


def mean_measures(actions: Sequence[Action]) -> dict[str, float] | None:
    """The means over executed actions of what their chunks say of themselves, by name; None where none says anything."""
    said: dict[str, list[float]] = {}
    for action in actions:
        for name, value in action.measures.items():
            said.setdefault(name, []).append(value)
    return {name: round(float(np.mean(values)), DIGITS) for name, values in said.items()} or None


def _until(moved: int, executed: Iterable[tuple[int, int | None]]) -> int | None:
    """Control steps from the move to the first executed step whose picture was taken no earlier."""
    return next((step - moved for step, seen in executed if seen is not None and seen >= moved), None)


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), DIGITS) if len(values) else None
