"""The latency model of a level, fitted to what was measured of it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from libra_ray.budget.records import GATEWAY, ROBOT, TRANSPORT, ComponentProfile, LatencyModel, TimedCall


def fitted(calls: Sequence[TimedCall]) -> LatencyModel:
    """The model with the least relative squared error at the p95 of the calls; its terms are not below 0.

    What was measured counts wherever it is more (`LatencyModel.ms`): no setting is proposed on less than that.

    Raises:
        ValueError: there is nothing to fit to.
    """
    if not calls:
        raise ValueError("a latency model needs at least one measured call")
    terms = np.array([[1.0, c.batch, c.steps, c.steps * c.batch] for c in calls])
    ms = np.maximum([c.p95_ms for c in calls], 1e-9)
    best = _not_negative(terms / ms[:, None], np.ones(len(ms)))
    overhead, per_robot, per_step, per_step_robot = map(float, best)
    found = LatencyModel(
        overhead=overhead, per_robot=per_robot, per_step=per_step, per_step_robot=per_step_robot, measured=tuple(calls)
    )
    said = np.array([found.ms(call.batch, call.steps) for call in calls])
    return replace(found, worst_error=float(np.abs(said / ms - 1).max()))


def models_of(profile: ComponentProfile) -> dict[str, LatencyModel]:
    """Of every level by its name, of the gateway and of the transport, in which what the robot itself does is counted."""
    found = {name: fitted(calls) for name, calls in profile.calls.items()}
    robot = [TimedCall(batch=0, steps=0, p50_ms=c.p50_ms, p95_ms=c.p95_ms) for c in profile.components if c.where == ROBOT]
    own = sum(call.p95_ms for call in robot)
    for where, beside in ((GATEWAY, 0.0), (TRANSPORT, own)):
        parts = [c for c in profile.components if c.where == where]
        sums = [
            TimedCall(
                batch=batch,
                steps=0,
                p50_ms=sum(c.p50_ms for c in parts if c.batch == batch),
                p95_ms=beside + sum(c.p95_ms for c in parts if c.batch == batch),
            )
            for batch in sorted({c.batch for c in parts})
        ]
        found[where] = fitted(sums)
    return found


def _not_negative(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The exact solution of least squares with no factor below 0: the best of all choices of factors that are not 0."""
    best, least = np.zeros(terms.shape[1]), np.inf
    used = [column for column in range(terms.shape[1]) if terms[:, column].any()]
    for size in range(1, len(used) + 1):
        for chosen in combinations(used, size):
            own, *_ = np.linalg.lstsq(terms[:, chosen], wanted)
            error = float(np.square(terms[:, chosen] @ own - wanted).sum())
            if (own >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = own
    return best
