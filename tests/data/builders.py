"""Small synthetic episodes (a coloured square moves over a still background) and datasets that name their rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from libra_ray.data.dataset import Recorded
from libra_ray.types import IMAGE_KEY, Action, Episode, Observation, Step


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


def make_recorded(lengths: Sequence[int], tasks: Sequence[str] | Sequence[Sequence[str]] | None = None) -> Recorded:
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
    return Recorded(
        root=Path("nowhere"),
        fps=10,
        features={},
        image_keys=(IMAGE_KEY,),
        state=np.stack([episode_index, frame_index], 1).astype(np.float32),
        action=action.astype(np.float32),
        episode_index=episode_index,
        frame_index=frame_index,
        starts=starts,
        lengths=lengths_array,
        instructions=instructions,
        task_index=np.array([instructions.index(text) for text in texts], np.int64),
        seeds=np.arange(len(lengths)),
    )


def make_frames(recorded: Recorded, cameras: int = 1, size: int = 2) -> NDArray[np.uint8]:
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
