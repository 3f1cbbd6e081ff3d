"""What watching our data path in a terminal shows: nothing. And what it wrote there, as the doctor sees it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from libra_ray import config as configuration
from libra_ray.config import Config
from libra_ray.doctor.products import try_dataset

ROOT = Path(__file__).parents[2]
SCRIPT = """
import runpy, sys
from pathlib import Path
from libra_ray.data.dataset import open_dataset, write_dataset
from libra_ray.data.frames import frame_cache
folder = Path(sys.argv[1])
make_episode = runpy.run_path("tests/data/builders.py")["make_episode"]
episodes = [make_episode(length=9, seed=seed) for seed in range(2)]
recorded = open_dataset(write_dataset(episodes, folder / "demos", fps=20))
assert frame_cache(recorded, folder / "frames", 16).shape[1] == 18
assert "torchcodec" not in sys.modules, "importing it fails where FFmpeg is not installed, in forty lines"
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    """A data set, and what was said while it was written, opened and decoded by a fresh process."""
    folder = tmp_path_factory.mktemp("quiet")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "demos", done.stdout + done.stderr


def test_recording_opening_and_decoding_say_nothing(written):
    assert written[1] == ""


def test_the_doctor_opens_it_as_training_does(written):
    found, *_ = try_dataset(configuration.to_json(Config()), str(written[0]))
    assert "2 episodes, 18 frames at 20 Hz, observation.image, state" in found


def test_the_doctor_sees_a_video_that_cannot_be_read(written, tmp_path):
    folder = shutil.copytree(written[0], tmp_path / "demos")
    [video] = folder.rglob("*.mp4")
    video.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"file-000\.mp4 cannot be read as a video"):
        try_dataset(configuration.to_json(Config()), str(folder))
