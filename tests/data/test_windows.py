import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libra_ray.config import ActionConfig, DataConfig, HierarchyConfig
from libra_ray.data.splits import split_episodes
from libra_ray.data.transforms import Pipeline, compute_stats
from libra_ray.data.windows import Windows
from tests.data.builders import byte_tokens, make_frames, make_recorded


def make_windows(recorded, *, horizon=3, chunks=2, history=1, staleness=0, episodes=None, cameras=1):
    episodes = np.arange(len(recorded.lengths)) if episodes is None else np.asarray(episodes)
    pipeline = Pipeline(compute_stats(recorded, np.arange(len(recorded))), "min_max")
    action, data = ActionConfig(horizon=horizon, chunks=chunks), DataConfig(history=history)
    frames = make_frames(recorded, cameras)
    return Windows(recorded, frames, pipeline, action, data, episodes, byte_tokens, staleness, HierarchyConfig())


def rows_of(images):
    """The rows and cameras that pictures made by `make_frames` name, each `(B, T)`."""
    pixel = images[..., 0, 0].long()
    return (pixel[..., 0] + 256 * pixel[..., 1]).numpy(), pixel[..., 2].numpy()


layouts = st.fixed_dictionaries(
    {
        "horizon": st.integers(1, 4),
        "chunks": st.integers(1, 4),
        "history": st.integers(1, 3),
        "staleness": st.integers(-1, 9),
        "cameras": st.integers(1, 2),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=5), layouts, st.integers(0, 2**16))
def test_no_window_crosses_an_episode(lengths, layout, seed):
    recorded = make_recorded(lengths)
    windows = make_windows(recorded, **layout)
    batch = windows.batch(np.arange(len(windows)), np.random.default_rng(seed))
    history, plan_steps = layout["history"], layout["horizon"] * layout["chunks"]
    now = np.arange(len(recorded))
    episode = recorded.episode_index
    first, last = recorded.starts[episode], (recorded.starts + recorded.lengths)[episode] - 1
    offset = batch.offset.numpy()

    assert (offset >= 0).all()
    assert (offset <= plan_steps - (layout["horizon"] if layout["staleness"] >= 0 else 0)).all()
    assert (now + offset <= last).all()
    if layout["staleness"] == 0:
        assert (offset % layout["horizon"] == 0).all()

    for images, present in ((batch.plan_images, now), (batch.images, now + offset)):
        rows, cameras = rows_of(images)
        ages = np.tile(np.arange(history - 1, -1, -1), layout["cameras"])
        np.testing.assert_array_equal(rows, np.maximum(present[:, None] - ages, first[:, None]))
        np.testing.assert_array_equal(cameras, np.tile(np.repeat(np.arange(layout["cameras"]), history), (len(now), 1)))

    future = now[:, None] + np.arange(plan_steps + layout["horizon"])
    np.testing.assert_array_equal(batch.action_mask.numpy(), future <= last[:, None])
    raw = np.minimum(future, last[:, None])
    pipeline = Pipeline(compute_stats(recorded, now), "min_max")
    np.testing.assert_array_equal(batch.actions.numpy(), pipeline.inputs_action(recorded.action[raw]))
    np.testing.assert_array_equal(batch.plan_state.numpy(), pipeline.inputs_state(recorded.state[now]))
    np.testing.assert_array_equal(batch.state.numpy(), pipeline.inputs_state(recorded.state[now + offset]))


def test_every_offset_occurs():
    windows = make_windows(make_recorded([40]), horizon=3, chunks=3)
    drawn = windows.batch(np.zeros(200, np.int64), np.random.default_rng(0)).offset
    assert sorted(set(drawn.tolist())) == [0, 3, 6]
    late = make_windows(make_recorded([40]), horizon=3, chunks=3, staleness=2)
    drawn = late.batch(np.zeros(500, np.int64), np.random.default_rng(0)).offset
    assert sorted(set(drawn.tolist())) == [0, 1, 2, 3, 4, 5, 6]
    any_age = make_windows(make_recorded([40]), horizon=3, chunks=3, staleness=-1)
    drawn = any_age.batch(np.zeros(500, np.int64), np.random.default_rng(0)).offset
    assert sorted(set(drawn.tolist())) == list(range(10)), "from the first picture to the plan's end"


