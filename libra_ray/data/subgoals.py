"""Which sub-goal a demonstrator works on at each frame: instructions in parts, and where a part was done."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

THEN = ", then "
"""Stands between the parts of an instruction that are to be done one after another."""
_EXACT = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Subgoals:
    """The sub-goals of a data set.

    Attributes:
        names: the different ones in words, sorted.
        of_frame: `(F,)` the place of each frame's own among them.
        ends: `(F,)` the first row past the frame's own that works on another one, or on another episode.
    """

    names: tuple[str, ...]
    of_frame: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        instructions: Sequence[str],
        task_index: NDArray[np.int64],
        episode_index: NDArray[np.int64],
        reward: NDArray[np.float32] | None,
    ) -> "Subgoals":
        """Found in what a data set says of its frames.

        A stretch of one instruction is one sub-goal, in the instruction's words. Where the instruction has n parts and every
        reward in the stretch is either 0 or 1/n, at most n times, as our recorder keeps them, a reward marks the frame whose
        action ended a part, and each part is a sub-goal of its own.

        Args:
            instructions: the different ones; `task_index` `(F,)` is the place of each frame's own among them.
            episode_index: `(F,)`, and `reward` `(F,)` where the data set has rewards.
        """
        frames = len(task_index)
        changed = (np.diff(task_index) != 0) | (np.diff(episode_index) != 0)
        starts = np.concatenate(([0], np.flatnonzero(changed) + 1))[: frames and None]
        words = np.empty(frames, object)
        for first, last in zip(starts, np.append(starts[1:], frames), strict=True):
            text = instructions[task_index[first]]
            words[first:last] = _parts(text, None if reward is None else reward[first:last], last - first)
        names = tuple(sorted(set(words)))
        place = {name: i for i, name in enumerate(names)}
        of_frame = np.array([place[text] for text in words], np.int64)
        others = np.flatnonzero((np.diff(of_frame) != 0) | (np.diff(episode_index) != 0)) + 1
        ends = np.append(others, frames)[np.searchsorted(others, np.arange(frames), side="right")]
        return cls(names=names, of_frame=of_frame, ends=ends)

    def ahead(self, rows: NDArray[np.int64], last: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The next sub-goals `(B, count)` from each of `rows` on, its own first; the number of names past its `last` row."""
        found = np.full((len(rows), count), len(self.names), np.int64)
        now = rows
        for k in range(count):
            there = now <= last
            found[there, k] = self.of_frame[now[there]]
            now = np.where(there, self.ends[np.minimum(now, last)], now)
        return found


def rewards_of(column: pa.ChunkedArray | None) -> NDArray[np.float32] | None:
    """A column of rewards `(F,)`; None where it is none, or not everywhere: nothing else is read from it."""
    if column is None or not pa.types.is_floating(column.type) or column.null_count:
        return None
    return np.asarray(column.to_numpy(), np.float32)


def _parts(instruction: str, reward: NDArray[np.float32] | None, frames: int) -> list[str]:
    """The sub-goal in words at each of the frames of one stretch."""
    parts = instruction.split(THEN)
    if reward is None or len(parts) == 1:
        return [instruction] * frames
    ended = np.abs(reward - 1 / len(parts)) < _EXACT
    if not (ended | (reward == 0)).all() or not 1 <= ended.sum() <= len(parts):
        return [instruction] * frames
    done = np.concatenate(([0], np.cumsum(ended)[:-1]))
    return [parts[min(n, len(parts) - 1)] for n in done]
