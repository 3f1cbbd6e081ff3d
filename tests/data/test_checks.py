"""Every way a dataset can be unusable, and the words in which the user learns of it."""

import json
import re
import shutil
from copy import deepcopy as copy_of

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets import LeRobotDataset

from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import open_dataset
from libra_ray.data.frames import frame_cache
from libra_ray.data.transforms import compute_stats
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY
from tests.data.builders import edit_info, make_images


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def poison(root, column, row, dim, value):
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    values = np.array(table[column].to_pylist(), np.float32)
    values[row, dim] = value
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    pq.write_table(table.set_column(index, field, pa.array(list(values), type=field.type)), path)


def test_the_untouched_copy_opens(copy, recorded):
    np.testing.assert_array_equal(open_dataset(copy, state_dim=4, action_dim=4).action, recorded.action)


def test_missing(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere does not exist.*meta/info\.json"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"not a LeRobotDataset.*meta/info\.json"):
        open_dataset(tmp_path)


def test_lerobot_recording_without_finalize(tmp_path):
    feature = {"dtype": "float32", "shape": (2,), "names": None}
    camera = {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]}
    features = {STATE_KEY: feature, ACTION_KEY: feature, "observation.image": camera}
    made = LeRobotDataset.create("local/raw", 10, features, root=tmp_path / "raw", use_videos=False)
    for episode in range(2):
        for t in range(3):
            vector, picture = np.full(2, t, np.float32), np.full((16, 16, 3), 40 * t + episode, np.uint8)
            made.add_frame({STATE_KEY: vector, ACTION_KEY: vector, "observation.image": picture, "task": "wait"})
        made.save_episode()
    with pytest.raises(DatasetError, match=r"call finalize\(\)"):
        open_dataset(tmp_path / "raw")
    made.finalize()
    assert len(open_dataset(tmp_path / "raw")) == 6


def test_info_in_another_encoding(copy):
    """A byte order mark does no harm; what is not UTF-8 is said to be that."""
    path = copy / "meta" / "info.json"
    text = path.read_text(encoding="utf-8")
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(open_dataset(copy)) == 69
    path.write_bytes(text.replace('"codebase_version"', '"robot": "Müller", "codebase_version"', 1).encode("latin-1"))
    with pytest.raises(DatasetError, match=r"info\.json is not text in UTF-8 .*save it as UTF-8") as refused:
        open_dataset(copy)
    assert "finalize" not in str(refused.value)


@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "videos"])
def test_whatever_stands_in_info_is_read_or_refused_in_one_line(pictures, dataset, tmp_path):
    """Each entry in turn holds something else, or is missing; nothing of it ends in an error of another kind."""
    root = shutil.copytree(dataset, tmp_path / "copy")
    if pictures:
        root = make_images(tmp_path / "pictures", {IMAGE_KEY: np.full((16, 16, 3), 7, np.uint8)})
    path = root / "meta" / "info.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["features"][ACTION_KEY]["libra_ray"] = {"ranges": [[-1, 1]] * 4, "gripper": 3, "delta": True, "rotation": "none"}
    refused: list[str] = []
    read = [place for place in entries(tree) if len(place) == 1 or (place[1] in (ACTION_KEY, IMAGE_KEY) and len(place) < 5)]
    for place in read:
        for content in (MISSING, None, "{}", "{chunk_index:zz}", -1, [[1]], {"a": [1]}):
            path.write_text(json.dumps(changed(tree, place, content)), encoding="utf-8")
            try:
                open_dataset(root)
            except DatasetError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert {len(line.splitlines()) for line in refused} == {1}


MISSING = object()


