"""Windows over recorded episodes: histories, action chunks with padding masks, and the refiner's fresher picture."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.config import ActionConfig, DataConfig, HierarchyConfig
from libra_ray.data.dataset import Demonstrations
from libra_ray.data.transforms import Pipeline

Tokens = Callable[[Sequence[str]], tuple[NDArray[np.int64], NDArray[np.bool_]]]
"""Instructions to token ids `(K, W)` and their mask `(K, W)`, False on padding."""


class Windows:
    """Every frame of the chosen episodes begins one window; windows are numbered from 0 in the dataset's order.

    A window is the planner's picture at frame `t`, the actions of the `L + H` steps from `t` on, with `L = M * H`, and the
    refiner's picture at `t + offset`, whose chunk may end past the plan. Nothing crosses an episode's border: histories repeat
    the episode's first frame, actions past its end repeat the last one and are masked, and the offset is drawn only among the
    steps that the episode still has.

    A window's instruction is that of frame `t`, the planner's picture: what a robot would be told at that moment. Where the
    instruction changes within the next steps, the plan shows how the demonstrator went on to the next one.

    Args:
        recorded: the dataset.
        frames: its pictures `(cameras, F, height, width, 3)` uint8, as `frame_cache` opens them.
        pipeline: the normalisation.
        action: M and H.
        data: the history.
        episodes: ids of the episodes to use.
        tokens: the planner's tokeniser; called once.
        max_staleness: control steps by which the later picture may lag off the chunk grid (RoboDual's random staleness); below
            0 it lies anywhere from the first picture to the end of its plan.
        hierarchy: how many sub-goals a window names, and of how long ago the heard ones may be: up to so many plans.

    Raises:
        ValueError: no episodes, or statistics of other dimensions than the dataset's.
    """

    def __init__(
        self,
        recorded: Demonstrations,
        frames: NDArray[np.uint8],
        pipeline: Pipeline,
        action: ActionConfig,
        data: DataConfig,
        episodes: NDArray[np.int64],
        tokens: Tokens,
        max_staleness: int,
        hierarchy: HierarchyConfig,
    ) -> None:
        if len(episodes) == 0:
            raise ValueError("no episodes to make windows of; lower data.holdout_share or record more episodes")
        assert frames.shape[1] == len(recorded), "the frame cache belongs to another dataset"
        pipeline.stats.check_fits(recorded.state_dim, recorded.action_dim)
        self._frames = frames
        self._rows = recorded.rows(np.asarray(episodes, np.int64))
        self._first = recorded.starts[recorded.episode_index]
        self._last = self._first + recorded.lengths[recorded.episode_index] - 1
        self._state = pipeline.inputs_state(recorded.state)
        self._action = pipeline.inputs_action(recorded.action)
        ids, mask = tokens(recorded.instructions)
        self._text, self._text_mask = np.asarray(ids, np.int64), np.asarray(mask, np.bool_)
        self._text_of = recorded.task_index
        self._horizon, self._plan_steps = action.horizon, action.plan_steps
        # A chunk that begins where the plan ends is whole.
        self._steps = np.arange(action.plan_steps + action.horizon)
        self._ages = np.arange(data.history - 1, -1, -1)
        self._max_staleness = max_staleness
        self._subgoals, self._named = recorded.subgoals, hierarchy.subgoals
        self._oldest = hierarchy.plans * action.plan_steps

    def __len__(self) -> int:
        """The number of windows."""
        return len(self._rows)

    def batch(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """The windows of the given numbers, normalised.

        Gathered by numpy alone: this runs in a thread beside the training loop, where torch would open another pool of threads.
        With more of them than cores neither pool spins between operations any more, and training loses a third of its speed.

        Image `T` index is `camera * history + h`, oldest picture first, the present one last; pictures are contiguous in
        channels-last memory, which is how they lie in the cache and what convolutions want.

        Args:
            rows: window numbers `(B,)`.
            rng: draws the offsets.
        """
        now = self._rows[rows]
        offset = self._draw_offsets(self._last[now] - now, rng)
        fresh = now + offset
        future = now[:, None] + self._steps
        mask = future <= self._last[now][:, None]
        path = np.minimum(future[:, : self._plan_steps] + 1, self._last[now][:, None])
        heard = now - rng.integers(0, np.minimum(now - self._first[now], self._oldest), endpoint=True)
        text, tensor = self._text_of[now], torch.from_numpy
        return Batch(
            plan_images=self._images(now),
            plan_state=tensor(self._state[now]),
            images=self._images(fresh),
            state=tensor(self._state[fresh]),
            text=tensor(self._text[text]),
            text_mask=tensor(self._text_mask[text]),
            actions=tensor(self._action[np.minimum(future, self._last[now][:, None])]),
            action_mask=tensor(mask),
            offset=tensor(offset),
            path=tensor(self._state[path]),
            subgoals=tensor(self._subgoals.ahead(now, self._last[now], self._named)),
            heard_subgoals=tensor(self._subgoals.ahead(heard, self._last[now], self._named)),
        )

    def _draw_offsets(self, remaining: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Steps to the later picture: any that the plan can be behind; or a chunk start, and up to `max_staleness` more.

        `remaining` `(B,)` counts the episode's frames after the first picture's.
        """
        if self._max_staleness < 0:
            return rng.integers(0, np.minimum(remaining, self._plan_steps), endpoint=True)
        most = np.minimum(remaining, self._plan_steps - self._horizon)
        chunk = rng.integers(0, most // self._horizon, endpoint=True)
        late = rng.integers(0, self._max_staleness, size=len(most), endpoint=True)
        return np.minimum(chunk * self._horizon + late, most)

    def _images(self, rows: NDArray[np.int64]) -> Tensor:
        """`(B, T, 3, height, width)` pictures with their history up to frame `rows`."""
        history = np.maximum(rows[:, None] - self._ages, self._first[rows][:, None])
        cameras = len(self._frames)
        out = np.empty((len(rows), cameras, len(self._ages), *self._frames.shape[2:]), np.uint8)
        for camera in range(cameras):
            out[:, camera] = self._frames[camera][history]
        return torch.from_numpy(out).flatten(1, 2).permute(0, 1, 4, 2, 3)
