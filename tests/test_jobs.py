"""The jobs as a user runs them: to the end, killed in every stage, interrupted, submitted, and given nonsense."""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from arguments import parse

from libra_ray.data.dataset import open_dataset
from libra_ray.runs.folder import locked
from libra_ray.runs.results import TrainingLog
from libra_ray.stats.intervals import wilson
from tests.processes import command, family, survivors

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1200)  # one fixture starts the main job four times
PATIENCE_S = 240
STEPS = 60
SMALL = (
    "--record.episodes_per_task=3",
    "--sim.max_steps=80",
    f"--train.steps={STEPS}",
    "--train.checkpoint_every=5",
    "--train.log_every=1",
    "--train.validate_every=30",
    "--evaluate.episodes_per_task=2",
)
REPORT_KEYS = {
    "preset", "wall_s", "tasks", "success_mean", "latency_ms", "intent_age_steps", "throughput", "dataset", "checkpoint",
    "mlflow_run_id",
}  # fmt: skip
TASK_KEYS = {"task", "instruction", "controller", "episodes", "successes", "success", "interval", "errors"}


class Started:
    """A job in a process group of its own, as a terminal starts it."""

    def __init__(self, runs: Path, *arguments: str) -> None:
        self.output = (runs.parent / "stdout.txt").open("w+")
        self.errors = (runs.parent / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "debug", "--runs", str(runs), *SMALL, *arguments],
            cwd=runs.parent,
            env=_environment(),
            stdout=self.output,
            stderr=self.errors,
            process_group=0,
        )

    def until(self, seen: Callable[[], object], what: str) -> None:
        """Wait for progress that can be seen in the run's files."""
        deadline = time.monotonic() + PATIENCE_S
        while not seen():
            assert self.process.poll() is None, f"ended before {what}: {self.said()}"
            assert time.monotonic() < deadline, f"no {what}: {self.said()}"
            time.sleep(0.02)

    def end(self, sent: int | None = None) -> int:
        """Send a signal to the whole group, wait for the end and for that of every process it had started."""
        below = family(self.process.pid)
        if sent is not None:
            os.killpg(self.process.pid, sent)
        code = self.process.wait(PATIENCE_S)
        assert [command(pid) for pid in survivors(below)] == [], "processes outlived their job"
        return code

    def said(self) -> str:
        """Standard error so far."""
        return Path(self.errors.name).read_text()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Iterator[tuple[Path, Started]]:
    """One run, killed in recording and in training, interrupted in evaluation, that then came to its end."""
    runs = tmp_path_factory.mktemp("jobs") / "runs"
    run = runs / "debug"
    job = Started(runs)
    job.until(lambda: list(run.glob("spool/*/*.npz")), "a recorded episode")
    job.end(signal.SIGKILL)
    recorded = {path: path.stat().st_mtime_ns for path in run.glob("spool/*/[0-9]*.npz")}

    job = Started(runs)
    log = run / "train_log.jsonl"
    job.until(lambda: log.exists() and log.read_text().count("\n") > 12, "training")
    job.end(signal.SIGKILL)
    assert recorded
    assert len(TrainingLog.read(log).rows) >= 12

    job = Started(runs)
    rows = run / "evaluation.jsonl"
    job.until(lambda: rows.exists() and rows.read_text().count("\n"), "an evaluated episode")
    assert job.end(signal.SIGINT) == 130
    assert job.said().splitlines()[-1] == "pipeline.py: interrupted; run the same command again to continue"
    assert "Traceback" not in job.said()
    assert _mlflow_run(run).info.status == "KILLED"

    job = Started(runs)
    assert job.end() == 0, job.said()
    return run, job


def _mlflow_run(run: Path):
    mlflow.set_tracking_uri(f"sqlite:///{run.parent / 'mlflow.db'}")
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert len(runs) == 1
    return runs[0]


def test_nothing_is_lost_or_duplicated(interrupted):
    run, _ = interrupted
    dataset = open_dataset(run / "dataset")
    assert len(set(dataset.seeds)) == len(dataset.seeds) == 3
    steps = TrainingLog.read(run / "train_log.jsonl").series("loss")[0]
    assert steps == list(range(1, STEPS + 1))
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    episodes = [(row["episode"]["controller"], row["episode"]["seed"]) for row in rows if "episode" in row]
    controllers = ("expert", "policy", "coarse_only", "zero_action")
    assert sorted(episodes) == sorted((name, seed) for name in controllers for seed in (100_000, 100_001))


