"""A data set of format 2.1: the command in the refusal runs as it is printed, and then the data set opens."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import open_dataset
from tests.data.builders import edit_info, make_images

ROOT = Path(__file__).parents[2]


def as_v21(source: Path, root: Path) -> Path:
    """The same data set as LeRobot laid it out before: one file an episode, tables as lines of JSON."""
    (root / "data" / "chunk-000").mkdir(parents=True)
    (root / "meta").mkdir()
    (data,), (episodes,) = (source / "data").rglob("*.parquet"), (source / "meta" / "episodes").rglob("*.parquet")
    table, rows = pq.read_table(data), pq.read_table(episodes).to_pylist()
    for row in rows:
        part = table.slice(row["dataset_from_index"], row["length"])
        pq.write_table(part, root / "data" / "chunk-000" / f"episode_{row['episode_index']:06d}.parquet")
    names = {column.split("/")[1] for column in rows[0] if column.startswith("stats/")}
    kinds = ("min", "max", "mean", "std", "count")
    lines = {
        "tasks": [{"task_index": 0, "task": "wait"}],
        "episodes": [{"episode_index": r["episode_index"], "tasks": ["wait"], "length": r["length"]} for r in rows],
        "episodes_stats": [
            {"episode_index": r["episode_index"], "stats": {n: {k: r[f"stats/{n}/{k}"] for k in kinds} for n in names}}
            for r in rows
        ],
    }
    for name, content in lines.items():
        (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    shutil.copy(source / "meta" / "info.json", root / "meta")
    edit_info(
        root,
        codebase_version="v2.1",
        total_chunks=1,
        total_videos=0,
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path=None,
    )
    return root


@pytest.mark.skipif(shutil.which("uv") is None, reason="the printed command begins with uv")
def test_the_printed_command_converts_also_in_a_folder_with_spaces(tmp_path):
    source = make_images(tmp_path / "v3", {"observation.image": np.full((16, 16, 3), 7, np.uint8)})
    root = as_v21(source, tmp_path / "my  own demos")
    with pytest.raises(DatasetError) as refused:
        open_dataset(root)
    command = re.search("uv run .*", str(refused.value)).group()
    shell = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(open_dataset(root).action, open_dataset(source).action)
