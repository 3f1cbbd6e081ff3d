"""Re-plan disagreement: how far a fresh intent differs from the one in use, which still covered steps when it was made."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import Intent


@dataclass(frozen=True, kw_only=True)
class Replan:
    """One value of an intent, fresh against the one that was in use, over the control steps that both cover.

    Attributes:
        level: whose intents; `value`: its name in them.
        share: of the entries, those that differ; None of real numbers, which always do by something.
        difference: mean absolute difference of the entries: of classes in classes, of real numbers in their own unit.
    """

    level: str
    value: str
    share: float | None
    difference: float


def replanned(used: Intent | None, fresh: Intent) -> list[Replan]:
    """What a fresh intent says otherwise than the one in use that it replaces, however late it does.

    Compared are numeric values with a row a control step (as many rows as the intent covers) and of one shape in both.
    Integers and booleans are classes: unequal ones differ.

    Returns:
        One entry a value; none where no intent is in use, or no step is covered by both.
    """
    if used is None:
        return []
    first, end = max(used.first_step, fresh.first_step), min(used.end_step, fresh.end_step)
    if end <= first:
        return []
    found = []
    for name, new in fresh.values.items():
        old = used.values.get(name)
        if old is None or not (_by_step(used, old) and _by_step(fresh, new)) or old.shape[1:] != new.shape[1:]:
            continue
        before, now = (of.values[name][first - of.first_step : end - of.first_step] for of in (used, fresh))
        if not now.size:
            continue
        apart = np.abs(now.astype(np.float64) - before)
        share = None if now.dtype.kind == "f" else float(np.count_nonzero(apart)) / apart.size
        found.append(Replan(level=fresh.level, value=name, share=share, difference=float(apart.mean())))
    return found


def _by_step(intent: Intent, value: NDArray[Any]) -> bool:
    return value.ndim > 0 and len(value) == intent.covers and value.dtype.kind in "biuf"
