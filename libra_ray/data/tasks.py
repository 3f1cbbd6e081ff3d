"""Instructions by frame: LeRobot keeps a task number with every frame, and the words of each number in `meta/tasks.parquet`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libra_ray.data.checks import DatasetError, unfinished

_TEXT_COLUMNS = ("task", "__index_level_0__")
"""Where the words stand: a column of that name, or pandas' unnamed index."""


def frame_instructions(
    root: Path, numbers: NDArray[np.generic], episode_index: NDArray[np.int64], frame_index: NDArray[np.int64]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The different instructions that a data set's frames have, sorted, and for each frame `(F,)` the place of its own.

    Args:
        root: the data set's folder.
        numbers: `(F,)` LeRobot's `task_index` of each frame; `episode_index` and `frame_index` `(F,)` name the frame.

    Raises:
        DatasetError: the words are missing, or a frame has no number or one without words.
    """
    names = _task_names(root)
    known = np.isin(numbers, list(names))
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        said = "no task_index" if np.isnan(numbers[row]) else f"task_index {numbers[row]}, which has no instruction there"
        valid = f"numbers with an instruction in meta/tasks.parquet: {', '.join(map(str, sorted(names)[:10]))}"
        raise DatasetError(
            f"dataset {root}: episode {episode_index[row]}, frame {frame_index[row]} has {said} "
            f"({int((~known).sum())} frames in all; {valid}{', …' if len(names) > 10 else ''}); write it again"
        )
    used, places = np.unique(numbers.astype(np.int64), return_inverse=True)
    texts = [names[int(number)] for number in used]
    # Two numbers may have the same words, as in data sets that were merged.
    instructions = tuple(sorted(set(texts)))
    order = {text: place for place, text in enumerate(instructions)}
    return instructions, np.array([order[text] for text in texts], np.int64)[places]


def wordless(instructions: Sequence[str], task_index: NDArray[np.int64]) -> list[str]:
    """What is to be told of frames whose instruction has no words, in one line; nothing where all have some.

    Args:
        instructions: the different ones; `task_index` `(F,)` is the place of each frame's own among them.
    """
    blank = [place for place, text in enumerate(instructions) if not text.strip()]
    if not (count := int(np.isin(task_index, blank).sum())):
        return []
    return [f"{count} of {len(task_index)} frames have an instruction without words"]


def _task_names(root: Path) -> dict[int, str]:
    """Task number to instruction, of the numbers that have one."""
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        raise unfinished(path, "missing")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise unfinished(path, f"damaged parquet file ({error})") from error
    columns = [*(name for name in _TEXT_COLUMNS if name in table.column_names), *table.column_names]
    texts = next((name for name in columns if name != "task_index"), None)
    if texts is None or "task_index" not in table.column_names:
        raise DatasetError(f"{path} needs task_index and the instructions; it has {', '.join(table.column_names)}")
    names: dict[int, str] = {}
    for number, text in zip(table["task_index"].to_pylist(), table[texts].to_pylist(), strict=True):
        if not isinstance(text, str):
            continue
        if not isinstance(number, int | float) or not float(number).is_integer():
            raise DatasetError(f"{path}: {text!r} has the task_index {number!r}, which is no whole number; write it again")
        if (other := names.setdefault(int(number), text)) != text:
            raise DatasetError(f"{path} has two instructions of task_index {number}: {other!r} and {text!r}; write it again")
    return names