def test_only_the_chosen_episodes_and_their_instruction():
    recorded = make_recorded([4, 5, 6], tasks=["push", "open the door", "push"])
    windows = make_windows(recorded, episodes=[2, 1])
    assert len(windows) == 11
    batch = windows.batch(np.arange(11), np.random.default_rng(0))
    rows, _ = rows_of(batch.plan_images)
    assert rows[:, 0].tolist() == [*range(9, 15), *range(4, 9)]
    texts = [bytes(ids[mask].tolist()).decode() for ids, mask in zip(batch.text, batch.text_mask, strict=True)]
    assert texts == ["push"] * 6 + ["open the door"] * 5


def test_every_window_has_its_own_frames_instruction():
    """An instruction may change within an episode; the plan goes on into the next one's steps."""
    recorded = make_recorded([4, 3], tasks=[["open", "open", "close", "close"], ["close", "wait", "open"]])
    windows = make_windows(recorded, episodes=[1, 0], chunks=2)
    batch = windows.batch(np.arange(7), np.random.default_rng(0))
    texts = [bytes(ids[mask].tolist()).decode() for ids, mask in zip(batch.text, batch.text_mask, strict=True)]
    assert texts == ["close", "wait", "open", "open", "open", "close", "close"]
    assert batch.action_mask[3].tolist() == [True] * 4 + [False] * 5, "the plan of the first frame covers both instructions"


def test_pictures_lie_as_convolutions_want_them():
    recorded = make_recorded([9])
    images = make_windows(recorded, cameras=2, history=2).batch(np.arange(4), np.random.default_rng(0)).images
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (4, 4, 3, 2, 2))
    assert images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_refusals():
    recorded = make_recorded([5])
    with pytest.raises(ValueError, match="no episodes to make windows of"):
        make_windows(recorded, episodes=[])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["open", "close", "push"]), min_size=1, max_size=40),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_the_split_is_by_episode_stratified_and_repeatable(tasks, share, seed):
    recorded = make_recorded([2] * len(tasks), tasks=tasks)
    split = split_episodes(recorded, share, seed)
    again = split_episodes(recorded, share, seed)
    np.testing.assert_array_equal(split.holdout, again.holdout)
    assert sorted([*split.train, *split.holdout]) == list(range(len(tasks)))
    for task in set(tasks):
        episodes = [e for e, t in enumerate(tasks) if t == task]
        held = len(set(episodes) & set(split.holdout.tolist()))
        assert held < len(episodes)
        assert (held > 0) == (share > 0 and len(episodes) > 1)
        assert held == pytest.approx(share * len(episodes), abs=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4), min_size=1, max_size=30),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_with_several_instructions_in_an_episode_each_keeps_one_to_train_on(tasks, share, seed):
    recorded = make_recorded([len(task) for task in tasks], tasks=tasks)
    split = split_episodes(recorded, share, seed)
    assert sorted([*split.train, *split.holdout]) == list(range(len(tasks)))
    assert {text for e in split.train for text in tasks[e]} == {text for task in tasks for text in task}
    for text in recorded.instructions:
        episodes = {e for e, task in enumerate(tasks) if text in task}
        held = episodes & set(split.holdout.tolist())
        spare = [e for e in episodes - held if all(sum(t in tasks[o] for o in split.train) > 1 for t in tasks[e])]
        assert len(held) >= min(max(1, round(share * len(episodes))), len(episodes) - 1) or not share or not spare
        assert not held or share


def test_the_split_depends_on_the_seed_and_refuses_nonsense():
    recorded = make_recorded([2] * 40)
    assert split_episodes(recorded, 0.3, 0).holdout.tolist() != split_episodes(recorded, 0.3, 1).holdout.tolist()
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        split_episodes(recorded, 1.5, 0)


def test_gathering_starts_no_pool_of_threads():
    recorded = make_recorded([300, 300])
    windows = make_windows(recorded)
    counts, threads = [], torch.get_num_threads()

    def gather():
        counts.append(len(list(Path("/proc/self/task").iterdir())))
        windows.batch(np.arange(512), np.random.default_rng(0))
        counts.append(len(list(Path("/proc/self/task").iterdir())))

    try:
        torch.set_num_threads(4)
        thread = threading.Thread(target=gather)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert counts[0] == counts[1], "two pools on the same cores stop spinning: training would be a third slower"
