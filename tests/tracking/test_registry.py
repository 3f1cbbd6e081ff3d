"""Checkpoints in the registry: with the schema of the checkpoint, found again, and opened to predict what the policy would."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.models import Model

from libra_ray import checkpoint as checkpoints
from libra_ray.config import Config, TrackingConfig, override
from libra_ray.policy import act, load_policy
from libra_ray.report import publish
from libra_ray.runs import mlflow_model as registered_model
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import LoggedStep, TrainingLog
from libra_ray.tracking import Tracker, TrackingError, checkpoint_from_registry
from libra_ray.tracking.registry import ArrayShape, ModelShape
from libra_ray.types import ActionChunk, RobotShape
from tests.model.builders import KEYS, make_observation, save_checkpoint, tiny_model
from tests.policies import DualStub, dual_levels, plan_of
from tests.tracking.conftest import SCHEMA


def start(tracking, runs, run_id=""):
    return Tracker.start(tracking, runs, "quickstart", run_id)


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


class StubPolicy(DualStub):
    """Plans nothing, and answers each robot with its own state."""

    levels = dual_levels(10, 5)

    def plan(self, observations):
        return [plan_of(np.zeros((10, 4), np.int64), 0) for _ in observations]

    def refine(self, observations, plans):
        assert [o.instruction for o in observations] == ["open", "close it"]
        assert observations[0].images["observation.image"].shape == (64, 64, 3)
        return [ActionChunk(actions=np.tile(o.state, (5, 1)), first_step=0, intent_first_step=0) for o in observations]


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
    asked = Path(mlflow.artifacts.download_artifacts(f"{uri}/requirements.txt")).read_text().splitlines()
    assert any(line.startswith("libra-ray[policy]==") for line in asked), "the client alone could not load it"
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


TWO_CAMERAS = RobotShape(action_dim=4, state_dim=5, cameras=2)


@pytest.fixture
def trained(tmp_path):
    """Makes the run folder of a trained policy."""

    def make(changes=None, shape=TWO_CAMERAS):
        folder = RunFolder.open(tmp_path / "trained", (model := tiny_model(changes, shape)).config)
        save_checkpoint(folder.path("checkpoint"), model, step=4)
        return folder

    return make


def inputs(robots, history):
    """The same observations as MLflow's `predict` takes them."""

    def pictures(robot, key):
        return robot.pictures(key, history) if history > 1 else robot.images[key]

    return {
        **{key: np.stack([pictures(robot, key) for robot in robots]) for key in robots[0].images},
        "observation.state": np.stack([robot.state for robot in robots]),
        "instruction": np.array([robot.instruction for robot in robots]),
    }


def offline(folder, robots):
    """The first chunk of each robot by the policy itself."""
    policy = load_policy(folder)
    return np.stack([chunk.actions for chunk in act(policy, robots)])


@pytest.mark.parametrize(("cameras", "history"), [(2, 2), (2, 1), (1, 2)])
def test_any_checkpoint_is_registered_as_what_it_is_and_predicts_as_it_does(tracking, runs, trained, cameras, history):
    folder = trained({"data.history": history}, RobotShape(action_dim=4, state_dim=5, cameras=cameras))
    with start(tracking, runs) as tracker:
        publish.publish_training(folder, tracker, TrainingLog(rows=[LoggedStep(step=4, metrics={"loss": 1.0})]))
    model = mlflow.pyfunc.load_model("models:/libra@champion")
    shapes = {spec.name: spec.shape for spec in model.metadata.signature.inputs.inputs}
    picture = (-1, 2, 32, 32, 3) if history == 2 else (-1, 32, 32, 3)
    assert shapes == dict.fromkeys(KEYS[:cameras], picture) | {"observation.state": (-1, 5), "instruction": (-1,)}
    assert [spec.shape for spec in model.metadata.signature.outputs.inputs] == [(-1, folder.config.action.horizon, 4)]

    robots = [make_observation(robot, past=history - 1, cameras=cameras) for robot in range(3)]
    given = inputs(robots, history)
    np.testing.assert_array_equal(model.predict(given)["action"], offline(folder.path("checkpoint"), robots))
    with pytest.raises(mlflow.MlflowException, match=KEYS[cameras - 1]):
        model.predict({name: value for name, value in given.items() if name != KEYS[cameras - 1]})


