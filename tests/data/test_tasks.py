"""Numbers of tasks to words: every frame's own, whatever wrote the table, and refused where there are none."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from libra_ray.data.checks import DatasetError
from libra_ray.data.tasks import frame_instructions, wordless

EPISODE, FRAME = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1])


def read(tmp_path, numbers, **columns):
    (tmp_path / "meta").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "meta" / "tasks.parquet")
    return frame_instructions(tmp_path, np.array(numbers), EPISODE, FRAME)


@pytest.mark.parametrize("name", ["task", "__index_level_0__", "instruction"])
def test_every_frame_has_the_words_of_its_number(tmp_path, name):
    """Unused words are left out, an empty instruction is one, and two numbers of the same words are the same."""
    instructions, places = read(
        tmp_path, [9, 2, 9, 5, 7], **{"task_index": [9, 2, 11, 7, 5], name: ["pull", "push", "never", "pull", ""]}
    )
    assert instructions == ("", "pull", "push")
    assert [instructions[place] for place in places] == ["pull", "push", "pull", "", "pull"]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([0, 0, 4, 4, 0], r"episode 0, frame 2 has task_index 4.*\(2 frames in all; .*tasks\.parquet: 0\)"),
        ([0, 0, 0, 0, 1], r"episode 1, frame 1 has task_index 1, which has no instruction"),
        ([0, np.nan, 0, 0, np.nan], r"episode 0, frame 1 has no task_index \(2 frames in all"),
    ],
)
def test_a_frame_without_words_is_refused_by_name(tmp_path, numbers, words):
    with pytest.raises(DatasetError, match=words):
        read(tmp_path, numbers, task_index=[0, 1], task=["push", None])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"task_index": [0, 0], "task": ["push", "pull"]}, r"two instructions of task_index 0: 'push' and 'pull'"),
        ({"task_index": [0, None], "task": ["push", "pull"]}, r"'pull' has the task_index None, which is no whole number"),
        ({"task_index": ["0", "1"], "task": ["push", "pull"]}, r"'push' has the task_index '0', which is no whole number"),
        ({"task_index": [0.5, 1.0], "task": ["push", "pull"]}, r"'push' has the task_index 0\.5, which is no whole"),
        ({"task_index": [np.nan, 1.0], "task": ["push", "pull"]}, r"'push' has the task_index nan, which is no whole"),
    ],
)
def test_a_table_with_a_number_that_is_none_or_has_two_meanings_is_refused(tmp_path, table, words):
    with pytest.raises(DatasetError, match=rf"tasks\.parquet.* {words}") as refused:
        read(tmp_path, [0] * 5, **table)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("columns", [{"task_index": [0]}, {"task": ["push"]}])
def test_a_table_without_words_or_numbers_is_refused(tmp_path, columns):
    with pytest.raises(DatasetError, match=r"tasks\.parquet needs task_index and the instructions; it has"):
        read(tmp_path, [0] * 5, **columns)


def test_frames_without_words_are_counted():
    assert wordless(("", " \n", "push"), np.array([2, 0, 1, 0, 2])) == ["3 of 5 frames have an instruction without words"]
    assert wordless(("pull", "push"), np.array([0, 1])) == []
