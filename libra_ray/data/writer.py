"""Episodes into a LeRobotDataset v3.

LeRobot's own recorder is made for one robot in real time: per episode it computes histograms of every pixel and copies the
whole video file to append to it, about 400 frames a second here. This writer lays down the same files through LeRobot's
own metadata, schema and statistics functions, with one video per camera, put together from clips that others have encoded.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from libra_ray.data.features import EXECUTED_KEY, REWARD_KEY, SEED_KEY, SUCCESS_KEY, features_of
from libra_ray.data.pictures import picture_statistics
from libra_ray.data.video import EncodedClip, EncoderSettings, JoinedVideo, encode, encoder_config
from libra_ray.spec import NOTHING, Declares
from libra_ray.types import ACTION_KEY, STATE_KEY, Episode

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_NO_CLIPS: Mapping[str, EncodedClip] = MappingProxyType({})


type Recording = tuple[Episode, Mapping[str, EncodedClip]]
"""An episode, and the pictures of its cameras where they are encoded already."""


class DatasetWriter:
    """The single writer of a LeRobotDataset v3; use it as a context manager.

    Everything is written beside the target, into `<root>.partial`, and moved to `root` only by `finalize()`: a folder
    named `root` is a finished dataset. Leftovers of an interrupted writer are thrown away; the episodes are read again
    from where they came (the spool).

    Columns: the cameras (video), `observation.state`, `action` (the clean *label*), and for analysis `executed` (the
    action with its noise), `next.reward`, `next.success`, `seed`. LeRobot's policies ignore the latter four.

    Args:
        root: the dataset's folder; must not exist yet.
        fps: control steps per second.
        image_shapes: camera feature name -> `(height, width, 3)`.
        state_dim: S.
        action_dim: D.
        video_codec: an encoder LeRobot knows, e.g. `h264`.
        robot_type: LeRobot's name for the robot.
        declared: what its actions and states mean; kept in the dataset.

    Raises:
        ValueError: `root` exists already, or the codec is unknown.
    """

    def __init__(
        self,
        root: Path,
        *,
        fps: int,
        image_shapes: Mapping[str, tuple[int, int, int]],
        state_dim: int,
        action_dim: int,
        video_codec: str = "h264",
        robot_type: str = "unknown",
        declared: Declares = NOTHING,
    ) -> None:
        from lerobot.datasets import LeRobotDatasetMetadata
        from lerobot.datasets.feature_utils import get_hf_features_from_features

        if root.exists():
            raise ValueError(f"dataset {root} exists already; remove it or choose another folder")
        self.root = root
        self.episodes = 0
        self.frames = 0
        self._image_shapes = dict(image_shapes)
        self._encoder = encoder_config(video_codec)
        self._partial = root.with_name(root.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._meta = LeRobotDatasetMetadata.create(
            repo_id=f"local/{root.name}",
            fps=fps,
            features=features_of(image_shapes, state_dim, action_dim, declared),
            robot_type=robot_type,
            root=self._partial,
            metadata_buffer_size=1000,
        )
        self._schema = get_hf_features_from_features(self._meta.features).arrow_schema
        self._parquet: pq.ParquetWriter | None = None
        self._videos: dict[str, JoinedVideo] = {}
        self._video_files = dict.fromkeys(image_shapes, 0)
        self._finalized = False

    def add(self, episode: Episode, clips: Mapping[str, EncodedClip] = _NO_CLIPS) -> None:
        """Append one episode.

        Args:
            clips: the pictures of its cameras, where they are encoded already; by the same codec and at the same rate.

        Raises:
            ValueError: no steps, or a picture, state or action of another shape than announced.
        """
        columns = self._episode_columns(episode)
        clips = {key: self._clip(episode, key, clips.get(key)) for key in self._image_shapes}
        length = len(episode.steps)
        self._write_table(columns)
        place: dict[str, Any] = {"data/chunk_index": 0, "data/file_index": 0}
        place |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        for key, clip in clips.items():
            place |= self._write_video(key, clip)
        self._meta.save_episode(self.episodes, length, episode.instructions, self._statistics(columns, clips), place)
        self.episodes += 1
        self.frames += length

    def finalize(self) -> Path:
        """Complete every file and move the dataset to `root`; returns `root`. Idempotent.

        Raises:
            ValueError: nothing was added.
        """
        from lerobot.datasets.io_utils import write_info

        if self._finalized:
            return self.root
        if not self.episodes:
            raise ValueError(f"dataset {self.root} has no episodes; add at least one before finalize()")
        self._close_files()
        self._meta.finalize()
        for key in self._image_shapes:
            self._meta.update_video_info(key, video_encoder=self._encoder)
        write_info(self._meta.info, self._partial)
        self._partial.rename(self.root)
        self._finalized = True
        return self.root

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finalize; after an error, close the files and leave `root` unwritten."""
        if kind is None:
            self.finalize()
        else:
            self._close_files()

    def _episode_columns(self, episode: Episode) -> dict[str, NDArray]:
        steps, name = episode.steps, f"episode {episode.task} seed {episode.seed}"
        if not steps:
            raise ValueError(f"{name} has no steps; only recorded episodes can be added")
        columns = {
            STATE_KEY: np.stack([s.observation.state for s in steps]).astype(np.float32),
            ACTION_KEY: np.stack([s.action.label for s in steps]).astype(np.float32),
            EXECUTED_KEY: np.stack([s.action.value for s in steps]).astype(np.float32),
        }
        for key, column in columns.items():
            if column.shape[1:] != tuple(self._meta.features[key]["shape"]):
                raise ValueError(f"{name}: {key} has shape {column.shape[1:]}, expected {self._meta.features[key]['shape']}")
        length = len(steps)
        self._meta.save_episode_tasks(episode.instructions)
        tasks = {text: self._meta.get_task_index(text) for text in episode.instructions}
        index = np.arange(length)
        return columns | {
            REWARD_KEY: np.array([s.reward for s in steps], np.float32),
            SUCCESS_KEY: np.array([s.success for s in steps], np.bool_),
            SEED_KEY: np.full(length, episode.seed, np.int64),
            "timestamp": (index / self._meta.fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(length, self.episodes, np.int64),
            "index": index + self.frames,
            "task_index": np.array([tasks[s.observation.instruction] for s in steps], np.int64),
        }

    def _clip(self, episode: Episode, key: str, given: EncodedClip | None) -> EncodedClip:
        """A camera's clip; its pictures are encoded here where nobody has done so."""
        shape, name = self._image_shapes[key], f"episode {episode.task} seed {episode.seed}"
        if given is not None:
            held = given.frames, *given.samples.shape[1:]
            if held != (len(episode.steps), *shape):
                raise ValueError(f"{name}: {key} is a clip of {held}, expected {(len(episode.steps), *shape)}")
            return given
        pictures = [step.observation.images.get(key) for step in episode.steps]
        for step, picture in enumerate(pictures):
            if picture is None or picture.shape != shape or picture.dtype != np.uint8:
                got = "nothing" if picture is None else f"{picture.dtype} {picture.shape}"
                raise ValueError(f"{name} step {step}: {key} is {got}, expected uint8 {shape}")
        stack = np.stack([picture for picture in pictures if picture is not None])
        return encode(stack, self._meta.fps, EncoderSettings.of(self._encoder))

    def _write_table(self, columns: Mapping[str, NDArray]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table([pa.array(list(columns[f.name]), type=f.type) for f in self._schema], schema=self._schema)
        if self._parquet is None:
            path = self._partial / self._meta.data_path.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(path, schema=self._schema, compression="snappy", use_dictionary=True)
        self._parquet.write_table(table)

    def _write_video(self, key: str, clip: EncodedClip) -> dict[str, float]:
        """Append to the camera's video, begin a new file where LeRobot's size limit is reached; the episode's place in it."""
        video = self._videos.get(key)
        if video is not None and video.bytes >= self._meta.video_files_size_in_mb * 2**20:
            video.close()
            self._video_files[key] += 1
            video = None
        chunk, file = divmod(self._video_files[key], self._meta.chunks_size)
        if video is None:
            path = self._partial / str(self._meta.video_path).format(video_key=key, chunk_index=chunk, file_index=file)
            video = JoinedVideo(path, self._meta.fps)
            self._videos[key] = video
        first = video.frames
        video.append(clip)
        return {
            f"videos/{key}/chunk_index": chunk,
            f"videos/{key}/file_index": file,
            f"videos/{key}/from_timestamp": first / self._meta.fps,
            f"videos/{key}/to_timestamp": video.frames / self._meta.fps,
        }

    def _statistics(self, columns: Mapping[str, NDArray], clips: Mapping[str, EncodedClip]) -> dict[str, Any]:
        """LeRobot's statistics of one episode; of the pictures the samples'."""
        from lerobot.datasets.compute_stats import compute_episode_stats

        statistics: dict[str, Any] = compute_episode_stats(dict(columns), self._meta.features)
        return statistics | {key: picture_statistics(clip.samples) for key, clip in clips.items()}

    def _close_files(self) -> None:
        for video in self._videos.values():
            video.close()
        self._videos.clear()
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None


def write_dataset(
    episodes: Iterable[Episode],
    root: Path,
    *,
    fps: int,
    video_codec: str = "h264",
    robot_type: str = "unknown",
    declared: Declares = NOTHING,
) -> Path:
    """Write all `episodes` as the dataset `root`; see `write_recordings`."""
    recordings: Iterable[Recording] = ((episode, {}) for episode in episodes)
    return write_recordings(recordings, root, fps=fps, video_codec=video_codec, robot_type=robot_type, declared=declared)


def write_recordings(
    recordings: Iterable[Recording],
    root: Path,
    *,
    fps: int,
    video_codec: str = "h264",
    robot_type: str = "unknown",
    declared: Declares = NOTHING,
) -> Path:
    """Write episodes, whose pictures may be clips, as the dataset `root`.

    Restartable from scratch, since `root` appears only when complete. The shapes are those of the first episode.
    Returns `root`.

    Raises:
        ValueError: there are no episodes, `root` exists, or the episodes differ in shape.
    """
    remaining = iter(recordings)
    first, clips = next(remaining, (None, {}))
    if first is None or not first.steps:
        raise ValueError(f"no episodes to write to {root}; record at least one successful episode")
    step = first.steps[0]
    sizes = {key: picture.shape for key, picture in step.observation.images.items()}
    sizes |= {key: clip.samples.shape[1:] for key, clip in clips.items()}
    writer = DatasetWriter(
        root,
        fps=fps,
        image_shapes={key: (size[0], size[1], 3) for key, size in sizes.items()},
        state_dim=len(step.observation.state),
        action_dim=len(step.action.label),
        video_codec=video_codec,
        robot_type=robot_type,
        declared=declared,
    )
    with writer:
        writer.add(first, clips)
        for episode, clips in remaining:
            writer.add(episode, clips)
    return root