@pytest.mark.parametrize("history", [1, 2])
def test_a_model_registered_with_one_picture_of_one_camera_still_predicts(tracking, runs, trained, history):
    """As models were registered before schemas were the checkpoint's own; a history begins with the picture repeated."""
    folder = trained({"data.history": history}, RobotShape(action_dim=4, state_dim=5, cameras=1))
    horizon = folder.config.action.horizon
    schema = ModelShape(
        inputs={
            "observation.image": ArrayShape(dtype="uint8", shape=(-1, 32, 32, 3)),
            "observation.state": ArrayShape(dtype="float32", shape=(-1, 5)),
            "instruction": ArrayShape(dtype="str", shape=(-1,)),
        },
        outputs={"action": ArrayShape(dtype="float32", shape=(-1, horizon, 4))},
    )
    digest = checkpoints.read_manifest(folder.path("checkpoint")).digest
    with start(tracking, runs) as tracker:
        tracker.register_model(folder.path("checkpoint"), schema, digest=digest)
    robots = [make_observation(robot) for robot in range(3)]
    action = mlflow.pyfunc.load_model("models:/libra@champion").predict(inputs(robots, 1))["action"]
    np.testing.assert_array_equal(action, offline(folder.path("checkpoint"), robots))


def test_cameras_of_different_histories_are_refused(trained):
    policy = registered_model.RegisteredPolicy(load_policy(trained({"data.history": 2}).path("checkpoint")))
    given = inputs([make_observation(cameras=2, past=1)], 2)
    with pytest.raises(ValueError, match="pictures of the same steps"):
        policy.predict(given | {KEYS[1]: given[KEYS[1]][:, 1:]})
    with pytest.raises(ValueError, match=r"shorter|longer"):
        policy.predict(given | {KEYS[1]: np.repeat(given[KEYS[1]], 2, axis=0)})


@pytest.mark.parametrize("name", ["with space", "ümläut", "a&b=c", "plus+,;(x)", "back\\slash", "tick`", "0", "-"])
def test_a_name_that_the_settings_let_pass_is_one_that_comes_back(runs, checkpoint, name):
    tracking = override(Config(), {"tracking.registered_model": name}).tracking
    with start(tracking, runs) as tracker:
        address = tracker.register_model(checkpoint, SCHEMA, digest="abc")
    assert (checkpoint_from_registry(address, tracking, runs) / "config.json").read_text() == "{}"


def test_a_store_that_is_not_there_is_not_made_by_asking(tmp_path, monkeypatch):
    """In another working folder the relative address is another file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match=str(tmp_path / "runs" / "mlflow.db")):
        checkpoint_from_registry("models:/libra@champion", TrackingConfig(), Path("runs"))
    assert list(tmp_path.iterdir()) == []


def test_what_other_code_registered_is_refused(tracking, runs, tmp_path):
    with start(tracking, runs) as tracker, pytest.MonkeyPatch.context() as patch:
        patch.setattr("libra_ray.tracking.registry.LOADER_MODULE", "mlflow.sklearn")
        (tmp_path / "file").write_text("x")
        address = tracker.register_model(tmp_path / "file", SCHEMA, digest="other", alias="theirs")
    with pytest.raises(ValueError, match=r"no policy of libra_ray; registered there: .*models:/libra@theirs"):
        checkpoint_from_registry(address, tracking, runs)


def test_reading_a_model_writes_nothing_into_the_store(tracking, runs, checkpoint, client):
    with start(tracking, runs) as tracker:
        address = tracker.register_model(checkpoint, SCHEMA, digest="read")
    before = sorted(runs.rglob("*"))
    folder = checkpoint_from_registry(address, tracking, runs)
    assert runs in folder.parents
    assert sorted(runs.rglob("*")) == before