def test_the_report_has_what_was_promised(interrupted):
    run, _ = interrupted
    report = json.loads((run / "report.json").read_text())
    assert set(report) >= REPORT_KEYS
    assert set(report["wall_s"]) >= {"record", "train", "evaluate", "total"}
    assert all(set(row) >= TASK_KEYS for row in report["tasks"])
    assert all(row["episodes"] == 2 and row["errors"] == 0 for row in report["tasks"])
    assert set(report["success_mean"]) == {"expert", "policy", "coarse_only", "zero_action"}
    assert set(report["throughput"]) >= {"train_samples_per_s", "env_steps_per_s"}
    assert report["checkpoint"]["step"] == STEPS
    assert report["dataset"]["episodes"] == 3
    assert np.isfinite(report["latency_ms"]["planner"]["p99"])
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert not re.search(r"""(src|href)=["']https?://""", page), "one self-contained page"


def test_one_mlflow_run_holds_it_all(interrupted):
    run, _ = interrupted
    kept = _mlflow_run(run)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_id == json.loads((run / "report.json").read_text())["mlflow_run_id"]
    assert kept.data.params["train.steps"] == str(STEPS)
    assert {"loss_plan", "loss_diff", "grad_norm_planner", "grad_norm_refiner", "success_policy"} <= set(kept.data.metrics)
    between = {"intent_age_steps_p95", "latency_ms_refiner_p99", "deadline_misses_planner", "jerk_boundary"}
    assert between <= set(kept.data.metrics)
    client = mlflow.MlflowClient()
    history = [metric.step for metric in client.get_metric_history(kept.info.run_id, "loss_plan")]
    assert history == sorted(set(history)), "no step twice"
    assert {file.path for file in client.list_artifacts(kept.info.run_id)} >= {"report.json", "report.html"}
    versions = client.search_model_versions("name = 'libra'")
    assert [version.run_id for version in versions] == [kept.info.run_id]


def test_the_user_sees_our_lines_only(interrupted):
    _, job = interrupted
    ours = re.compile(r"(record|write data set|train|evaluate): .*")
    said = job.said()
    assert [line for line in said.splitlines() if not ours.fullmatch(line)] == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said + Path(job.output.name).read_text()), "no control characters"


