"""LeRobotDataset v3, in and out: `DatasetWriter` and `write_dataset` write one, `open_dataset` reads any."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libra_ray.data.checks import DatasetError, check_dimensions, check_finite, read_info, unfinished
from libra_ray.data.tasks import frame_instructions
from libra_ray.data.writer import SEED_KEY, DatasetWriter, load_lerobot, write_dataset
from libra_ray.types import ACTION_KEY, STATE_KEY, RobotSpec

__all__ = ["UNKNOWN_SEED", "DatasetWriter", "Recorded", "load_lerobot", "open_dataset", "read_table", "write_dataset"]

UNKNOWN_SEED = -1
"""What `Recorded.seeds` says where the dataset keeps no seeds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """A dataset's numbers, in memory; its pictures stay on disk (`frames.frame_cache`).

    `F` frames in order, `E` episodes. The frames of episode `e` are rows `starts[e]` to `starts[e] + lengths[e]`.

    Attributes:
        root: the dataset's folder.
        fps: control steps per second.
        features: LeRobot's feature table.
        image_keys: the colour cameras in the feature table's order.
        state: `(F, S)` float32; `action` `(F, D)` float32.
        episode_index: `(F,)` the episode of each frame; `frame_index` `(F,)` its step in the episode, from 0.
        starts: `(E,)` first row of each episode; `lengths` `(E,)` its frames.
        instructions: the different instructions, sorted.
        task_index: `(F,)` the place of each frame's own among them; within an episode it may change.
        seeds: `(E,)`, `UNKNOWN_SEED` where the dataset has none.
    """

    root: Path
    fps: int
    features: dict[str, Any]
    image_keys: tuple[str, ...]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    episode_index: NDArray[np.int64]
    frame_index: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    instructions: tuple[str, ...]
    task_index: NDArray[np.int64]
    seeds: NDArray[np.int64]

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.episode_index)

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
        return RobotSpec(action_dim=self.action_dim, state_dim=self.state_dim, cameras=self.image_keys, control_hz=self.fps)

    def instruction(self, row: int) -> str:
        """The instruction of one frame."""
        return self.instructions[self.task_index[row]]

    def rows(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row numbers of the given episodes' frames, in the given order of episodes."""
        parts = [np.arange(self.starts[e], self.starts[e] + self.lengths[e]) for e in episodes]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def open_dataset(root: Path, *, state_dim: int | None = None, action_dim: int | None = None) -> Recorded:
    """Read and check the LeRobotDataset v3 at `root`; no video is decoded.

    Args:
        root: the dataset's folder.
        state_dim: S that the caller can work with; None accepts any. `action_dim` likewise.

    Raises:
        DatasetError: missing, empty, not finalised, of an old format, with other features or dimensions than needed, or
            with values that are not finite.
    """
    info = read_info(root)
    features: dict[str, Any] = info["features"]
    image_keys = _check_features(root, features, state_dim, action_dim)
    columns = [STATE_KEY, ACTION_KEY, "episode_index", "frame_index", "task_index", "index"]
    table = read_table(root, "data", columns + ([SEED_KEY] if SEED_KEY in features else []))
    index = table["index"].to_numpy()
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], np.arange(len(index))):
        raise DatasetError(f"dataset {root}: frames are not numbered consecutively from 0 (column index); write it again")
    episode_index = table["episode_index"].to_numpy()[order]
    frame_index = table["frame_index"].to_numpy()[order]
    state, action = _matrix(table[STATE_KEY])[order], _matrix(table[ACTION_KEY])[order]
    starts = _episode_starts(root, info, episode_index, frame_index)
    for name, values in ((STATE_KEY, state), (ACTION_KEY, action)):
        check_finite(name, values, episode_index, frame_index)
    instructions, task_index = frame_instructions(root, table["task_index"].to_numpy()[order], episode_index, frame_index)
    seeds = table[SEED_KEY].to_numpy()[order][starts] if SEED_KEY in features else np.full(len(starts), UNKNOWN_SEED)
    return Recorded(
        root=root,
        fps=int(info["fps"]),
        features=features,
        image_keys=image_keys,
        state=state,
        action=action,
        episode_index=episode_index,
        frame_index=frame_index,
        starts=starts,
        lengths=np.diff(np.append(starts, len(episode_index))),
        instructions=instructions,
        task_index=task_index,
        seeds=seeds.astype(np.int64),
    )


def read_table(root: Path, folder: str, columns: list[str]) -> pa.Table:
    """The given columns of every parquet file under `root/folder`, in the files' order.

    Raises:
        DatasetError: no file, a file without its footer (the writer was not finalised), or a missing column.
    """
    paths = sorted((root / folder).glob("*/*.parquet"))
    if not paths:
        raise unfinished(root / folder, "no parquet files")
    tables = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise unfinished(path, f"damaged parquet file ({error})") from error
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise DatasetError(f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
        tables.append(file.read(columns=columns))
    return pa.concat_tables(tables, promote_options="permissive")


def _check_features(root: Path, features: dict[str, Any], state_dim: int | None, action_dim: int | None) -> tuple[str, ...]:
    for key, expected in ((STATE_KEY, state_dim), (ACTION_KEY, action_dim)):
        if key not in features:
            raise DatasetError(f"dataset {root} has no feature {key!r}; it has {', '.join(features)}")
        check_dimensions(key, int(np.prod(features[key]["shape"])), expected)
    cameras = tuple(k for k, f in features.items() if f["dtype"] in ("video", "image") and not _is_depth(f))
    if not cameras:
        raise DatasetError(f"dataset {root} has no colour camera; it has {', '.join(features)}")
    return cameras


def _is_depth(feature: dict[str, Any]) -> bool:
    info = (feature.get("info") or {}) | (feature.get("video_info") or {})
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A list column as `(F, dims)`, a scalar column as `(F, 1)`."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    rows = len(array)
    flat = array.flatten() if pa.types.is_nested(array.type) else array
    return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows, -1)


def _episode_starts(
    root: Path, info: dict[str, Any], episode_index: NDArray[np.int64], frame_index: NDArray[np.int64]
) -> NDArray[np.int64]:
    """First row of each episode, after comparing frames and episodes with what the dataset says of itself."""
    recorded = len(read_table(root, "meta/episodes", ["episode_index"]))
    if len(episode_index) != info["total_frames"] or recorded != info["total_episodes"]:
        raise unfinished(
            root,
            f"info.json announces {info['total_episodes']} episodes and {info['total_frames']} frames, "
            f"the files hold {recorded} and {len(episode_index)}",
        )
    starts = np.flatnonzero(np.diff(episode_index, prepend=-1))
    lengths = np.diff(np.append(starts, len(episode_index)))
    counts = np.arange(len(episode_index)) - np.repeat(starts, lengths)
    if not np.array_equal(episode_index[starts], np.arange(recorded)) or not np.array_equal(counts, frame_index):
        raise DatasetError(f"dataset {root}: episodes or frames are not numbered consecutively from 0; write it again")
    return starts
