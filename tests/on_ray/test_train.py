"""Training on Ray Train: restarted from its last checkpoint after a death, on one worker or two, and never done twice."""

import contextlib
import io
import itertools
import math
import os
import signal
import threading
from dataclasses import dataclass, field

import pytest
import torch
from ray import cloudpickle

from libra_ray import checkpoint
from libra_ray.common.files import read_jsonl
from libra_ray.on_ray import stages, workers
from libra_ray.on_ray import train as training
from libra_ray.runs.folder import RunFolder
from libra_ray.training.data import TrainingData
from tests.on_ray import loops
from tests.on_ray.doubles import debug_config
from tests.processes import command, family

WORKER = "RayTrainWorker"
STEPS, KILLED_AT = 120, 40
# Workers need not find the tests.
cloudpickle.register_pickle_by_value(loops)


@dataclass
class Killer:
    """Kills the training workers once the log has reached `step` and Ray knows a checkpoint, as if they wrote another."""

    log: object
    step: int
    killed: list[int] = field(default_factory=list)

    def __enter__(self):
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def _watch(self):
        while not self.stop.wait(0.02):
            rows, kept = read_jsonl(self.log, dict), self.log.parent / "ray" / training.TRAIN_NAME
            known = kept / "checkpoint_manager_snapshot.json"
            if rows and rows[-1]["step"] >= self.step and known.exists() and training.CHECKPOINT in known.read_text():
                self.killed = [pid for pid in family(os.getpid()) if WORKER in command(pid)]
                for name in (".checkpoint_dead.partial", "checkpoint_dead"):
                    (kept / name / "trainer").mkdir(parents=True)
                for pid in self.killed:
                    os.kill(pid, signal.SIGKILL)
                return


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, what it published and said, and the workers that were killed in it."""

    folder: RunFolder
    tracker: "StubTracker"
    killed: list[int]
    said: list[str]


@dataclass
class StubTracker:
    """Counts what is published."""

    registered: list[str] = field(default_factory=list)
    rows: int = 0
    begins: dict[str, float] = field(default_factory=dict)

    def log_step_metrics(self, rows):
        self.rows = len(rows)
        self.begins |= dict(rows).get(0, {})

    def register_model(self, checkpoint_dir, signature, *, digest):
        self.registered.append(digest)


@pytest.fixture(scope="module")
def killed_run(ray_cluster, demonstrations, runs_dir) -> Run:
    """A run on two workers, both of which were killed half-way; it came to its end all the same."""
    changes = {
        "data__root": demonstrations.name,
        "ray__train_workers": 2,
        "ray__train_cpus_per_worker": 1,
        "train__steps": STEPS,
        "train__checkpoint_every": 20,
        "train__log_every": 5,
        "train__validate_every": 0,
        # Both losses' gradients are measured beside the exchange between workers, and must not disturb it.
        "refiner__vision": "shared",
        "train__balance": "gradient",
    }
    tracker = StubTracker()
    with pytest.MonkeyPatch.context() as patch:
        # A relative data.root is the driver's; workers have folders of their own.
        patch.chdir(demonstrations.parent)
        config = debug_config(**changes)
        folder = RunFolder.open(runs_dir / "killed", config)
        with (
            Killer(folder.path(training.LOG_NAME), step=KILLED_AT) as killer,
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            stages.train(folder, tracker)
    return Run(folder=folder, tracker=tracker, killed=killer.killed, said=said.getvalue().splitlines())


def test_killed_workers_go_on_from_the_last_checkpoint(killed_run):
    folder = killed_run.folder
    assert len(killed_run.killed) == 2
    manifest = checkpoint.read_manifest(folder.path("checkpoint"))
    assert (manifest.step, manifest.finished) == (STEPS, True)
    steps = [row["step"] for row in read_jsonl(folder.path(training.LOG_NAME), dict)]
    assert list(stages.training_log(folder).series("loss")[0]) == list(range(5, STEPS + 1, 5)), (
        "contiguous, and one rank writes"
    )
    again = [after for before, after in itertools.pairwise(steps) if after != before + 5]
    assert len(again) <= 1, "one restart"
    assert all(step > 20 and step % 20 == 5 for step in again), "from a checkpoint, not from the beginning"
    assert killed_run.tracker.registered == [manifest.digest]


def test_what_killed_workers_were_writing_is_gone(killed_run):
    """And both wrote what is left; only the exported checkpoint has weights to run."""
    kept = killed_run.folder.root / "ray" / training.TRAIN_NAME
    folders = [path for path in kept.glob("*checkpoint_*") if path.is_dir()]
    assert len(folders) == training.KEPT
    for folder in folders:
        names = {path.name for path in (folder / "trainer").iterdir()}
        assert {name[: len("shard-00001")] for name in names} == {"shard-00001", "shard-00002", "state.pt"}
        assert not (folder / "weights.safetensors").exists()


def test_how_well_levels_keep_up_is_measured_before_the_first_step(killed_run):
    """Of one robot, by the rank that writes; said once, and published as of step 0."""
    planner, refiner = training.read_margins(killed_run.folder.root)
    assert (planner.level, refiner.level) == ("planner", "refiner")
    assert {planner.robots, refiner.robots} == {1}
    assert planner.p95_ms > 0
    assert [killed_run.said.count(margin.text) for margin in (planner, refiner)] == [1, 1]
    assert planner.late_steps == math.ceil(planner.p95_ms * planner.control_hz / 1000)
    assert killed_run.tracker.begins == {
        f"{name}_{margin.level}": value
        for margin in (planner, refiner)
        for name, value in (("margin_steps", margin.margin_steps), ("latency_p95_ms", margin.p95_ms))
    }


def test_a_finished_stage_says_so(killed_run, capsys):
    log = killed_run.folder.path(training.LOG_NAME)
    stamp = log.stat().st_mtime_ns
    stages.train(killed_run.folder, StubTracker())
    assert f"finished already, the checkpoint is at its last step {STEPS}" in capsys.readouterr().err
    assert log.stat().st_mtime_ns == stamp


def test_resuming_at_the_last_step_ends_on_every_rank(killed_run, demonstrations, monkeypatch):
    """Interrupted after the last step but before the checkpoint was put in its place, nothing is trained twice."""
    monkeypatch.chdir(demonstrations.parent)
    folder = killed_run.folder
    first = checkpoint.read_manifest(folder.path("checkpoint"))
    rows = read_jsonl(folder.path(training.LOG_NAME), dict)
    folder.path("checkpoint").rename(folder.path("checkpoint.before"))
    with folder.stage("train") as clock:
        again = training.train(folder, clock)
    assert again == first
    assert read_jsonl(folder.path(training.LOG_NAME), dict) == rows


def test_a_run_that_has_begun_no_longer_needs_what_it_started_from(demonstrations, make_run):
    folder = make_run("moved", data__root=str(demonstrations), train__start_from="moved-away")
    with pytest.raises(ValueError, match="moved-away is not a checkpoint"):
        stages.check(folder, "train")
    data = TrainingData.open(folder.config, folder.dataset, folder.path("frames"))
    with pytest.raises(ValueError, match="moved-away is not a checkpoint"):
        data.make_model()
    with folder.stage("train"):
        stages.check(folder, "train")
        data.make_model(begun=True)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A fine-tuning whose first validation failed, and that was then started again.

    Attributes:
        said: by the error that ended it.
        rows: of its log at that moment.
    """

    folder: RunFolder
    said: str
    rows: list[dict[str, float]]


