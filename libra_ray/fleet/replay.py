"""What stub robots show: recorded episodes of a data set, or synthetic observations of the shape that a server asks for."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from libra_ray.client.protocol import Handshake, Reply
from libra_ray.config import DataConfig, read_saved
from libra_ray.data.dataset import Demonstrations, open_dataset
from libra_ray.data.frames import frame_cache
from libra_ray.fleet.robots import StubObservation
from libra_ray.types import STATE_KEY, Observation

PICTURES = 4
"""Different synthetic observations per robot."""
CHUNKS_PER_EPISODE = 100


def synthetic(server: Handshake, robot: int) -> Iterator[StubObservation]:
    """Endless episodes of random pictures and states that fit the server, no two robots' alike.

    The first number of every state is `identity(robot)`, for servers that give it back (`reflects`).
    """
    rng = np.random.default_rng(robot)
    shown = [_random(server, robot, rng) for _ in range(PICTURES)]
    for chunk in count():
        images, state = shown[chunk % PICTURES]
        step = chunk % CHUNKS_PER_EPISODE * server.execute_steps
        words = server.instructions[robot % len(server.instructions)] if server.instructions else ""
        past = (images,) * (server.history - 1) if step else ()
        observation = Observation(images=images, state=state, instruction=words, step=step, past=past)
        yield StubObservation(observation=observation, begins=step == 0)


def identity(robot: int) -> float:
    """A number in [-1, 1) for each of 4,096 robots, exact in float32."""
    return robot % 4096 / 2048 - 1


def reflects(observation: Observation, reply: Reply) -> bool:
    """Whether the first action's first number is the observation's identity: what a stub server of tests sends back."""
    return bool(reply.actions[0, 0] == observation.state[0])


def open_recording(server: Handshake, source: Path) -> "Recording":
    """The recording of a run (its own, or the one it was trained on) or in a data set folder, checked against the server.

    Raises:
        ValueError: there is no data set, or the server needs other cameras or another state.
    """
    config = source / "config.json"
    settings = read_saved(config).data if config.is_file() else DataConfig()
    folder = Path(settings.root) if settings.root else source / "dataset" if (source / "dataset").is_dir() else source
    state_dim = int(server.observation[STATE_KEY]["shape"][0])
    data = open_dataset(folder, replace(settings, cameras=server.cameras), state_dim=state_dim)
    if folder != source:
        return Recording.open(data, source / "frames", server)
    # A data set that is not a run's has no place for decoded pictures beside it; an open file outlives its folder.
    with tempfile.TemporaryDirectory() as scratch:
        return Recording.open(data, Path(scratch), server)


class Recording:
    """A data set as stub robots show it.

    Args:
        data: its numbers.
        pictures: `(cameras, F, height, width, 3)` uint8.
        server: which cameras, how long a history, and how many control steps between two requests.
    """

    def __init__(self, data: Demonstrations, pictures: NDArray[np.uint8], server: Handshake) -> None:
        self._data, self._pictures, self._server = data, pictures, server
        self._cameras = {name: data.image_keys.index(name) for name in server.cameras}

    @classmethod
    def open(cls, data: Demonstrations, frames: Path, server: Handshake) -> Self:
        """With the pictures decoded in the cache folder `frames`, at the server's size."""
        size = int(server.observation[server.cameras[0]]["shape"][0]) if server.cameras else 16
        return cls(data, frame_cache(data, frames, size), server)

    def robot(self, number: int, robots: int) -> Iterator[StubObservation]:
        """Endless episodes of one robot of a fleet; different robots begin with different ones."""
        for episode in count(number, robots):
            index = episode % len(self._data.lengths)
            for step in range(0, int(self._data.lengths[index]), self._server.execute_steps):
                yield StubObservation(observation=self._observation(index, step), begins=step == 0)

    def _observation(self, episode: int, step: int) -> Observation:
        row = int(self._data.starts[episode]) + step
        before = range(row - min(step, self._server.history - 1), row)
        return Observation(
            images=self._images(row),
            state=self._data.state[row],
            instruction=self._data.instruction(row),
            step=step,
            past=tuple(self._images(r) for r in before),
        )

    def _images(self, row: int) -> Mapping[str, NDArray[np.uint8]]:
        return {name: np.ascontiguousarray(self._pictures[camera, row]) for name, camera in self._cameras.items()}


def _random(
    server: Handshake, robot: int, rng: np.random.Generator
) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32]]:
    def shape(name: str) -> tuple[int, ...]:
        return tuple(map(int, server.observation[name]["shape"]))

    images = {name: rng.integers(0, 256, shape(name), dtype=np.uint8) for name in server.cameras}
    state = rng.uniform(-1, 1, shape(STATE_KEY)).astype(np.float32)
    state[:1] = identity(robot)
    return images, state
