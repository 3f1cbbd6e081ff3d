"""The held-out split, by episode and per task."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libra_ray.data.dataset import Recorded


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Episode ids `(E_train,)` and `(E_holdout,)`, disjoint, sorted, together all episodes."""

    train: NDArray[np.int64]
    holdout: NDArray[np.int64]


def split_episodes(recorded: Recorded, holdout_share: float, seed: int) -> Split:
    """Hold out whole episodes, the same share of every task (instruction).

    Every task keeps at least one training episode; with a share above 0, a task of two or more episodes gives at least one.

    Args:
        recorded: the dataset.
        holdout_share: share of each task's episodes, in [0, 1].
        seed: determines the choice.

    Raises:
        ValueError: the share is not in [0, 1].
    """
    if not 0 <= holdout_share <= 1:
        raise ValueError(f"holdout_share={holdout_share} is not a share; it must lie in [0, 1]")
    tasks = np.array(recorded.tasks)
    holdout: list[NDArray[np.int64]] = []
    for number, task in enumerate(sorted(set(recorded.tasks))):
        episodes = np.flatnonzero(tasks == task)
        wanted = max(1, round(holdout_share * len(episodes))) if holdout_share else 0
        chosen = np.random.default_rng([seed, number]).permutation(episodes)[: min(wanted, len(episodes) - 1)]
        holdout.append(chosen)
    held = np.sort(np.concatenate(holdout))
    return Split(train=np.setdiff1d(np.arange(len(tasks)), held), holdout=held)
