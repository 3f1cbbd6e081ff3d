"""A sweep on a real cluster, its driver killed half-way: the objective is real, nothing runs twice, nothing stays behind."""

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import ray
import sweep as job
import yaml
from arguments import parse

from libra_ray.common.files import read_jsonl
from libra_ray.common.json_text import plain, read
from libra_ray.on_ray.sweep import publish, runner
from libra_ray.on_ray.sweep.sweep_folder import SweepFolder, settings_of
from libra_ray.report.publish import tracked
from libra_ray.report.sweep.records import SweepReport
from libra_ray.runs.results import TrainingLog
from tests.processes import command, family
from tests.spaces import load_space

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)  # one fixture runs the sweep, killed and continued
PATIENCE_S = 600
SPACE = """
from ray import tune
SPACE = {"action.bins": tune.choice([4, 10]), "train.lr": tune.choice([1e-3, 1e30])}
SEARCH = "grid"
"""
OPTIONS = (
    "--name=mine", "--trials=3", "--scheduler=asha", "--concurrent=2", "--train.steps=18", "--train.log_every=1",
    "--train.checkpoint_every=5", "--train.validate_every=9", "--sim.max_steps=40",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A sweep that was killed and continued.

    Attributes:
        before: result files at the kill, with their times.
        begun: folders of the trials that were begun then.
        outlived: the killed driver's placement groups that were still there when it was continued.
    """

    sweep: SweepFolder
    report: SweepReport
    before: dict[Path, int]
    begun: set[str]
    outlived: list[str]


@pytest.fixture(scope="module")
def swept(ray_cluster, demonstrations, tmp_path_factory) -> Swept:
    """Two values of N at a good learning rate, and a trial whose loss is soon not finite; killed when the first has ended."""
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "mine.py").write_text(SPACE)
    argv = ["debug", str(folder / "mine.py"), f"--runs={folder}", f"--data.root={demonstrations}", *OPTIONS]
    root = folder / "mine"
    jobs_before = _holders()
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "sweep.py"), *argv],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors.txt").open("w"),
        process_group=0,
    )
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not list(root.glob("trials/*/result.json")):
            assert driver.poll() is None, (folder / "errors.txt").read_text()
            assert time.monotonic() < deadline, "no trial has ended"
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = {path: path.stat().st_mtime_ns for path in root.glob("trials/*/result.json")}
    begun = {path.parent.name for path in root.glob("trials/*/trial.json")}
    while (outlived := sorted(_holders() - jobs_before)) and time.monotonic() < deadline:
        time.sleep(0.2)

    given = parse([*argv, "--resume"], "", stage="sweep", more=job.OPTIONS, default_name=job.default_name)
    space = load_space(given.more["space"], given.config)
    settings = settings_of(space, given.config, {**given.more, "seeds": 1})
    sweep = SweepFolder.open(root, given.config, space, settings, resume=True)
    with tracked(sweep.run) as tracker:
        runner.run(sweep, lambda trial, result: publish.publish_trial(sweep, tracker, trial, result))
        report = publish.publish_sweep(sweep, tracker)
    return Swept(sweep=sweep, report=report, before=before, begun=begun, outlived=outlived)


def _holders() -> set[str]:
    """Placement groups, of whichever driver, that hold or want resources."""
    return {name for name, row in ray.util.placement_group_table().items() if row["state"] != "REMOVED"}


def test_killed_half_way_it_ends_with_the_same_trials_and_none_run_twice(swept):
    assert 0 < len(swept.before) < 3
    assert swept.begun <= {path.name for path in swept.sweep.run.path("trials").iterdir()}
    assert [(trial.number, trial.seed) for trial in swept.report.trials] == [(n, 0) for n in range(3)]
    assert {path: path.stat().st_mtime_ns for path in swept.before} == swept.before, "what had ended was left alone"
    for log in swept.sweep.run.root.glob("trials/*/train_log.jsonl"):
        steps = [row["step"] for row in read_jsonl(log, dict)]
        assert TrainingLog.read(log).series("loss")[0] == list(range(1, max(steps) + 1)), "contiguous"
        again = [after for before, after in itertools.pairwise(steps) if after <= before]
        assert len(again) <= 1, "one interruption"
        assert all(step % 5 == 1 or step in (3, 7) for step in again), "from its last checkpoint or rung"


def test_nothing_stays_behind(swept):
    assert swept.outlived == []
    assert runner.own_placement_groups() == []
    assert _trials_alive() == []


def _trials_alive() -> list[str]:
    """Processes of trials and of their simulators in this process's cluster, after they have had time to end."""
    deadline, left = time.monotonic() + 20, [""]
    while left and time.monotonic() < deadline:
        words = [command(pid) for pid in family(os.getpid())]
        left = [line for line in words if "ImplicitFunc" in line or "Simulators" in line]
        time.sleep(0.2)
    return left


def test_every_trial_is_counted_as_what_it_became(swept):
    status = {trial.number: trial.status for trial in swept.report.trials}
    assert status[2] == "failed", "its learning rate is absurd"
    words = list(status.values())
    ended = {word: words.count(word) for word in ("finished", "stopped", "failed")}
    assert vars(swept.report.counts) == {"planned": 3, **ended}
    [failed] = [trial for trial in swept.report.trials if trial.status == "failed"]
    assert "FloatingPointError" in failed.error
    assert "Traceback" in (swept.sweep.run.path("trials") / "0002-seed0" / "error.txt").read_text()


def test_the_objective_is_the_closed_loop(swept):
    finished = [trial for trial in swept.report.trials if trial.status == "finished"]
    assert finished
    for trial in finished:
        rows = read_jsonl(swept.sweep.run.path("trials") / f"{trial.number:04d}-seed0" / "evaluation.jsonl", dict)
        played = sorted((row["episode"] for row in rows if "episode" in row), key=lambda row: row["seed"])
        assert [row["seed"] for row in played] == [100_000, 100_001]
        assert trial.episodes == {"policy": {"reach-v3": [row["success"] for row in played]}}
        assert [(rung.budget, rung.step) for rung in trial.rungs] == [(1, 2), (3, 6), (9, 18)]
        assert {"val_plan_resolved", "val_variance_explained", "grad_norm_refiner"} <= trial.measures.keys()
        assert trial.latency_ms > 0


def test_rungs_are_played_on_other_seeds_than_the_end(swept):
    rows = [row for path in swept.sweep.run.root.glob("trials/*/rungs/*/evaluation.jsonl") for row in read_jsonl(path, dict)]
    assert {row["episode"]["seed"] for row in rows if "episode" in row} == {100_002, 100_003}


def test_each_trial_has_its_run_below_the_sweeps(swept):
    client = mlflow.MlflowClient(f"sqlite:///{swept.sweep.run.root.parent / 'mlflow.db'}")
    parent = client.get_run(swept.report.mlflow_run_id)
    runs = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(run.info.run_name for run in runs) == [f"mine/{n:04d}-seed0" for n in range(3)], "each once"
    assert {run.info.run_name[-10:]: run.data.tags["status"] for run in runs} == {
        f"{trial.number:04d}-seed0": trial.status for trial in swept.report.trials
    }
    assert {run.data.params["action.bins"] for run in runs} == {"4", "10"}
    assert parent.info.status == "FINISHED"


def test_the_best_is_a_configuration_that_the_jobs_take(swept):
    best = swept.sweep.run.path("best.yaml")
    taken = parse(["--config", str(best)], "", stage="train").config
    assert taken.preset == "debug"
    assert taken.action.bins == swept.report.configurations[swept.report.best].values["action.bins"]
    assert (taken.train.steps, taken.sim.max_steps) == (18, 40)
    assert yaml.safe_load(best.read_text())["train.steps"] == 18
    assert plain(read(SweepReport, swept.sweep.run.path("sweep.json"))) == plain(swept.report)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--train.steps=19"], r"train.steps \(18 -> 19\)"),
        (["--trials=4"], r"trials \(3 -> 4\)"),
        (["--seeds=2"], r"seeds \(1 -> 2\)"),
    ],
)
def test_a_sweep_is_not_continued_under_other_settings(swept, changes, said):
    argv = ["debug", str(swept.sweep.run.root.parent / "mine.py"), f"--data.root={swept.sweep.run.config.data.root}"]
    given = parse([*argv, *OPTIONS, "--seeds=1", *changes], "", stage="sweep", more=job.OPTIONS)
    settings = settings_of(swept.sweep.space, given.config, given.more)
    with pytest.raises(ValueError, match=said):
        SweepFolder.check(swept.sweep.run.root, given.config, swept.sweep.space, settings, resume=True)
    with pytest.raises(ValueError, match="give --resume to continue"):
        SweepFolder.check(swept.sweep.run.root, given.config, swept.sweep.space, settings, resume=False)