@pytest.fixture(scope="module")
def failed_run(untrained, demonstrations, runs_dir) -> Failed:
    """At a learning rate of almost nothing, on a worker that has a folder of its own."""
    few = {"train__steps": 6, "train__checkpoint_every": 2, "train__log_every": 1, "train__validate_every": 4}
    tuned = {"train__start_from": untrained.name, "train__lr": 1e-12, "train__seed": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(untrained.parent)
        config = debug_config(data__root=str(demonstrations), **few, **tuned)
        folder = RunFolder.open(runs_dir / "failing", config)
        with patch.context() as failing:
            failing.setattr(training, "train_loop", loops.failing_at_the_first_validation)
            with pytest.raises(RuntimeError) as caught:
                stages.train(folder, StubTracker())
        rows = read_jsonl(folder.path(training.LOG_NAME), dict)
        stages.train(folder, StubTracker())
    return Failed(folder=folder, said=str(caught.value), rows=rows)


def test_fine_tuning_begins_with_the_checkpoint(untrained, failed_run):
    """And a run that goes on, with what it had."""
    begun, ended = (checkpoint.load(path).model.state_dict() for path in (untrained, failed_run.folder.path("checkpoint")))
    assert all(torch.allclose(ended[name], value, atol=1e-6) for name, value in begun.items())


def test_an_error_that_would_come_again_ends_training_at_once(failed_run):
    """In one line with the place and the log; what was due to be saved at that step is saved, so nothing is trained again."""
    folder, errors = failed_run.folder, failed_run.folder.path("train_errors.log")
    first, last = failed_run.said.split(" (libra_ray/training/fit.py, line ")
    assert first == "training failed: TypeError: no such measure"
    assert last.endswith(f"); the whole traceback is in {errors}")
    assert errors.read_text().count("Traceback") == 1, "tried once"
    assert "in validate\n" in errors.read_text()
    assert [row["step"] for row in failed_run.rows] == [1, 2, 3]
    rows = read_jsonl(folder.path(training.LOG_NAME), dict)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6], "step 4 was saved, and its row is made up for"
    assert ["val_loss_diff" in row for row in rows] == [False] * 3 + [True, False, True]


def test_one_workers_error_ends_the_others_too(demonstrations, make_run):
    """Even where they wait for it in an exchange that will never be."""
    two = {"ray__train_workers": 2, "ray__train_cpus_per_worker": 1}
    folder = make_run("one-of-two", data__root=str(demonstrations), **two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_loop", loops.failing_on_the_second_rank)
        with pytest.raises(RuntimeError, match="training failed: ValueError: rank 1 cannot; the whole traceback is in"):
            stages.train(folder, StubTracker())
    assert folder.path("train_errors.log").read_text().count("--- worker 1") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ray__train_workers": 5}, r"5 CPUs.*gives Ray 4"),
        ({"ray__train_cpus_per_worker": 6}, r"6 CPUs.*gives Ray 4"),
        ({"ray__use_gpu": True}, r"1 GPUs.*gives Ray 0"),
    ],
)
def test_more_than_this_machine_has_is_refused(ray_cluster, changes, words):
    with pytest.raises(ValueError, match=words):
        workers.scaling(debug_config(**changes))
