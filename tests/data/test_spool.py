import io
from dataclasses import replace

import numpy as np
import pytest

from libra_ray.data.spool import load_episode, save_episode
from tests.data.builders import make_episode


def assert_same(a, b):
    assert (a.task, a.instruction, a.seed, a.success, a.error) == (b.task, b.instruction, b.seed, b.success, b.error)
    assert len(a.steps) == len(b.steps)
    for x, y in zip(a.steps, b.steps, strict=True):
        assert (x.reward, x.success) == (y.reward, y.success)
        assert (x.action.intent_age_steps, x.action.held) == (y.action.intent_age_steps, y.action.held)
        assert (x.observation.instruction, x.observation.step) == (y.observation.instruction, y.observation.step)
        assert list(x.observation.images) == list(y.observation.images)
        arrays = [
            (x.observation.state, y.observation.state),
            (x.action.value, y.action.value),
            (x.action.label, y.action.label),
        ]
        arrays += [(x.observation.images[key], y.observation.images[key]) for key in x.observation.images]
        for p, q in arrays:
            assert p.dtype == q.dtype
            np.testing.assert_array_equal(p, q)
    np.testing.assert_array_equal(np.array(a.frames), np.array(b.frames))


def without_images(episode):
    steps = [replace(s, observation=replace(s.observation, images={})) for s in episode.steps]
    return replace(episode, steps=steps, success=False, error="ValueError: fell over")


def renamed(episode):
    steps = [replace(s, observation=replace(s.observation, instruction=f"step {i}")) for i, s in enumerate(episode.steps)]
    return replace(episode, steps=steps)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e,
        without_images,
        renamed,
        lambda e: replace(e, frames=[s.observation.images["observation.image"] for s in e.steps]),
    ],
    ids=["plain", "without images", "own instructions", "with frames"],
)
def test_an_episode_comes_back_as_it_was(tmp_path, change):
    episode = change(make_episode(cameras=("observation.image", "observation.images.wrist")))
    path = tmp_path / "new" / "episode.npz"
    save_episode(path, episode)
    assert_same(load_episode(path), episode)
    assert [p.name for p in path.parent.iterdir()] == ["episode.npz"]


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_episode(tmp_path / "evil.npz")


def test_a_writer_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def half_written(file: io.BufferedWriter, **_):
        file.write(b"PK")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_episode(tmp_path / "episode.npz", make_episode())
    assert not (tmp_path / "episode.npz").exists()


def test_refusals_say_what_is_wrong(tmp_path):
    episode = make_episode()
    with pytest.raises(ValueError, match="has no steps"):
        save_episode(tmp_path / "e.npz", replace(episode, steps=()))
    mixed = [*episode.steps[:3], *without_images(episode).steps[3:]]
    with pytest.raises(ValueError, match="every step must carry the cameras"):
        save_episode(tmp_path / "e.npz", replace(episode, steps=mixed))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="not a spooled episode"):
        load_episode(tmp_path / "other.npz")


@pytest.mark.parametrize("cut", [0, 40, 1000, -30])
def test_a_damaged_one_is_named_with_the_remedy(tmp_path, cut):
    path = tmp_path / "7.npz"
    save_episode(path, make_episode())
    path.write_bytes(path.read_bytes()[:cut] if cut >= 0 else bytes(100) + path.read_bytes()[100:cut])
    with pytest.raises(
        ValueError, match=r"7\.npz is not a spooled episode \(.*; remove it, and it is recorded again"
    ) as refused:
        load_episode(path)
    assert "\n" not in str(refused.value)
