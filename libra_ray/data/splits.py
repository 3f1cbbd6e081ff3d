"""The held-out split, by episode and per instruction."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libra_ray.data.dataset import Demonstrations


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Episode ids `(E_train,)` and `(E_holdout,)`, disjoint, sorted, together all episodes."""

    train: NDArray[np.int64]
    holdout: NDArray[np.int64]


def split_episodes(recorded: Demonstrations, holdout_share: float, seed: int) -> Split:
    """Hold out whole episodes, at least the same share of every instruction's.

    An episode with several instructions counts for each of them, and rare instructions choose first. Every instruction keeps
    at least one training episode, which comes before the share; apart from that, with a share above 0, an instruction of two
    or more episodes gives at least one.

    Args:
        recorded: the dataset.
        holdout_share: share of each instruction's episodes, in [0, 1].
        seed: determines the choice.

    Raises:
        ValueError: the share is not in [0, 1].
    """
    if not 0 <= holdout_share <= 1:
        raise ValueError(f"holdout_share={holdout_share} is not a share; it must lie in [0, 1]")
    pairs = np.unique(np.stack([recorded.task_index, recorded.episode_index], axis=1), axis=0)
    tasks = range(len(recorded.instructions))
    episodes_of = np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], tasks[1:]))
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    tasks_of = np.split(pairs[:, 0], np.searchsorted(pairs[:, 1], np.arange(1, len(recorded.lengths))))
    left = np.array([len(episodes) for episodes in episodes_of])
    held: set[int] = set()
    for task in sorted(tasks, key=lambda task: len(episodes_of[task])):
        episodes = episodes_of[task]
        wanted = max(1, round(holdout_share * len(episodes))) if holdout_share else 0
        for episode in np.random.default_rng([seed, task]).permutation(episodes).tolist():
            if len(episodes) - left[task] >= wanted:
                break
            if episode not in held and (left[tasks_of[episode]] > 1).all():
                held.add(episode)
                left[tasks_of[episode]] -= 1
    holdout = np.array(sorted(held), np.int64)
    return Split(train=np.setdiff1d(np.arange(len(recorded.lengths)), holdout), holdout=holdout)
