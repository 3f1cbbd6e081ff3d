"""One recording and one checkpoint for all tests of the engine, made as small as they can be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from libra_ray.runs.folder import RunFolder
from tests.on_ray.doubles import debug_config

MakeRun = Callable[..., RunFolder]


@pytest.fixture
def make_run(tmp_path) -> MakeRun:
    """Run folders of the debug preset, changed as the keywords say."""

    def make(name: str = "run", **changes: object) -> RunFolder:
        return RunFolder.open(tmp_path / name, debug_config(**changes))

    return make


@pytest.fixture(scope="session")
def recorded_run(ray_cluster, runs_dir) -> RunFolder:
    """A run whose demonstrations a real fleet has recorded."""
    from libra_ray.on_ray import record as recording

    folder = RunFolder.open(runs_dir / "recorded", debug_config(ray__simulator_actors=2))
    with folder.stage("record") as clock:
        recording.record(folder, clock)
    return folder


@pytest.fixture(scope="session")
def demonstrations(recorded_run) -> Path:
    """The data set of that run."""
    return recorded_run.path("dataset")


@pytest.fixture(scope="session")
def untrained(demonstrations, runs_dir) -> Path:
    """A checkpoint of the debug model as it is before its first step."""
    import torch

    from libra_ray import checkpoint
    from libra_ray.training.data import TrainingData

    torch.manual_seed(0)
    data = TrainingData.open(debug_config(), demonstrations, runs_dir / "frames")
    model = data.make_model()
    checkpoint.save(runs_dir / "untrained", model, model.state_dict(), data.stats, data.spec, step=0)
    return runs_dir / "untrained"
