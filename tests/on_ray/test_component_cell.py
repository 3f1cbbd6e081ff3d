"""One cell of the study of components, from training to its record, on a real fleet."""

import shutil
from dataclasses import asdict, replace

from benchmarks.component_tables import BENCHES, Bench
from benchmarks.components import run_cell
from benchmarks.pretraining import checkpoint_of
from libra_ray.config.overrides import flatten
from libra_ray.runs.folder import RunFolder
from tests.on_ray.doubles import debug_config


def test_a_cell_is_trained_evaluated_and_not_run_twice(ray_cluster, demonstrations, untrained, tmp_path, monkeypatch):
    debug = {key: value for key, value in flatten(debug_config()).items() if key != "preset"}
    few = {"train.steps": 4, "evaluate.episodes_per_task": 1, "evaluate.controllers": "policy", "sim.max_steps": 12}
    few |= {"ray.simulator_actors": 1}
    monkeypatch.setitem(BENCHES, "place", Bench(changes={}, variants={"monolithic": {"model.system": "monolithic"}}))
    data = RunFolder.open(tmp_path / "data", debug_config(data__root=str(demonstrations)))
    data.path("frames").mkdir()
    shutil.copytree(untrained, checkpoint_of(tmp_path / "place-pretrained"))

    def measured():
        return run_cell(tmp_path, "place", "monolithic", 3, data, debug | few)

    first = measured()
    assert (first.seed, first.steps) == (3, 4)
    assert [result.controller for result in first.episodes["policy"]] == ["policy"]
    assert first.difficulty["val_loss_diff"] > 0
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.json"}
    again = measured()
    assert asdict(replace(again, episodes={})) == asdict(replace(first, episodes={}))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
