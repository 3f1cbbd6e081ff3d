"""One run in MLflow: the same one after every restart, nothing logged twice, and no work lost where the store fails."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from libra_ray.config import TrackingConfig, override, preset
from libra_ray.config.overrides import flatten
from libra_ray.report import publish
from libra_ray.runs.folder import RunFolder
from libra_ray.tracking import Tracker, TrackingError, publishing, tracking_uri
from tests.tracking.conftest import JOBS

ROWS = [(step, {"loss": 1 / step, "accuracy": None, "lr": 0.1}) for step in range(20, 1201, 20)]


def start(tracking, runs, run_id=""):
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
    assert [metric.step for metric in history] == [step for step, _ in ROWS]
    assert [metric.value for metric in history] == [metrics["loss"] for _, metrics in ROWS]
    assert len(client.get_metric_history(tracker.run_id, "success_policy")) == 1
    assert set(client.get_run(tracker.run_id).data.metrics) == {"loss", "lr", "success_policy"}


def test_many_metrics_go_in_few_calls(tracking, runs, client, monkeypatch):
    calls = []
    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *args, **kwargs: calls.append(1) or log_batch(*args, **kwargs))
    with start(tracking, runs) as tracker:
        tracker.log_step_metrics([(step, {f"m{i}": 1.0 for i in range(10)}) for step in range(250)])
    assert len(calls) == 3
    assert len(client.get_metric_history(tracker.run_id, "m9")) == 250


def test_artifacts_lie_beside_the_store(tracking, runs, client, checkpoint):
    with start(tracking, runs) as tracker:
        tracker.log_artifact(checkpoint / "config.json")
        tracker.log_artifact(checkpoint)
    assert {item.path for item in client.list_artifacts(tracker.run_id)} == {"config.json", "checkpoint"}
    assert list((runs / "mlartifacts" / tracker.run_id).rglob("model.safetensors"))


def test_a_fresh_store_is_quiet_light_and_leaves_nothing_else(first_process):
    """A new process with a new store: no torch, no Ray, no chatter, no files but its own."""
    assert first_process.returncode == 0, first_process.stderr
    assert first_process.stdout + first_process.stderr == ""
    folder = Path(first_process.args[-1])
    assert {path.name for path in folder.iterdir()} == {"checkpoint", "runs"}
    assert {path.name for path in (folder / "runs").iterdir()} == {"mlflow.db", ".mlflow.db.lock", "mlartifacts"}


def test_jobs_that_begin_together_all_come_to_their_end(first_process, client):
    """One makes the store, one the experiment, one the registered model; the others wait and take them."""
    assert first_process.returncode == 0, first_process.stderr
    experiments = client.search_experiments(filter_string="name = 'libra_ray'")
    assert len(experiments) == 1
    begun = [run for run in client.search_runs([experiments[0].experiment_id]) if run.info.run_name == "first"]
    assert [run.info.status for run in begun] == ["FINISHED"] * JOBS
    assert all(len(client.get_metric_history(run.info.run_id, "loss")) == 20 for run in begun)
    versions = [v for v in client.search_model_versions("name = 'libra'") if v.run_id in {run.info.run_id for run in begun}]
    assert len({v.version for v in versions}) == len({v.tags["checkpoint_digest"] for v in versions}) == JOBS


def test_what_is_not_taken_is_said_and_published_by_the_same_command(tracking, runs, client, disk_full, capsys):
    first = start(tracking, runs)
    with pytest.raises(TrackingError, match=r"not in MLflow yet: the training; .*run the same command again"), first:  # noqa: PT012
        with publishing(first, "the training"), disk_full():
            first.log_step_metrics(ROWS)
        with publishing(first, "the evaluation"):
            first.log_metrics(1, {"success": 1.0})
    [line] = capsys.readouterr().err.splitlines()
    assert "the training is not in MLflow yet" in line
    assert str(runs / "mlflow.db") in line
    with start(tracking, runs, first.run_id) as again, publishing(again, "the training"):
        again.log_step_metrics(ROWS)
    assert len(client.get_metric_history(first.run_id, "loss")) == len(ROWS)
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_run_that_cannot_be_closed_hides_no_error(tracking, runs, disk_full, capsys):
    """The disk is full: the error of the work is raised, that of closing the run is one line before it."""
    tracker = start(tracking, runs)
    with pytest.raises(OSError, match="of the work"), disk_full(), tracker:
        raise OSError("of the work")
    [line] = capsys.readouterr().err.splitlines()
    assert "how the run ended is not in MLflow yet" in line


def test_a_store_that_is_away_ends_a_job_before_it_begins(away, tmp_path):
    folder = RunFolder.open(tmp_path / "run", override(preset("debug"), {"tracking.uri": away.uri}))
    with pytest.raises(TrackingError, match=r"tracking.required") as refused:
        publish.tracked(folder)
    assert away.uri in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_store_that_need_not_be_there_is_tried_again(away, tmp_path, runs, client, capsys):
    """Untracked, a job comes to its end; as soon as the store is back, the run begins there with its settings."""
    changes = {"tracking.uri": away.uri, "tracking.required": False}
    folder = RunFolder.open(tmp_path / "untracked", override(preset("debug"), changes))
    with publish.tracked(folder) as tracker, publishing(tracker, "the training"):
        tracker.log_step_metrics(ROWS)
    assert [away.uri in line for line in capsys.readouterr().err.splitlines()] == [True, True]
    assert folder.fact(publish.RUN_ID, str) is None

    back = override(folder.config, {"tracking.uri": tracking_uri(TrackingConfig(), runs)})
    with publish.tracked(RunFolder.open(folder.root, back)) as tracker, publishing(tracker, "the training"):
        tracker.log_step_metrics(ROWS)
    found = client.get_run(folder.fact(publish.RUN_ID, str))
    assert (found.info.status, found.data.params["train.steps"]) == ("FINISHED", str(folder.config.train.steps))
    assert "loss" in found.data.metrics
    assert capsys.readouterr().err == ""
