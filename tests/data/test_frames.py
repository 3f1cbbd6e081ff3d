import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset
from PIL import Image

from libra_ray.data import frames as frames_module
from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import open_dataset
from libra_ray.data.frames import frame_cache, resize
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY


def as_uint8(tensor):
    return (tensor.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)


def test_the_cache_holds_what_lerobot_decodes(dataset, recorded, tmp_path):
    frames = frame_cache(recorded, tmp_path, 32)
    assert frames.shape == (2, len(recorded), 32, 32, 3)
    assert isinstance(frames, np.memmap)
    loaded = LeRobotDataset("local/demos", root=dataset)
    for row in range(len(recorded)):
        item = loaded[row]
        for camera, key in enumerate(recorded.image_keys):
            np.testing.assert_array_equal(frames[camera, row], as_uint8(item[key]))


def test_image_features_and_resizing(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (5, 24, 40, 3)).astype(np.uint8)
    vector = {"dtype": "float32", "shape": (1,), "names": None}
    camera = {"dtype": "image", "shape": (24, 40, 3), "names": ["height", "width", "channels"]}
    features = {STATE_KEY: vector, ACTION_KEY: vector, IMAGE_KEY: camera}
    made = LeRobotDataset.create("local/images", 10, features, root=tmp_path / "images", use_videos=False)
    for t, picture in enumerate(pictures):
        value = np.full(1, t, np.float32)
        made.add_frame({STATE_KEY: value, ACTION_KEY: value, IMAGE_KEY: picture, "task": "wait"})
    made.save_episode()
    made.finalize()
    recorded = open_dataset(tmp_path / "images", state_dim=1, action_dim=1)
    np.testing.assert_array_equal(recorded.state[:, 0], np.arange(5))
    frames = frame_cache(recorded, tmp_path / "cache", 16)
    expected = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BILINEAR)) for p in pictures]
    np.testing.assert_array_equal(frames[0], expected)


def test_resize_leaves_fitting_pictures_alone():
    picture = np.zeros((16, 16, 3), np.uint8)
    assert resize(picture, 16) is picture
    assert resize(picture, 8).shape == (8, 8, 3)


def test_decoded_once_and_again_after_a_change(dataset, tmp_path, monkeypatch):
    root = shutil.copytree(dataset, tmp_path / "copy")
    decoded = []
    decode = frames_module.decode
    monkeypatch.setattr(frames_module, "decode", lambda path: decoded.append(path) or decode(path))
    frame_cache(open_dataset(root), tmp_path / "cache", 32)
    frame_cache(open_dataset(root), tmp_path / "cache", 32)
    assert len(decoded) == 2  # one file per camera
    video = next((root / "videos").rglob("*.mp4"))
    video.write_bytes(video.read_bytes() + b"\0" * 8)
    frame_cache(open_dataset(root), tmp_path / "cache", 32)
    assert len(decoded) == 4


def test_a_video_that_begins_late_is_refused_with_place_and_rate(recorded, tmp_path, monkeypatch):
    decode = frames_module.decode
    late = 3 / recorded.fps
    monkeypatch.setattr(frames_module, "decode", lambda path: (replace(f, time=f.time + late) for f in decode(path)))
    rate = f"episode 0, frame 0.*which is {recorded.fps:g}"
    with pytest.raises(DatasetError, match=rf"no frame at 0\.0000 s, the next one is at {late:.4f} s .*{rate}"):
        frame_cache(recorded, tmp_path / "cache", 32)


def test_an_interrupted_cache_is_not_taken_for_a_whole_one(recorded, tmp_path, monkeypatch):
    def interrupted(path):
        yield from ()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(frames_module, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            frame_cache(recorded, tmp_path, 32)
    assert not list(tmp_path.glob("frames-*.npy"))
    assert frame_cache(recorded, tmp_path, 32).any()


def test_broken_videos_are_named(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "copy")
    video = sorted((root / "videos").rglob("*.mp4"))[0]
    video.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"file-000\.mp4 cannot be read as a video"):
        frame_cache(open_dataset(root), tmp_path / "cache", 32)
    video.unlink()
    with pytest.raises(DatasetError, match=r"file-000\.mp4 is missing"):
        frame_cache(open_dataset(root), tmp_path / "cache", 32)
    other = sorted((dataset / "videos").rglob("*.mp4"))[0]
    make_short(other, video)
    with pytest.raises(DatasetError, match=r"ends before \(camera .*, episode \d+, frame \d+\).*fps"):
        frame_cache(open_dataset(root), tmp_path / "cache", 32)


def test_a_video_that_is_damaged_inside_is_refused_where_the_decoder_knows(dataset, tmp_path, capfd):
    """It fills in what it lacks, and would go on with pictures of something else: none of them is trained on."""
    whole = frame_cache(open_dataset(dataset), tmp_path / "whole", 32)
    root = shutil.copytree(dataset, tmp_path / "copy")
    video = sorted((root / "videos").rglob("*.mp4"))[0]
    content, rng = video.read_bytes(), np.random.default_rng(0)
    refused: list[str] = []
    begin, end = content.index(b"mdat") + 1000, content.index(b"moov") - 1000
    for at in rng.integers(begin, end, 20):
        spoiled = bytearray(content)
        spoiled[at : at + 400] = rng.bytes(400)
        video.write_bytes(spoiled)
        try:
            frames = frame_cache(open_dataset(root), tmp_path / f"cache {at}", 32)
        except DatasetError as error:
            refused.append(str(error))
        else:
            assert np.abs(frames.astype(int) - whole).mean() < 2, "changed, by values that a video may have"
    assert len(refused) > 15
    assert all(re.search(r"file-000\.mp4.* (damaged|cannot be read).*copy the dataset again", line) for line in refused)
    assert capfd.readouterr() == ("", ""), "one line is all there is"


def make_short(source, target):
    from libra_ray.data.video import EncoderSettings, VideoWriter, decode, encoder_config

    writer = VideoWriter(target, fps=20, encoder=EncoderSettings.of(encoder_config("h264")), height=32, width=32)
    writer.write(np.stack([frame.rgb for frame in decode(source)][:-1]))
    writer.close()
