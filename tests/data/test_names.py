"""Features under other names: the refusal holds the very line to type, and with it the data set is the same."""

import re
import shlex

import numpy as np
import pytest

from libra_ray.config import DataConfig, override, preset
from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import open_dataset
from libra_ray.data.frames import frame_cache
from libra_ray.types import ACTION_KEY, STATE_KEY
from tests.data.builders import rename_features

TOP = "observation.images.top"


def told(root, *keys):
    with pytest.raises(DatasetError) as refused:
        open_dataset(root, DataConfig(keys=keys))
    return str(refused.value)


def test_the_line_that_is_told_is_the_line_that_works(images, four_cameras, tmp_path):
    rename_features(images, action="actions", observation__state="robot/state", observation__images__top="image")
    line = re.search(r"--data\.keys \S+$", told(images)).group()
    assert line == "--data.keys action=actions,observation.state=robot/state"
    option, value = shlex.split(line)
    data = override(preset("debug"), {option.removeprefix("--"): f"{value},{TOP}=image"}).data
    recorded, before = open_dataset(images, data), open_dataset(four_cameras)
    assert recorded.image_keys == before.image_keys
    np.testing.assert_array_equal(recorded.action, before.action)
    np.testing.assert_array_equal(recorded.state, before.state)
    frames = [frame_cache(found, tmp_path / "cache", 16) for found in (recorded, before)]
    np.testing.assert_array_equal(*frames)


def test_what_was_typed_already_is_in_the_line(images):
    rename_features(images, action="actions", observation__state="state")
    assert told(images, "action=actions").endswith("--data.keys action=actions,observation.state=state")


def test_nothing_alike_is_said_so(images):
    rename_features(images, action="xyz")
    assert "has no feature 'action'; it has" in told(images)
    assert told(images).endswith("--data.keys action=NAME")


def test_a_name_that_is_not_there(images):
    assert re.search(r"no feature 'acton', did you mean action\?", told(images, "observation.state=acton"))


def test_a_feature_in_the_place_of_another(four_cameras):
    recorded = open_dataset(four_cameras, DataConfig(keys=(f"{ACTION_KEY}={STATE_KEY}", f"{STATE_KEY}={ACTION_KEY}")))
    before = open_dataset(four_cameras)
    np.testing.assert_array_equal(recorded.action, before.state)
    np.testing.assert_array_equal(recorded.state, before.action)


def test_bookkeeping_under_other_names(images, four_cameras, tmp_path):
    rename_features(images, index="row", task_index="task", seed="x")
    recorded = open_dataset(images, DataConfig(keys=("index=row", "task_index=task")))
    np.testing.assert_array_equal(recorded.action, open_dataset(four_cameras).action)
    assert frame_cache(recorded, tmp_path / "cache", 16).any()


def test_renamed_videos(dataset, recorded, tmp_path):
    data = DataConfig(keys=("observation.images.front=observation.image",), cameras=("observation.images.front",))
    front = open_dataset(dataset, data)
    assert front.image_keys == ("observation.images.front",)
    np.testing.assert_array_equal(
        frame_cache(front, tmp_path / "cache", 32)[0], frame_cache(recorded, tmp_path / "cache", 32)[0]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.keys": "action"}, "pairs NEW=OLD, e.g. action=actions"),
        ({"data.keys": "=a"}, "pairs NEW=OLD"),
        ({"data.keys": "action=a=b"}, "pairs NEW=OLD"),
        ({"data.keys": "action=a,action=b"}, "only once"),
        ({"data.keys": "action=a,observation.state=a"}, "only once"),
        ({"data.cameras": "a,a"}, "each camera only once"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        override(preset("debug"), settings)
