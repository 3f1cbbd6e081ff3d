"""Every number of a data set is there, is a number, and stands in its own row; or its place is named."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from libra_ray.data.checks import DatasetError
from libra_ray.data.columns import vectors
from libra_ray.data.dataset import open_dataset
from libra_ray.data.transforms import Pipeline, compute_stats
from libra_ray.types import ACTION_KEY, STATE_KEY
from tests.data.builders import edit_column, edit_info, make_images

LISTS = pa.list_(pa.float32())


def without(*rows):
    return lambda values: [None if row in rows else value for row, value in enumerate(values)]


def put(row, value):
    return lambda values: [value if place == row else old for place, old in enumerate(values)]


@pytest.mark.parametrize("column", [STATE_KEY, ACTION_KEY])
@pytest.mark.parametrize("kind", [LISTS, pa.list_(pa.float32(), 4), pa.large_list(pa.float64())])
@pytest.mark.parametrize(
    ("rows", "words"), [((8,), r"episode 1, frame 2 \(1 in all"), (range(0, 11, 4), r"episode 0, frame 0 \(3 in")]
)
def test_rows_without_a_vector_are_named(images, column, kind, rows, words):
    edit_column(images, column, without(*rows), kind)
    with pytest.raises(DatasetError, match=rf"^{column} is missing \(null or NaN\) in {words}"):
        open_dataset(images)


@pytest.mark.parametrize(
    ("column", "value", "kind", "words"),
    [
        (ACTION_KEY, [1.0, None, 2.0, 3.0], LISTS, r"action is missing \(null or NaN\) in episode 1, frame 1 \(1 in all"),
        (ACTION_KEY, [1.0, 2.0, 3.0], LISTS, r"action has 3 values in episode 1, frame 1 \(1 frames.*announces 4"),
        (STATE_KEY, [1.0] * 5, LISTS, r"observation\.state has 5 values in episode 1, frame 1"),
        (STATE_KEY, [], LISTS, r"observation\.state has 0 values in episode 1, frame 1"),
        (STATE_KEY, [1e300] * 4, pa.list_(pa.float64()), r"observation\.state\[0\] is inf in episode 1, frame 1"),
        ("task_index", None, None, r"task_index is missing.*file-000\.parquet, row 7 \(1 in all"),
        ("index", None, None, r"index is missing.*row 7"),
        ("episode_index", None, None, r"episode_index is missing.*row 7"),
        ("frame_index", None, None, r"frame_index is missing.*row 7"),
        ("timestamp", None, None, r"timestamp is missing.*in episode 1, frame 1"),
        ("frame_index", 0.5, pa.float64(), r"frame_index is 0\.5 .*row 7.*not a whole number"),
        ("index", 3, None, r"frame 3 \(column index\) comes twice, in .*row 3, and in .*row 7"),
        ("index", 99, None, r"not numbered consecutively from 0 \(column index\): 8 stands where 7 should"),
    ],
)
def test_one_bad_row_is_named(images, column, value, kind, words):
    edit_column(images, column, put(7, value), kind)
    with pytest.raises(DatasetError, match=words):
        open_dataset(images)


def test_a_column_of_text_is_no_vector(images):
    edit_column(images, ACTION_KEY, lambda rows: [[str(v) for v in row] for row in rows], pa.list_(pa.string()))
    with pytest.raises(DatasetError, match=r"action holds list<.*string>, not numbers"):
        open_dataset(images)
    edit_column(images, ACTION_KEY, lambda rows: ["left" for _ in rows], pa.string())
    with pytest.raises(DatasetError, match=r"action holds string, not numbers"):
        open_dataset(images)


def test_a_shape_that_was_announced_wrongly(images):
    features = {key: {"dtype": "float32", "shape": [3], "names": None} for key in (ACTION_KEY, STATE_KEY)}
    edit_info(images, features=features)
    with pytest.raises(DatasetError, match=r"has 4 values in episode 0, frame 0 \(11 frames in all\), info.json announces 3"):
        open_dataset(images)


def test_whole_numbers_stored_as_floats_are_whole_numbers(images, four_cameras):
    for column in ("index", "episode_index", "frame_index", "task_index"):
        edit_column(images, column, lambda rows: [float(row) for row in rows], pa.float64())
    before, after = open_dataset(four_cameras), open_dataset(images)
    for name in ("action", "episode_index", "frame_index", "starts"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_nested_lists_are_read_in_row_major_order():
    column = pa.chunked_array([[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]])
    np.testing.assert_array_equal(vectors(column, "action", 4, str), [[1, 2, 3, 4], [5, 6, 7, 8]])
    ragged = pa.chunked_array([[[[1, 2], [3, 4]], [[5, 6], [7]]]])
    with pytest.raises(DatasetError, match="action has 3 values 1"):
        vectors(ragged, "action", 4, str)
    torn = pa.chunked_array([[[[1, 2], [3, 4]], [[5, None], [7, 8]]]])
    with pytest.raises(DatasetError, match=r"action is missing .* 1 "):
        vectors(torn, "action", 4, str)


@pytest.mark.parametrize("fps", [None, 0, -5, "30", True])
def test_a_rate_that_is_none(images, fps):
    edit_info(images, fps=fps)
    with pytest.raises(DatasetError, match=r"fps is .*a number above 0"):
        open_dataset(images)


def test_episodes_of_one_frame_and_constant_dimensions(tmp_path):
    recorded = open_dataset(
        make_images(tmp_path / "d", {"observation.image": np.zeros((16, 16, 3), np.uint8)}, lengths=(1, 3, 1))
    )
    assert recorded.lengths.tolist() == [1, 3, 1]
    for rows in (np.arange(5), np.arange(1)):
        pipeline = Pipeline(compute_stats(recorded, rows), "min_max")
        assert np.isfinite(pipeline.inputs_state(recorded.state)).all()
        np.testing.assert_allclose(
            pipeline.outputs_action(pipeline.inputs_action(recorded.action[rows])), recorded.action[rows]
        )


def test_files_that_are_not_the_data_sets_own_are_named_and_not_read(images, four_cameras):
    chunk = images / "data" / "chunk-000"
    for path in (
        chunk / "._file-000.parquet",
        images / "data" / ".DS_Store",
        images / "meta" / "episodes" / "chunk-000" / "~x",
    ):
        path.write_bytes(b"\0\5\26\7")
    shutil.copy(chunk / "file-000.parquet", chunk / "file-000 (1).parquet")
    recorded = open_dataset(images)
    np.testing.assert_array_equal(recorded.action, open_dataset(four_cameras).action)
    (note,) = [note for note in recorded.notes if note.startswith("not read")]
    assert "data/.DS_Store, data/chunk-000/._file-000.parquet" in note
    assert note.endswith("and 1 more")


def test_a_data_file_of_the_right_name_that_is_not_the_data_sets_own(images):
    chunk = images / "data" / "chunk-000"
    shutil.copy(chunk / "file-000.parquet", chunk / "file-001.parquet")
    with pytest.raises(
        DatasetError, match=r"frame 0 \(column index\) comes twice, in .*file-000.*file-001.parquet, row 0; remove"
    ):
        open_dataset(images)


def test_an_empty_data_file_is_named(images):
    chunk = images / "data" / "chunk-000"
    pq.write_table(pq.read_table(chunk / "file-000.parquet").slice(0, 0), chunk / "file-001.parquet")
    recorded = open_dataset(images)
    assert len(recorded) == 11
    assert "without frames: data/chunk-000/file-001.parquet" in recorded.notes


def test_an_episode_without_frames_is_named(images):
    edit_column(images, "episode_index", lambda rows: [0 for _ in rows])
    with pytest.raises(DatasetError, match="episode 1 has no frames"):
        open_dataset(images)
