"""LeRobotDataset v3, in and out: `DatasetWriter` and `write_dataset` write one, `open_dataset` reads any."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from libra_ray.config import DataConfig
from libra_ray.data.cameras import Camera, choose_cameras, episode_numbers
from libra_ray.data.checks import DatasetError, check_dimensions, check_finite, read_info, unfinished
from libra_ray.data.columns import Table, frame_order, numbers, read_table, vectors, whole_numbers
from libra_ray.data.features import REWARD_KEY, SEED_KEY, declaration_of
from libra_ray.data.layout import Layout
from libra_ray.data.names import renamed
from libra_ray.data.subgoals import Subgoals, rewards_of
from libra_ray.data.tasks import frame_instructions, wordless
from libra_ray.data.writer import DatasetWriter, Recording, write_dataset, write_recordings
from libra_ray.spec import NOTHING, Declaration, RobotSpec
from libra_ray.types import ACTION_KEY, STATE_KEY

__all__ = [
    "UNKNOWN_SEED", "DatasetWriter", "Demonstrations", "Recording", "open_dataset", "write_dataset", "write_recordings",
]  # fmt: skip

INDICES = ("index", "episode_index", "frame_index", "task_index")
UNKNOWN_SEED = -1
"""What `Demonstrations.seeds` says where the dataset keeps no seeds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstrations:
    """A dataset's numbers, in memory; its pictures stay on disk (`frames.frame_cache`).

    `F` frames in order, `E` episodes. The frames of episode `e` are rows `starts[e]` to `starts[e] + lengths[e]`.

    Attributes:
        root: the dataset's folder.
        fps: control steps per second.
        features: LeRobot's feature table, by the names used here (`data.keys`).
        cameras: those to train on, in the order the model reads them.
        state: `(F, S)` float32; `action` `(F, D)` float32.
        episode_index: `(F,)` the episode of each frame; `frame_index` `(F,)` its step in the episode, from 0.
        starts: `(E,)` first row of each episode; `lengths` `(E,)` its frames.
        instructions: the different instructions, sorted.
        task_index: `(F,)` the place of each frame's own among them; within an episode it may change.
        seeds: `(E,)`, `UNKNOWN_SEED` where the dataset has none.
        reward: `(F,)`, None where the dataset has none.
        declared: what the numbers of action and state mean.
        layout: the dataset's files; `index_column` is the name in them of the frames' numbers.
        notes: what in the dataset is not trained on as it stands; a line each, to be told to the user.
    """

    root: Path
    fps: float
    features: dict[str, Any]
    cameras: tuple[Camera, ...]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    episode_index: NDArray[np.int64]
    frame_index: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    instructions: tuple[str, ...]
    task_index: NDArray[np.int64]
    seeds: NDArray[np.int64]
    layout: Layout
    index_column: str = "index"
    notes: tuple[str, ...] = ()
    reward: NDArray[np.float32] | None = None
    declared: Declaration = NOTHING

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.episode_index)

    @property
    def image_keys(self) -> tuple[str, ...]:
        """The cameras' feature names."""
        return tuple(camera.key for camera in self.cameras)

    @property
    def state_dim(self) -> int:
        """S."""
        return self.state.shape[1]

    @property
    def action_dim(self) -> int:
        """D."""
        return self.action.shape[1]

    @property
    def robot(self) -> RobotSpec:
        """Whose data these are."""
        return RobotSpec(
            action_dim=self.action_dim,
            state_dim=self.state_dim,
            cameras=self.image_keys,
            control_hz=self.fps,
            action=self.declared.action,
            state=self.declared.state,
        )

    @cached_property
    def subgoals(self) -> Subgoals:
        """Which sub-goal each frame works on."""
        return Subgoals.of(self.instructions, self.task_index, self.episode_index, self.reward)

    def instruction(self, row: int) -> str:
        """The instruction of one frame."""
        return self.instructions[self.task_index[row]]

    def rows(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row numbers of the given episodes' frames, in the given order of episodes."""
        parts = [np.arange(self.starts[e], self.starts[e] + self.lengths[e]) for e in episodes]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def open_dataset(
    root: Path, data: DataConfig | None = None, *, state_dim: int | None = None, action_dim: int | None = None
) -> Demonstrations:
    """Read and check the LeRobotDataset v3 at `root`; no video is decoded.

    Args:
        root: the dataset's folder.
        data: which cameras to use, under which names its features are found, and what its numbers mean; None means as it is.
        state_dim: S that the caller can work with; None accepts any. `action_dim` likewise.

    Raises:
        DatasetError: missing, empty, not finalised, of an old format, with other features or dimensions than needed, or
            with values that are missing, no numbers or not finite; names the place and the remedy.
    """
    info, data = read_info(root), data or DataConfig()
    layout = Layout.of(root, info)
    features = renamed(root, info["features"], data.keys)
    dims = {key: int(np.prod(features.table[key]["shape"])) for key in (STATE_KEY, ACTION_KEY)}
    check_dimensions(STATE_KEY, dims[STATE_KEY], state_dim)
    check_dimensions(ACTION_KEY, dims[ACTION_KEY], action_dim)
    declared = declaration_of(root, features.table, data)
    names = [*dims, *INDICES, *(key for key in (SEED_KEY, REWARD_KEY, "timestamp") if key in features.table)]
    table = read_table(root / "data", layout.data, [features.in_files(name) for name in names])
    columns = {name: table[features.in_files(name)] for name in names}
    index, episode_index, frame_index, task_index = (whole_numbers(columns[name], name, table.place) for name in INDICES)
    order = frame_order(root, table, index)

    def frame(row: int) -> str:
        return f"in episode {episode_index[row]}, frame {frame_index[row]}"

    vector = {key: vectors(columns[key], key, dims[key], frame)[order] for key in dims}
    if "timestamp" in columns:
        numbers(columns["timestamp"], "timestamp", frame)
    reward = rewards_of(columns.get(REWARD_KEY))
    episode_index, frame_index, task_index = episode_index[order], frame_index[order], task_index[order]
    starts = _episode_starts(root, info, layout, episode_index, frame_index)
    for key, values in vector.items():
        check_finite(key, values, episode_index, frame_index)
    cameras = choose_cameras(layout, features.table, features.stored, data.cameras, len(starts))
    instructions, task_index = frame_instructions(root, task_index, episode_index, frame_index)
    return Demonstrations(
        root=root,
        fps=float(info["fps"]),
        features=features.table,
        cameras=cameras.chosen,
        state=vector[STATE_KEY],
        action=vector[ACTION_KEY],
        episode_index=episode_index,
        frame_index=frame_index,
        starts=starts,
        lengths=np.diff(np.append(starts, len(episode_index))),
        instructions=instructions,
        task_index=task_index,
        seeds=_seeds(columns.get(SEED_KEY), len(table))[order][starts],
        layout=layout,
        index_column=features.in_files("index"),
        notes=(*features.notes, *cameras.notes, *_notes(layout, table), *wordless(instructions, task_index)),
        reward=None if reward is None else reward[order],
        declared=declared,
    )


def _notes(layout: Layout, table: Table) -> list[str]:
    """What lies in the dataset's folders and gives no frames; a line each."""
    notes = layout.notes()
    if table.empty:
        notes.append(f"without frames: {', '.join(str(path.relative_to(layout.root)) for path in table.empty)}")
    return notes


def _seeds(column: pa.ChunkedArray | None, frames: int) -> NDArray[np.int64]:
    """Seeds as our recorder keeps them; anything else of this name is no seed. Nothing is trained on them."""
    if column is None or not pa.types.is_integer(column.type) or column.null_count:
        return np.full(frames, UNKNOWN_SEED)
    return np.asarray(column.to_numpy(), np.int64)


def _episode_starts(
    root: Path, info: dict[str, Any], layout: Layout, episode_index: NDArray[np.int64], frame_index: NDArray[np.int64]
) -> NDArray[np.int64]:
    """First row of each episode, after comparing frames and episodes with what the dataset says of itself."""
    recorded = len(episode_numbers(read_table(root / "meta" / "episodes", layout.episodes, ["episode_index"])))
    if len(episode_index) != info["total_frames"] or recorded != info["total_episodes"]:
        raise unfinished(
            root,
            f"info.json announces {info['total_episodes']} episodes and {info['total_frames']} frames, "
            f"the files hold {recorded} and {len(episode_index)}",
        )
    if missing := sorted(set(range(recorded)) - set(episode_index.tolist())):
        raise DatasetError(f"dataset {root}: episode {missing[0]} has no frames ({len(missing)} in all); write it again")
    starts = np.flatnonzero(np.diff(episode_index, prepend=-1))
    lengths = np.diff(np.append(starts, len(episode_index)))
    counts = np.arange(len(episode_index)) - np.repeat(starts, lengths)
    if not np.array_equal(episode_index[starts], np.arange(recorded)) or not np.array_equal(counts, frame_index):
        raise DatasetError(f"dataset {root}: episodes or frames are not numbered consecutively from 0; write it again")
    return starts