def entries(tree, place=()):
    """The places of all entries of a JSON object, outer ones first."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*place, key)
        yield from entries(value, (*place, key))


def changed(tree, place, content):
    """A copy of a JSON object in which something else stands at a place."""
    tree = at = copy_of(tree)
    for key in place[:-1]:
        at = at[key]
    if content is MISSING:
        del at[place[-1]]
    else:
        at[place[-1]] = content
    return tree


@pytest.mark.parametrize(
    ("name", "template", "words"),
    [
        (
            "data_path",
            "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "episode_chunk}, as format 2.1 does",
        ),
        ("video_path", "videos/{video_key}/episode_{episode_index:06d}.mp4", "episode_index}, as format 2.1 does"),
        ("data_path", "data/{video_key}/file-{file_index:03d}.parquet", "video_key}; format 3"),
        ("video_path", "{}/file.mp4", "no pattern of file names"),
        ("video_path", "{video_key.x}/file.mp4", "no pattern of file names"),
        ("data_path", "data/{", "no pattern of file names"),
    ],
)
def test_files_that_are_named_by_what_format_3_does_not_number(copy, name, template, words):
    edit_info(copy, **{name: template})
    with pytest.raises(DatasetError, match=rf"info\.json: {name} .*{re.escape(words)}.*chunk-{{chunk_index:03d}}"):
        open_dataset(copy)


def test_info_that_is_cut_off(copy):
    path = copy / "meta" / "info.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"info\.json is no JSON object .*copy or write the dataset again"):
        open_dataset(copy)


def test_damaged_tasks(copy):
    path = copy / "meta" / "tasks.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"tasks\.parquet: damaged parquet file"):
        open_dataset(copy)


@pytest.mark.parametrize("damaged", [0, 1], ids=["the first", "later ones"])
def test_damaged_pages_of_pictures(tmp_path, damaged):
    """The footer is whole, and so are the numbers: only who reads the pictures can notice."""
    root = make_images(tmp_path / "pictures", {IMAGE_KEY: np.full((16, 16, 3), 7, np.uint8)})
    (path,) = (root / "data").rglob("*.parquet")
    pq.write_table(pq.read_table(path), path, row_group_size=8, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(damaged)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == f"{IMAGE_KEY}.bytes")
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 60] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{path}: {IMAGE_KEY} cannot be read from row \d+ on .*copy or write"):
        frame_cache(open_dataset(root), tmp_path / "cache", 16)


def test_truncated_parquet(copy):
    (path,) = (copy / "data").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"damaged parquet file.*call finalize\(\)"):
        open_dataset(copy)


@pytest.mark.parametrize("folder", ["meta/episodes", "data"])
def test_missing_parquet(copy, folder):
    shutil.rmtree(copy / folder)
    with pytest.raises(DatasetError, match=rf"{folder}: no parquet files.*call finalize\(\)"):
        open_dataset(copy)


def test_missing_tasks(copy):
    (copy / "meta" / "tasks.parquet").unlink()
    with pytest.raises(DatasetError, match=r"tasks\.parquet: missing"):
        open_dataset(copy)


def test_fewer_frames_than_announced(copy):
    edit_info(copy, total_frames=1000)
    with pytest.raises(DatasetError, match=r"announces 6 episodes and 1000 frames, the files hold 6 and 69.*finalize"):
        open_dataset(copy)


def test_empty(copy):
    edit_info(copy, total_episodes=0, total_frames=0)
    with pytest.raises(DatasetError, match="is empty"):
        open_dataset(copy)


def test_old_formats_name_the_converter(copy):
    edit_info(copy, codebase_version="v2.1")
    with pytest.raises(
        DatasetError, match=r"old format v2\.1.*uv run python -m lerobot\.scripts\.convert_dataset_v21_to_v30.*--root="
    ):
        open_dataset(copy)
    edit_info(copy, codebase_version="v2.0")
    with pytest.raises(DatasetError, match=r"v2\.1 with an older LeRobot release first"):
        open_dataset(copy)
    edit_info(copy, codebase_version="v4.0")
    with pytest.raises(DatasetError, match=r"newer than v3\.x"):
        open_dataset(copy)
    shutil.rmtree(copy / "meta")
    (copy / "meta_data").mkdir()
    with pytest.raises(DatasetError, match="old format v1"):
        open_dataset(copy)


def test_the_converter_exists():
    import importlib.util

    from libra_ray.data.checks import CONVERTER

    assert importlib.util.find_spec(CONVERTER.split()[-1]) is not None


@pytest.mark.parametrize(("column", "value"), [(STATE_KEY, np.nan), (ACTION_KEY, np.inf)])
def test_values_that_are_not_finite(copy, column, value):
    poison(copy, column, row=9 + 4, dim=2, value=value)
    with pytest.raises(DatasetError, match=rf"{column}\[2\] is {value} in episode 1, frame 4 \(1 frames"):
        open_dataset(copy)


def test_wrong_dimensions(dataset):
    with pytest.raises(DatasetError, match=r"observation\.state has 4 dimensions in the dataset, expected 39"):
        open_dataset(dataset, state_dim=39)
    with pytest.raises(DatasetError, match=r"action has 4 dimensions in the dataset, expected 7"):
        open_dataset(dataset, action_dim=7)


def test_missing_features(copy):
    features = json.loads((copy / "meta" / "info.json").read_text())["features"]
    edit_info(copy, features={k: v for k, v in features.items() if k != STATE_KEY})
    with pytest.raises(DatasetError, match=r"no feature 'observation\.state'; it has observation\.image"):
        open_dataset(copy)
    edit_info(copy, features={k: v for k, v in features.items() if v["dtype"] != "video"})
    with pytest.raises(DatasetError, match="no colour camera"):
        open_dataset(copy)


def test_statistics_of_another_robot(recorded):
    stats = compute_stats(recorded, recorded.rows([0, 1]))
    stats.check_fits(4, 4)
    with pytest.raises(ValueError, match="statistics have 4 state dimensions, the data have 39"):
        stats.check_fits(39, 4)
    with pytest.raises(ValueError, match="statistics have 4 action dimensions, the data have 7"):
        stats.check_fits(4, 7)
