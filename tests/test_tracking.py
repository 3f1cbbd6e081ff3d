"""Against a real MLflow store in a temporary SQLite file."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from libra_ray import registered_model
from libra_ray.config import TrackingConfig, override, preset
from libra_ray.overriding import flatten
from libra_ray.tracking import Tracker, checkpoint_from_registry, observation_action_schema, tracking_uri
from libra_ray.types import ActionChunk, Plan

SCHEMA = observation_action_schema(image_shape=(64, 64, 3), state_dim=4, horizon=5, action_dim=4)
ROWS = [{"step": step, "loss": 1 / step, "accuracy": None, "lr": 0.1} for step in range(20, 1201, 20)]


FIRST_RUN = f"""
import sys
from pathlib import Path
from libra_ray.config import TrackingConfig
from libra_ray.tracking import Tracker
Path("checkpoint").mkdir()
Path("checkpoint", "w.bin").write_bytes(b"x")
with Tracker.start(TrackingConfig(), Path("runs"), "run") as tracker:
    tracker.log_metrics(1, {{"loss": 1.0}})
    tracker.register_model(Path("checkpoint"), {SCHEMA!r}, digest="first")
assert not {{"torch", "ray"}} & set(sys.modules), "engine loaded"
"""


@pytest.fixture(scope="module")
def first_process(tmp_path_factory):
    """A process of its own that makes the store, which takes seconds: all tests go on with it."""
    folder = tmp_path_factory.mktemp("fresh")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", FIRST_RUN, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(first_process):
    """The folder of all runs."""
    return Path(first_process.args[-1], "runs")


@pytest.fixture
def tracking():
    return TrackingConfig()


@pytest.fixture
def client(runs, tracking):
    return MlflowClient(tracking_uri=tracking_uri(tracking, runs))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def start(tracking, runs, run_id=None):
    return Tracker.start(tracking, runs, "quickstart", run_id)


def test_a_restart_continues_the_same_run(tracking, runs, client):
    with start(tracking, runs) as first:
        assert client.get_run(first.run_id).info.status == "RUNNING"
    with start(tracking, runs, first.run_id) as second:
        assert second.run_id == first.run_id
        assert client.get_run(first.run_id).info.status == "RUNNING"
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_run_that_is_gone_is_replaced(tracking, runs, client):
    with start(tracking, runs) as first:
        pass
    client.delete_run(first.run_id)
    for lost in (first.run_id, "0" * 32):
        with start(tracking, runs, lost) as second:
            assert second.run_id not in (first.run_id, lost)


def test_a_child_that_a_kill_left_half_way_is_found_again(tracking, runs):
    parent, other = start(tracking, runs), start(tracking, runs)
    begun = Tracker.start(tracking, runs, "sweep/0001-seed0", parent_id=parent.run_id)
    assert parent.child("sweep/0001-seed0") == begun.run_id
    assert parent.child("sweep/0001-seed1") is None
    assert other.child("sweep/0001-seed0") is None


@pytest.mark.parametrize(
    ("raised", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (None, "FINISHED")]
)
def test_the_way_out_decides_the_status(tracking, runs, client, raised, status):
    tracker = start(tracking, runs)
    if raised is None:
        with tracker:
            pass
    else:
        with pytest.raises(raised), tracker:
            raise raised
    assert client.get_run(tracker.run_id).info.status == status


def test_a_store_that_cannot_be_told_the_end_does_not_hide_what_ended_the_run(tracking, runs, monkeypatch):
    tracker = start(tracking, runs)

    def full(status):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker, "finish", full)
    with pytest.raises(ValueError, match="the cause"), tracker:
        raise ValueError("the cause")


def test_the_whole_configuration_is_logged_and_may_be_logged_again(tracking, runs, client):
    config = preset("mt10")
    with start(tracking, runs) as tracker:
        tracker.log_config(config)
        tracker.log_config(config)
        run = client.get_run(tracker.run_id)
    assert set(run.data.params) == set(flatten(config))
    assert run.data.params["train.steps"] == str(config.train.steps)
    assert not [tag for tag in run.data.tags if tag.startswith("changed.")]


def test_a_changed_value_becomes_a_tag(tracking, runs, client):
    with start(tracking, runs) as tracker:
        tracker.log_config(preset("debug"))
        tracker.log_config(override(preset("debug"), {"train.steps": 77}))
        run = client.get_run(tracker.run_id)
    assert run.data.params["train.steps"] == str(preset("debug").train.steps)
    assert run.data.tags["changed.train.steps"] == "77"


def test_a_very_long_value_is_cut(tracking, runs, client):
    config = override(preset("debug"), {"sim.tasks": tuple(f"task-{i}-v3" for i in range(1000))})
    with start(tracking, runs) as tracker:
        tracker.log_config(config)
        tracker.log_config(config)
        run = client.get_run(tracker.run_id)
    assert len(run.data.params["sim.tasks"]) == 6000
    assert not [tag for tag in run.data.tags if tag.startswith("changed.")]


def test_metrics_are_logged_once_across_restarts(tracking, runs, client):
    with start(tracking, runs) as tracker:
        tracker.log_step_metrics(ROWS[:40])
        tracker.log_step_metrics(ROWS[:40])
    with start(tracking, runs, tracker.run_id) as again:
        again.log_step_metrics(ROWS)
        again.log_metrics(1200, {"success_policy": 0.92, "success_expert": None})
        again.log_metrics(1200, {"success_policy": 0.92})
    history = client.get_metric_history(tracker.run_id, "loss")
    assert [metric.step for metric in history] == [row["step"] for row in ROWS]
    assert [metric.value for metric in history] == [row["loss"] for row in ROWS]
    assert len(client.get_metric_history(tracker.run_id, "success_policy")) == 1
    assert set(client.get_run(tracker.run_id).data.metrics) == {"loss", "lr", "success_policy"}


def test_many_metrics_go_in_few_calls(tracking, runs, client, monkeypatch):
    calls = []
    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *args, **kwargs: calls.append(1) or log_batch(*args, **kwargs))
    with start(tracking, runs) as tracker:
        tracker.log_step_metrics([{"step": step, **{f"m{i}": 1.0 for i in range(10)}} for step in range(250)])
    assert len(calls) == 3
    assert len(client.get_metric_history(tracker.run_id, "m9")) == 250


def test_artifacts_lie_beside_the_store(tracking, runs, client, checkpoint):
    with start(tracking, runs) as tracker:
        tracker.log_artifact(checkpoint / "config.json")
        tracker.log_artifact(checkpoint)
    assert {item.path for item in client.list_artifacts(tracker.run_id)} == {"config.json", "checkpoint"}
    assert list((runs / "mlartifacts" / tracker.run_id).rglob("model.safetensors"))


def test_a_registered_checkpoint_comes_back(tracking, runs, client, checkpoint):
    with start(tracking, runs) as tracker:
        uri = tracker.register_model(checkpoint, SCHEMA, digest="abc")
    assert uri == "models:/libra@champion"
    folder = checkpoint_from_registry(uri, tracking, runs)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in checkpoint.iterdir()
    }
    version = client.get_model_version_by_alias("libra", "champion")
    assert version.run_id == tracker.run_id
    assert version.tags["checkpoint_digest"] == "abc"


def test_the_registered_model_has_its_schema(tracking, runs, checkpoint):
    with start(tracking, runs) as tracker:
        uri = tracker.register_model(checkpoint, SCHEMA, digest="abc")
    model = Model.load(str(checkpoint_from_registry(uri, tracking, runs).parents[1]))
    inputs = {spec.name: (spec.type, spec.shape) for spec in model.signature.inputs.inputs}
    assert inputs["observation.image"] == ("uint8", (-1, 64, 64, 3))
    assert inputs["observation.state"] == ("float32", (-1, 4))
    assert inputs["instruction"][1] == (-1,)
    assert [(spec.name, spec.shape) for spec in model.signature.outputs.inputs] == [("action", (-1, 5, 4))]


class StubPolicy:
    """Plans nothing, and answers each robot with its own state."""

    def plan(self, observations):
        return [Plan(tokens=np.zeros((10, 4), np.int64), first_step=0) for _ in observations]

    def refine(self, observations, plans):
        assert [o.instruction for o in observations] == ["open", "close it"]
        assert observations[0].images["observation.image"].shape == (64, 64, 3)
        return [ActionChunk(actions=np.tile(o.state, (5, 1)), first_step=0, plan_first_step=0) for o in observations]


def test_a_registered_model_predicts_under_its_schema(tracking, runs, checkpoint, monkeypatch):
    opened = []
    monkeypatch.setattr(registered_model, "load_policy", lambda folder: opened.append(folder) or StubPolicy())
    with start(tracking, runs) as tracker:
        uri = tracker.register_model(checkpoint, SCHEMA, digest="abc")
    model = mlflow.pyfunc.load_model(uri)
    assert (opened[0] / "model.safetensors").read_bytes() == b"weights"
    state = np.arange(8, dtype=np.float32).reshape(2, 4)
    robots = {
        "observation.image": np.zeros((2, 64, 64, 3), np.uint8),
        "observation.state": state,
        "instruction": np.array(["open", "close it"]),
    }
    action = model.predict(robots)["action"]
    assert action.shape == (2, 5, 4)
    assert np.array_equal(action[:, 0], state)
    with pytest.raises(mlflow.MlflowException):
        model.predict(robots | {"observation.image": np.zeros((2, 32, 32, 3), np.uint8)})


def test_a_digest_is_registered_once_per_run(tracking, runs, client, checkpoint):
    with start(tracking, runs) as tracker:
        tracker.register_model(checkpoint, SCHEMA, digest="abc")
        tracker.register_model(checkpoint, SCHEMA, digest="abc", alias="best")
    with start(tracking, runs, tracker.run_id) as again:
        again.register_model(checkpoint, SCHEMA, digest="abc")
        mine = [v for v in client.search_model_versions("name = 'libra'") if v.run_id == tracker.run_id]
        assert len(mine) == 1
        again.register_model(checkpoint, SCHEMA, digest="def")
    newest = client.get_model_version_by_alias("libra", "champion")
    assert (newest.run_id, newest.tags["checkpoint_digest"]) == (tracker.run_id, "def")
    assert client.get_model_version_by_alias("libra", "best").version == mine[0].version


def test_an_unknown_model_is_refused_with_the_known_ones(tracking, runs, checkpoint):
    with start(tracking, runs) as tracker:
        tracker.register_model(checkpoint, SCHEMA, digest="abc")
        with pytest.raises(ValueError, match="reserved"):
            tracker.register_model(checkpoint, SCHEMA, digest="abc", alias="latest")
    with pytest.raises(ValueError, match="models:/libra@champion"):
        checkpoint_from_registry("models:/libra@nobody", tracking, runs)


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "/somewhere/mlruns"])
def test_a_folder_as_store_is_refused(tmp_path, uri):
    with pytest.raises(ValueError, match="sqlite:///"):
        Tracker.start(TrackingConfig(uri=uri), tmp_path, "run")


def test_a_fresh_store_is_quiet_light_and_leaves_nothing_else(first_process):
    """A new process with a new store: no torch, no Ray, no chatter, no files but its own."""
    assert first_process.returncode == 0, first_process.stderr
    assert first_process.stdout + first_process.stderr == ""
    folder = Path(first_process.args[-1])
    assert {path.name for path in folder.iterdir()} == {"checkpoint", "runs"}
    assert {path.name for path in (folder / "runs").iterdir()} == {"mlflow.db", "mlartifacts"}