def test_interrupted_while_still_importing(tmp_path):
    """Ctrl-C in the first second is no traceback either."""
    job = Started(tmp_path / "runs")
    job.until(lambda: "torch" in _maps(job.process.pid), "imports")
    assert job.end(signal.SIGINT) == 130
    assert job.said() == "pipeline.py: interrupted; run the same command again to continue\n"


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def _refusal(capsys, job: str, runs: Path, *argv: str) -> str:
    """The one line on standard error with which a job ends with status 2, having started and written nothing."""
    before = _files(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{job}.py", "debug", "--runs", str(runs), *argv])
        patch.setattr("ray.init", lambda *_, **__: pytest.fail("the cluster was started"))
        with pytest.raises(SystemExit) as end:
            importlib.import_module(job).main()
    assert end.value.code == 2
    assert _files(runs) == before
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{job}.py: error: ")
    return line


def _files(runs: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in runs.rglob("*") if not path.name.endswith(".lock") and path.is_file()}


@pytest.mark.parametrize(
    ("job", "argv", "said"),
    [
        ("pipeline", ["--sim.tasks=drawer-opn-v3"], "drawer-open-v3"),
        ("record", ["--sim.tasks=reach"], "reach-v3"),
        ("train", [], "dataset does not exist"),
        ("train", ["--data.root=/does/not/exist"], "/does/not/exist does not exist"),
        ("pipeline", ["--data.root=/does/not/exist"], "/does/not/exist does not exist"),
        ("train", ["--data.root={tmp}/empty"], "is not a LeRobotDataset"),
        ("train", ["--data.root={tmp}/old"], "convert_dataset_v21_to_v30"),
        ("pipeline", ["--refiner.encoder={tmp}/empty"], "local model folder"),
        ("pipeline", ["--planner.backbone={tmp}/empty"], "local model folder"),
        ("sweep", ["balance", "--refiner.encoder={tmp}/empty"], "local model folder"),
        ("pipeline", ["--ray.train_workers=3"], "not a multiple of ray.train_workers=3"),
        ("train", ["--tracking.uri=http://127.0.0.1:9"], "--tracking.required false"),
        ("evaluate", ["--tracking.uri=postgresql://127.0.0.1:9/db"], "postgresql://127.0.0.1:9/db does not answer"),
        ("pipeline", ["--tracking.registered_model=team/libra"], "tracking.registered_model='team/libra'"),
        ("pipeline", ["--tracking.uri=mlruns"], "sqlite:///<path>/mlflow.db"),
        ("evaluate", [], "is not a checkpoint"),
        ("record", ["--sim.image_size", "48"], "sim.image_size has another name now; give data.image_size=48"),
        ("train", ["--sim.image_size=48"], "sim.image_size has another name now; give data.image_size=48"),
        ("pipeline", ["--evaluate.checkpoint=/does/not/exist"], "/does/not/exist is not a checkpoint"),
    ],
)
def test_nonsense_is_refused_before_any_work(job, argv, said, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old" / "meta").mkdir(parents=True)
    (tmp_path / "old" / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v2.1"}))
    assert said in _refusal(capsys, job, tmp_path / "runs", *(argument.format(tmp=tmp_path) for argument in argv))


def test_pictures_of_another_size_are_refused(interrupted, tmp_path, capsys):
    checkpoint = f"--evaluate.checkpoint={interrupted[0] / 'checkpoint'}"
    line = _refusal(capsys, "evaluate", tmp_path / "runs", checkpoint, "--data.image_size=48")
    assert "give --data.image_size 32" in line


def test_other_settings_are_refused_in_a_folder_that_has_results(interrupted, capsys):
    line = _refusal(capsys, "train", interrupted[0].parent, *SMALL, "--train.lr=0.5")
    assert "train.lr (0.001 -> 0.5)" in line


def test_two_processes_do_not_work_on_one_run(tmp_path, capsys):
    with locked(tmp_path / "runs" / "debug"):
        assert "another process" in _refusal(capsys, "record", tmp_path / "runs")


@pytest.mark.parametrize("raised", ["faults", "library"])
def test_a_fault_keeps_its_traceback(raised, tmp_path):
    """Only what this package raises on purpose is the user's doing."""
    arguments = parse(["debug", "--runs", str(tmp_path)], "", stage="train")
    with pytest.raises(ValueError, match=r"truth value|invalid literal"), arguments.refusing():  # noqa: PT012
        if raised == "faults":
            wilson(0, np.zeros(2))
        else:
            int("seven")


class Head:
    """A cluster beside this process, as `ray start --head` makes it, on ports that nobody uses."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, [str(_free_port()) for _ in range(4)]
        # Unix sockets lie in it, whose paths must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))
        self.address = f"http://127.0.0.1:{self.ports[1]}"
        self.start()

    def start(self) -> None:
        command = [
            "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", "--dashboard-host=127.0.0.1",
            "--port", self.ports[0], "--dashboard-port", self.ports[1], "--ray-client-server-port", self.ports[2],
            "--temp-dir", str(self.temporary),
            # The usual port is taken where another cluster runs, and an agent without its port takes no jobs, for good.
            "--dashboard-agent-listen-port", self.ports[3],
        ]  # fmt: skip
        with (self.folder / "head.txt").open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=_environment(), process_group=0
            )

    def submit(self, *job: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from this checkout. A young cluster has no dashboard yet, and then no agent that takes jobs."""
        submit = ["ray", "job", "submit", "--address", self.address, "--working-dir", ".", "--", *job]
        deadline = time.monotonic() + PATIENCE_S
        while (done := _run(submit)).returncode and re.search("Failed to connect|try again later", done.stdout + done.stderr):
            assert time.monotonic() < deadline, f"{done.stderr}\n{(self.folder / 'head.txt').read_text()}"
            if self.process.poll() is not None:
                # Ray gives a head thirty seconds to start, whatever else the machine has to do.
                self.start()
            time.sleep(1)
        return done

    def stop(self) -> None:
        below = family(self.process.pid)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        for pid in survivors(below, patience_s=10):
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(30)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def head(tmp_path) -> Iterator[Head]:
    head = Head(tmp_path)
    yield head
    head.stop()


def _free_port() -> int:
    with socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
        return int(unbound.getsockname()[1])


def _environment() -> dict[str, str]:
    """This environment's programs first; no cluster's address; one token for the cluster and for who talks to it.

    Left to themselves they disagree where a token lies in the home folder: the head asks for it, `ray job submit` sends none.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


def test_a_job_submitted_to_a_cluster(head, tmp_path):
    runs = tmp_path / "runs"
    done = head.submit(
        "python", "jobs/record.py", "debug", "--runs", str(runs), "--record.episodes_per_task=1", "--ray.simulator_actors=1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "record: 1/1 episodes" in done.stdout
    assert len(open_dataset(runs / "debug" / "dataset").lengths) == 1


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
