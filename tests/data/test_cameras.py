"""What is trained on as a camera: colour pictures of one size, chosen by name; what is left out is said."""

import shutil

import numpy as np
import pytest

from libra_ray.config import DataConfig
from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import open_dataset
from libra_ray.data.frames import cache_digest, frame_cache
from libra_ray.types import IMAGE_KEY
from tests.data.builders import edit_column, edit_info, encoded
from tests.data.conftest import CAMERAS

TOP, CLEAR, GREY, DEPTH = (f"observation.images.{name}" for name in ("top", "clear", "grey", "depth"))
WRIST = CAMERAS[1]


def choose(*cameras):
    return DataConfig(cameras=cameras)


def said(recorded, key):
    return [note for note in recorded.notes if key in note]


def test_only_colour_cameras_are_taken_and_the_others_are_named(four_cameras, tmp_path):
    recorded = open_dataset(four_cameras)
    assert recorded.image_keys == (TOP, CLEAR)
    (depth,), (grey,), (clear,) = (said(recorded, key) for key in (DEPTH, GREY, CLEAR))
    assert "left out" in depth
    assert "depth" in depth
    assert "left out" in grey
    assert "data.cameras" in grey
    assert "transparency" in clear
    frames = frame_cache(recorded, tmp_path, 16)
    assert frames.shape == (2, 11, 16, 16, 3)
    assert (frames[1] == 90).all()


def test_cameras_are_chosen_by_name_in_the_given_order(four_cameras, tmp_path):
    recorded = open_dataset(four_cameras, choose(GREY, TOP))
    assert recorded.image_keys == (GREY, TOP)
    assert said(recorded, DEPTH) == [f"left out, as data.cameras does not name them: {CLEAR}, {DEPTH}"]
    frames = frame_cache(recorded, tmp_path, 16)
    assert (frames[0] == frames[0][..., :1]).all()
    other = open_dataset(four_cameras, choose(TOP, GREY))
    assert cache_digest(other) != cache_digest(recorded)
    np.testing.assert_array_equal(frame_cache(other, tmp_path, 16), frames[::-1])


@pytest.mark.parametrize(
    ("cameras", "words"),
    [
        ((TOP, DEPTH), rf"data\.cameras=.*{DEPTH} cannot be used: .*depth and not colour"),
        (("front",), rf"no camera 'front'; its cameras are {TOP}, {CLEAR}, {GREY}, {DEPTH}"),
    ],
)
def test_what_is_no_camera_cannot_be_chosen(four_cameras, cameras, words):
    with pytest.raises(DatasetError, match=words):
        open_dataset(four_cameras, choose(*cameras))


def test_depth_by_its_mark_alone(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "copy")
    features = open_dataset(root).features
    edit_info(root, features=features | {WRIST: features[WRIST] | {"info": {"is_depth_map": True}}})
    recorded = open_dataset(root)
    assert recorded.image_keys == (IMAGE_KEY,)
    assert said(recorded, WRIST) == [f"camera {WRIST} is left out: it is a depth map (is_depth_map)"]
    with pytest.raises(DatasetError, match="is a depth map"):
        open_dataset(root, choose(WRIST))


def test_no_colour_camera_at_all_says_why(images):
    features = open_dataset(images).features
    edit_info(images, features={key: f for key, f in features.items() if key not in (TOP, CLEAR)})
    with pytest.raises(DatasetError, match=r"no colour camera.*greyscale; name it in data\.cameras.*depth"):
        open_dataset(images)
    assert open_dataset(images, choose(GREY)).image_keys == (GREY,)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (encoded(np.zeros((48, 32, 3), np.uint8)), "colour, 48x32 pixels, its first one was colour, 24x32 pixels"),
        (encoded(np.full((24, 32), 1000, np.uint16)), "more than 8 bits"),
        (encoded(np.zeros((24, 32), np.uint8)), "greyscale, 24x32"),
        (None, r"missing \(null\)"),
        ({"bytes": b"no picture", "path": None}, "cannot be read"),
        ({"bytes": None, "path": "images/gone.png"}, "cannot be read"),
    ],
)
def test_a_picture_unlike_its_cameras_others_is_named(images, tmp_path, picture, words):
    edit_column(images, TOP, lambda rows: [*rows[:8], picture, *rows[9:]])
    with pytest.raises(DatasetError, match=rf"camera {TOP}, episode 1, frame 2: .*{words}"):
        frame_cache(open_dataset(images), tmp_path / "cache", 16)
    assert not list((tmp_path / "cache").glob("*.np*"))


