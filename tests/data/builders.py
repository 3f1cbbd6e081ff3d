"""Small synthetic episodes (a coloured square moves over a still background) and datasets that name their rows."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets import LeRobotDataset
from numpy.typing import NDArray
from PIL import Image

from libra_ray.data.cameras import Camera
from libra_ray.data.dataset import Demonstrations
from libra_ray.data.layout import Layout
from libra_ray.data.pictures import PictureFormat
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY, Action, Episode, Observation, Step


def make_episode(
    *,
    length: int = 12,
    seed: int = 0,
    instruction: str | Sequence[str] = "open the drawer",
    size: int = 32,
    cameras: Sequence[str] = (IMAGE_KEY,),
    state_dim: int = 4,
    action_dim: int = 4,
) -> Episode:
    """An episode whose state and label name their place: `state[t] = (seed, t, ...)`, the last action dimension is constant.

    `instruction` is the whole episode's, or one for every step.
    """
    told = [instruction] * length if isinstance(instruction, str) else instruction
    rng = np.random.default_rng(seed)
    background = np.kron(rng.integers(40, 200, (4, 4, 3)), np.ones((size // 4, size // 4, 1))).astype(np.uint8)
    state = np.concatenate([np.full((length, 1), seed), np.arange(length)[:, None], rng.normal(size=(length, state_dim))], 1)
    label = rng.uniform(-1, 1, (length, action_dim)).astype(np.float32)
    label[:, -1] = 0.5
    steps = []
    for t in range(length):
        images = {}
        for camera_index, camera in enumerate(cameras):
            picture = background.copy()
            left = (2 * t + seed) % (size - 8)
            picture[4 + 4 * camera_index : 12 + 4 * camera_index, left : left + 8] = (220, 30 * camera_index, (37 * seed) % 256)
            images[camera] = picture
        observation = Observation(images=images, state=state[t, :state_dim].astype(np.float32), instruction=told[t], step=t)
        action = Action(value=label[t] + np.float32(0.01), label=label[t], intent_age_steps=t if t % 2 else None, held=t == 3)
        steps.append(Step(observation=observation, action=action, reward=t / 4, success=t == length - 1))
    return Episode(task="drawer-open-v3", instruction=told[0], seed=seed, steps=steps, success=True)


def make_recorded(lengths: Sequence[int], tasks: Sequence[str] | Sequence[Sequence[str]] | None = None) -> Demonstrations:
    """A dataset in memory only. `state[f] = (episode, step)`, `action[f] = (row, 7)`: every row names its place.

    `tasks` are the episodes' instructions, or for every episode those of its frames.
    """
    lengths_array = np.array(lengths, np.int64)
    starts = np.cumsum(lengths_array) - lengths_array
    episode_index = np.repeat(np.arange(len(lengths)), lengths_array)
    frame_index = np.arange(len(episode_index)) - starts[episode_index]
    given = tasks if tasks is not None else [f"task {e % 2}" for e in range(len(lengths))]
    texts = [text for task, n in zip(given, lengths, strict=True) for text in ([task] * n if isinstance(task, str) else task)]
    instructions = tuple(sorted(set(texts)))
    action = np.stack([np.arange(len(episode_index)), np.full(len(episode_index), 7)], 1)
    return Demonstrations(
        root=Path("nowhere"),
        fps=10,
        features={},
        cameras=(Camera(key=IMAGE_KEY, stored=IMAGE_KEY, format=PictureFormat(height=2, width=2, kind="colour")),),
        state=np.stack([episode_index, frame_index], 1).astype(np.float32),
        action=action.astype(np.float32),
        episode_index=episode_index,
        frame_index=frame_index,
        starts=starts,
        lengths=lengths_array,
        instructions=instructions,
        task_index=np.array([instructions.index(text) for text in texts], np.int64),
        seeds=np.arange(len(lengths)),
        layout=Layout(root=Path("nowhere")),
    )


def make_frames(recorded: Demonstrations, cameras: int = 1, size: int = 2) -> NDArray[np.uint8]:
    """Pictures `(cameras, F, size, size, 3)` whose pixels are (row % 256, row // 256, camera)."""
    frames = np.zeros((cameras, len(recorded), size, size, 3), np.uint8)
    rows = np.arange(len(recorded))
    frames[..., 0], frames[..., 1] = (rows % 256)[:, None, None], (rows // 256)[:, None, None]
    frames[..., 2] = np.arange(cameras)[:, None, None, None]
    return frames


def byte_tokens(instructions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """UTF-8 bytes as token ids, padded with 0."""
    encoded = [list(text.encode()) for text in instructions]
    width = max(map(len, encoded))
    ids = np.array([row + [0] * (width - len(row)) for row in encoded])
    return ids, ids > 0


def edit_info(root: Path, **changes: object) -> None:
    """Change what a dataset says of itself."""
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_column(root: Path, column: str, change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> None:
    """Change a column of a dataset's only data file, or of its table of episodes; `kind` is its type from then on."""
    folder = "meta/episodes" if column.startswith("videos/") else "data"
    (path,) = (root / folder).rglob("file-000.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    values = pa.array(change(table[column].to_pylist()), type=kind or table.schema.field(place).type)
    pq.write_table(table.set_column(place, column, values), path)


def rename_features(root: Path, **names: str) -> None:
    """Give features (dots written as `__`) other names, everywhere in an image dataset."""
    new = {old.replace("__", "."): name for old, name in names.items()}
    info = json.loads((root / "meta" / "info.json").read_text())
    edit_info(root, features={new.get(name, name): feature for name, feature in info["features"].items()})
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([new.get(name, name) for name in table.column_names]), path)


def encoded(picture: NDArray[Any]) -> dict[str, bytes | str | None]:
    """A picture as LeRobot keeps it in a parquet file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def replace_pictures(root: Path, camera: str, picture: NDArray[Any]) -> None:
    """Let a camera of an image dataset show this picture in every frame."""
    edit_column(root, camera, lambda rows: [encoded(picture) for _ in rows])


def make_images(
    root: Path,
    cameras: Mapping[str, NDArray[Any]],
    lengths: Sequence[int] = (6, 5),
    state: str = STATE_KEY,
    action: str = ACTION_KEY,
) -> Path:
    """A dataset of LeRobot's own making, pictures in the parquet files: each camera shows the same picture in every frame."""
    features: dict[str, Any] = {key: {"dtype": "float32", "shape": (4,), "names": None} for key in (state, action)}
    for key, picture in cameras.items():
        features[key] = {"dtype": "image", "shape": picture.shape, "names": ["height", "width", "channels"]}
    made = LeRobotDataset.create("local/images", 10, features, root=root, use_videos=False)
    for episode, length in enumerate(lengths):
        for t in range(length):
            vector = np.array([episode, t, 1, 2], np.float32)
            made.add_frame({state: vector, action: -vector, "task": "wait", **cameras})
        made.save_episode()
    made.finalize()
    return root
