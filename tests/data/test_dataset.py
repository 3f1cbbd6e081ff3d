"""Episodes into a dataset and back, and what LeRobot itself makes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata

from libra_ray.data.dataset import DatasetWriter, open_dataset, write_dataset
from libra_ray.data.frames import frame_cache
from libra_ray.data.pictures import picture_statistics
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY
from tests.data.builders import make_episode
from tests.data.conftest import CAMERAS


def test_numbers_come_back_exactly(episodes, recorded):
    for index, episode in enumerate(episodes):
        rows = recorded.rows([index])
        np.testing.assert_array_equal(recorded.state[rows], [s.observation.state for s in episode.steps])
        np.testing.assert_array_equal(recorded.action[rows], [s.action.label for s in episode.steps])
        np.testing.assert_array_equal(recorded.frame_index[rows], np.arange(len(episode.steps)))
        assert set(recorded.episode_index[rows]) == {index}
        assert recorded.instruction(recorded.starts[index]) == episode.instruction
        assert recorded.seeds[index] == episode.seed
    assert len(recorded) == sum(len(e.steps) for e in episodes)
    assert recorded.image_keys == CAMERAS
    assert recorded.fps == 20


def test_instructions_are_those_of_the_frames(tmp_path):
    """As LeRobot keeps them: in `task_index`, which may change within an episode."""
    told = [["reach", "grasp", "grasp", "lift"], ["grasp", "wait"], ["lift"]]
    made = [make_episode(length=len(texts), seed=n, instruction=texts) for n, texts in enumerate(told)]
    root = write_dataset(made, tmp_path / "d", fps=10)
    recorded = open_dataset(root)
    assert recorded.instructions == ("grasp", "lift", "reach", "wait")
    assert [recorded.instruction(row) for row in range(7)] == [text for texts in told for text in texts]
    loaded = LeRobotDataset("local/d", root=root)
    assert [loaded[row]["task"] for row in range(7)] == [text for texts in told for text in texts]
    assert loaded.meta.episodes["tasks"] == [["reach", "grasp", "lift"], ["grasp", "wait"], ["lift"]]


def test_pictures_stay_good(episodes, recorded, tmp_path):
    frames = frame_cache(recorded, tmp_path, 32)
    for camera, key in enumerate(recorded.image_keys):
        original = np.concatenate([[s.observation.images[key] for s in e.steps] for e in episodes])
        error = ((original.astype(float) - frames[camera]) ** 2).mean((1, 2, 3))
        assert (10 * np.log10(255**2 / error)).min() > 38


def test_lerobot_loads_it(dataset, recorded):
    loaded = LeRobotDataset("local/demos", root=dataset, delta_timestamps={ACTION_KEY: [0, 0.05, 0.1]})
    assert (loaded.num_episodes, loaded.num_frames, loaded.meta.robot_type) == (6, len(recorded), "sawyer")
    batch = next(iter(torch.utils.data.DataLoader(loaded, batch_size=5, shuffle=False)))
    assert batch[IMAGE_KEY].shape == (5, 3, 32, 32)
    np.testing.assert_array_equal(batch[STATE_KEY].numpy(), recorded.state[:5])
    np.testing.assert_array_equal(batch[ACTION_KEY][:, 2].numpy(), recorded.action[2:7])
    assert batch["task"] == ["open the drawer"] * 5
    stats = loaded.meta.stats
    np.testing.assert_allclose(stats[ACTION_KEY]["max"], recorded.action.max(0))
    np.testing.assert_allclose(stats[STATE_KEY]["mean"], recorded.state.mean(0), rtol=1e-5)
    assert stats[IMAGE_KEY]["mean"].shape == (3, 1, 1)
    assert (stats[IMAGE_KEY]["max"] <= 1).all()


def test_lerobot_trains_on_it(dataset):
    """LeRobot's own policy, processors and loader, one optimiser step; no download."""
    from lerobot.configs.types import FeatureType
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils.feature_utils import dataset_to_policy_features

    meta = LeRobotDatasetMetadata("local/demos", root=dataset)
    features = dataset_to_policy_features(meta.features)
    outputs = {k: f for k, f in features.items() if f.type is FeatureType.ACTION}
    assert list(outputs) == [ACTION_KEY]
    config = ACTConfig(
        input_features={k: f for k, f in features.items() if k not in outputs},
        output_features=outputs,
        chunk_size=4,
        n_action_steps=4,
        dim_model=32,
        dim_feedforward=32,
        n_heads=2,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        pretrained_backbone_weights=None,
        device="cpu",
    )
    policy = ACTPolicy(config)
    preprocess, _ = make_pre_post_processors(config, dataset_stats=meta.stats)
    loaded = LeRobotDataset("local/demos", root=dataset, delta_timestamps={ACTION_KEY: [i / meta.fps for i in range(4)]})
    batch = preprocess(next(iter(torch.utils.data.DataLoader(loaded, batch_size=4))))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    loss, _ = policy(batch)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert torch.isfinite(policy(batch)[0])


