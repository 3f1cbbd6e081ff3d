"""One small real dataset on disk for all data tests: six episodes of two tasks, two cameras."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from libra_ray.data.dataset import Demonstrations, open_dataset, write_dataset
from libra_ray.types import IMAGE_KEY, Episode
from tests.data.builders import make_episode, make_images, replace_pictures

CAMERAS = (IMAGE_KEY, "observation.images.wrist")


@pytest.fixture(scope="session")
def episodes() -> Sequence[Episode]:
    texts = ("open the drawer", "press the button")
    return [make_episode(length=9 + seed, seed=seed, instruction=texts[seed % 2], cameras=CAMERAS) for seed in range(6)]


@pytest.fixture(scope="session")
def dataset(episodes, tmp_path_factory) -> Path:
    return write_dataset(episodes, tmp_path_factory.mktemp("data") / "demos", fps=20, robot_type="sawyer")


@pytest.fixture(scope="session")
def recorded(dataset) -> Demonstrations:
    return open_dataset(dataset)


@pytest.fixture(scope="session")
def four_cameras(tmp_path_factory) -> Path:
    """Pictures in the parquet files: colour, with a transparency, greyscale, and depth in millimetres."""
    rng = np.random.default_rng(0)
    pictures = {
        "observation.images.top": rng.integers(0, 255, (24, 32, 3)).astype(np.uint8),
        "observation.images.clear": rng.integers(0, 255, (24, 32, 3)).astype(np.uint8),
        "observation.images.grey": rng.integers(0, 255, (24, 32, 3)).astype(np.uint8),
        "observation.images.depth": np.linspace(400, 4000, 24 * 32).astype(np.uint16).reshape(24, 32, 1),
    }
    root = make_images(tmp_path_factory.mktemp("images") / "demos", pictures)
    # LeRobot reads such pictures, but does not write them.
    replace_pictures(root, "observation.images.clear", np.full((24, 32, 4), 90, np.uint8))
    replace_pictures(root, "observation.images.grey", rng.integers(0, 255, (24, 32)).astype(np.uint8))
    return root


@pytest.fixture
def images(four_cameras, tmp_path) -> Path:
    """A copy to be spoiled."""
    return shutil.copytree(four_cameras, tmp_path / "images")