def test_a_video_of_another_size_is_named(dataset, tmp_path):
    from libra_ray.data.video import EncoderSettings, VideoWriter, encoder_config

    root = shutil.copytree(dataset, tmp_path / "copy")
    recorded = open_dataset(root)
    (path,) = (root / "videos" / WRIST).rglob("*.mp4")
    writer = VideoWriter(path, fps=20, encoder=EncoderSettings.of(encoder_config("h264")), height=48, width=32)
    writer.write(np.zeros((len(recorded), 48, 32, 3), np.uint8))
    writer.close()
    with pytest.raises(DatasetError, match=rf"camera {WRIST}, episode 0, frame 0: .*48x32.*32x32"):
        frame_cache(recorded, tmp_path / "cache", 32)
    (note,) = said(open_dataset(root), WRIST)
    assert "announced with 32x32 pixels in info.json, its pictures have 48x32" in note


def places(root, column, change):
    import pyarrow as pa

    edit_column(root, f"videos/{WRIST}/{column}", change, pa.float64())


@pytest.mark.parametrize("column", ["chunk_index", "file_index", "from_timestamp"])
def test_an_episode_without_a_place_in_the_videos_is_named(dataset, tmp_path, column):
    root = shutil.copytree(dataset, tmp_path / "copy")
    places(root, column, lambda rows: [None if e in (2, 4) else float(row) for e, row in enumerate(rows)])
    with pytest.raises(DatasetError, match=rf"{column} is missing.* episode 2 .*camera {WRIST} .*\(2 in all.*data\.cameras"):
        open_dataset(root)
    assert open_dataset(root, choose(IMAGE_KEY)).image_keys == (IMAGE_KEY,)


def test_video_places_stored_as_floats(dataset, recorded, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "copy")
    for column in ("chunk_index", "file_index"):
        places(root, column, lambda rows: [float(row) for row in rows])
    frames = frame_cache(open_dataset(root), tmp_path / "cache", 32)
    np.testing.assert_array_equal(frames, frame_cache(recorded, tmp_path / "cache", 32))


def test_a_rate_that_is_no_whole_number(tmp_path):
    """Pictures of a camera at 29.97 Hz: each frame gets its own, also after many."""
    from fractions import Fraction

    from libra_ray.data.dataset import write_dataset
    from libra_ray.data.video import EncoderSettings, VideoWriter, encoder_config
    from tests.data.builders import make_episode

    root = write_dataset([make_episode(length=150)], tmp_path / "d", fps=30)
    (path,) = (root / "videos").rglob("*.mp4")
    writer = VideoWriter(
        path, fps=Fraction(30000, 1001), encoder=EncoderSettings.of(encoder_config("h264")), height=32, width=32
    )
    writer.write(np.repeat(np.arange(150, dtype=np.uint8), 32 * 32 * 3).reshape(150, 32, 32, 3))
    writer.close()
    edit_info(root, fps=29.97)
    recorded = open_dataset(root)
    assert recorded.fps == 29.97
    shown = frame_cache(recorded, tmp_path / "cache", 32)[0].mean((1, 2, 3))
    assert np.abs(shown - np.arange(150)).max() < 0.5 + 2  # one step of grey is one frame; the codec costs less than two
    assert np.corrcoef(shown, np.arange(150))[0, 1] > 0.999