def test_a_folder_without_finalize_is_never_there(tmp_path):
    root, first = tmp_path / "demos", make_episode(seed=3)

    def interrupted():
        yield first
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(interrupted(), root, fps=10)
    assert not root.exists()
    with pytest.raises(ValueError, match=r"demos\.partial is an unfinished one"):
        open_dataset(root)

    write_dataset([first, make_episode(seed=4)], root, fps=10)
    assert open_dataset(root).seeds.tolist() == [3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["demos"]
    with pytest.raises(ValueError, match="exists already"):
        write_dataset([first], root, fps=10)


def test_videos_are_cut_into_files_of_limited_size(tmp_path):
    shapes = {IMAGE_KEY: (32, 32, 3)}
    writer = DatasetWriter(tmp_path / "d", fps=10, image_shapes=shapes, state_dim=4, action_dim=4)
    writer._meta.info.video_files_size_in_mb = 0.001
    with writer:
        for seed in range(3):
            writer.add(make_episode(seed=seed))
    assert len(list((tmp_path / "d" / "videos").rglob("*.mp4"))) == 3
    recorded = open_dataset(tmp_path / "d")
    frames = frame_cache(recorded, tmp_path / "cache", 32)
    original = make_episode(seed=2).steps[-1].observation.images[IMAGE_KEY]
    assert np.abs(original.astype(int) - frames[0, -1]).mean() < 3
    loaded = LeRobotDataset("local/d", root=tmp_path / "d")
    np.testing.assert_array_equal((loaded[35][IMAGE_KEY].numpy() * 255).round().transpose(1, 2, 0), frames[0, 35])


def test_statistics_of_pictures_are_lerobots():
    from lerobot.datasets import get_feature_stats

    pictures = np.stack([s.observation.images[IMAGE_KEY] for s in make_episode().steps])
    theirs = get_feature_stats(pictures.transpose(0, 3, 1, 2), axis=(0, 2, 3), keepdims=True)
    ours = picture_statistics(pictures)
    assert ours.keys() == theirs.keys()
    assert ours["count"].tolist() == theirs["count"].tolist() == [12]
    for name in ours.keys() - {"count"}:
        # Its quantiles are edges of cells.
        np.testing.assert_allclose(ours[name], np.squeeze(theirs[name] / 255, axis=0), atol=1 / 255 if name[0] == "q" else 1e-4)


@pytest.mark.parametrize("codec", ["h264", "hevc", "libsvtav1"])
def test_codecs(tmp_path, codec):
    episodes = [make_episode(size=64, seed=seed, length=length) for seed, length in enumerate((12, 1, 23))]
    recorded = open_dataset(write_dataset(episodes, tmp_path / "d", fps=10, video_codec=codec))
    frames = frame_cache(recorded, tmp_path / "cache", 64)
    original = np.stack([s.observation.images[IMAGE_KEY] for each in episodes for s in each.steps])
    assert np.abs(original.astype(int) - frames[0]).mean((1, 2, 3)).max() < 6


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="record at least one"):
        write_dataset([], tmp_path / "d", fps=10)
    with pytest.raises(ValueError, match=r"h264.*hevc"):
        write_dataset([make_episode()], tmp_path / "d", fps=10, video_codec="betamax")
    with pytest.raises(ValueError, match=r"observation\.state has shape \(5,\), expected \(4,\)"):
        write_dataset([make_episode(), make_episode(state_dim=5)], tmp_path / "d", fps=10)
    with pytest.raises(ValueError, match=r"observation\.image is uint8 \(64, 64, 3\), expected uint8 \(32, 32, 3\)"):
        write_dataset([make_episode(), make_episode(size=64)], tmp_path / "d", fps=10)
    with pytest.raises(ValueError, match="has no steps"):
        write_dataset([make_episode(), replace(make_episode(), steps=())], tmp_path / "d", fps=10)
    assert not (tmp_path / "d").exists()
