"""One small real dataset on disk for all data tests: six episodes of two tasks, two cameras."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from libra_ray.data.dataset import Recorded, open_dataset, write_dataset
from libra_ray.types import IMAGE_KEY, Episode
from tests.data.builders import make_episode

CAMERAS = (IMAGE_KEY, "observation.images.wrist")


@pytest.fixture(scope="session")
def episodes() -> Sequence[Episode]:
    texts = ("open the drawer", "press the button")
    return [make_episode(length=9 + seed, seed=seed, instruction=texts[seed % 2], cameras=CAMERAS) for seed in range(6)]


@pytest.fixture(scope="session")
def dataset(episodes, tmp_path_factory) -> Path:
    return write_dataset(episodes, tmp_path_factory.mktemp("data") / "demos", fps=20, robot_type="sawyer")


@pytest.fixture(scope="session")
def recorded(dataset) -> Recorded:
    return open_dataset(dataset)
