"""A data set is known again wherever it lies, and not when anything that is trained on has changed."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from libra_ray.data.dataset import open_dataset, write_dataset
from libra_ray.data.fingerprint import Fingerprint
from tests.data.builders import make_episode


@pytest.fixture(scope="module")
def before(recorded) -> Fingerprint:
    return Fingerprint.of(recorded)


def test_a_copy_elsewhere_is_the_same(before, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "other name")
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    assert Fingerprint.of(open_dataset(copy)) == before
    before.check_unchanged(Fingerprint.of(open_dataset(copy)), copy)


@pytest.mark.parametrize("name", ["state", "action", "task_index", "fps", "cameras", "instructions"])
def test_whatever_is_trained_on_counts(before, recorded, name):
    value = getattr(recorded, name)
    if isinstance(value, np.ndarray):
        value = value.copy()
        value.flat[7] += 1
    else:
        value = value[::-1] if isinstance(value, tuple) else value + 0.5
    now = Fingerprint.of(replace(recorded, **{name: value}))
    assert (now.episodes, now.frames) == (before.episodes, before.frames)
    with pytest.raises(ValueError, match=rf"not the one that .* began with: it has other content in as many \({now.frames}\)"):
        before.check_unchanged(now, recorded.root)


def test_other_pictures_are_noticed(before, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    with next((copy / "videos").rglob("*.mp4")).open("ab") as video:
        video.write(b"more")
    with pytest.raises(ValueError, match="other content"):
        before.check_unchanged(Fingerprint.of(open_dataset(copy)), copy)


def test_growth_is_said_in_numbers(before, episodes, tmp_path):
    more = [*episodes, make_episode(length=5, cameras=tuple(episodes[0].steps[0].observation.images))]
    root = write_dataset(more, tmp_path / "d", fps=20)
    now = Fingerprint.of(open_dataset(root))
    with pytest.raises(ValueError, match=r"7 episodes \(then 6\), 74 frames \(then 69\); give --fresh .* or another --name"):
        before.check_unchanged(now, root)
