"""The files of runs and sweeps stay as they were: written by the first edition, they are read, and written the same again."""

import json
import shutil
from pathlib import Path

import pytest

from libra_ray import config as configuration
from libra_ray.common.files import read_jsonl
from libra_ray.common.json_text import dump, plain, read
from libra_ray.evaluation.log import LOG_NAME, LogRow, read_evaluation
from libra_ray.on_ray.sweep.sweep_folder import RUNGS_NAME, Identity, TrialFolder, WrittenOrder
from libra_ray.on_ray.sweep.trial import measures
from libra_ray.report.records import Report
from libra_ray.report.run_report import build_report, write_report
from libra_ray.report.sweep.records import SweepReport
from libra_ray.report.sweep.report import build_sweep, sweep_table, write_sweep
from libra_ray.report.table import summary_table
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import LoggedStep, TrainingLog
from libra_ray.runs.trials import Rung, TrialResult

FIRST_EDITION = Path(__file__).parents[1] / "fixtures" / "first_edition"
RUN, SWEEP = FIRST_EDITION / "run", FIRST_EDITION / "sweep"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TRIALS = sorted(SWEEP.glob("trials/*"))
OF_THIS_MACHINE = ("created_at", "git_revision", "config")


def tree(path: Path):
    return json.loads(path.read_text())


def in_todays_words(value):
    """A report as this version writes it: it speaks of phases, where earlier ones knew the end of teacher forcing alone."""
    if "training" not in value:
        return value
    training = dict(value["training"])
    until = training.pop("teacher_forcing_until")
    began = [] if until is None else [{"name": "sampled", "first_step": until}]
    return value | {"training": training | {"phases": began}}


def shared(report: dict) -> dict:
    """What does not depend on when and by which version a report is made."""
    return {name: value for name, value in report.items() if name not in OF_THIS_MACHINE}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (RUN / "report.json", Report),
        (RESULTS / "quickstart.json", Report),
        (RESULTS / "mt10.json", Report),
        (SWEEP / "sweep.json", SweepReport),
        *((trial / "result.json", TrialResult) for trial in TRIALS),
        *((trial / "trial.json", WrittenOrder) for trial in TRIALS),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value.__name__,
)
def test_a_file_is_read_and_written_as_it_was(path, kind):
    assert json.loads(dump(read(kind, path))) == in_todays_words(tree(path))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (RUN / LOG_NAME, LogRow),
        (RUN / "train_log.jsonl", LoggedStep),
        *((trial / RUNGS_NAME, Rung) for trial in TRIALS),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value.__name__,
)
def test_a_row_is_read_and_written_as_it_was(path, kind):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    assert [plain(row) for row in read_jsonl(path, kind)] == rows


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """The run of the first edition, opened by this one."""
    shutil.copytree(RUN, tmp_path / "debug")
    return RunFolder(tmp_path / "debug", configuration.from_json((RUN / "config.json").read_text()))


def test_the_report_of_an_old_run_is_made_again(run, tmp_path):
    """From its episodes and its training log, the same report."""
    old, log = read(Report, RUN / "report.json"), TrainingLog.read(run.path("train_log.jsonl"))
    again = build_report(
        config=run.config,
        evaluation=read_evaluation(run),
        training_log=log,
        wall_s=old.wall_s,
        levels=("planner", "refiner"),
        dataset=old.dataset,
        checkpoint=old.checkpoint,
        mlflow_run_id=old.mlflow_run_id,
        hardware=old.hardware,
    )
    before, made = shared(in_todays_words(tree(RUN / "report.json"))), shared(plain(again))
    # The old report did not say so, its log does.
    assert made["training"].pop("phases") == [{"name": "ground_truth", "first_step": 2}]
    assert made | {"training": made["training"] | {"phases": []}} == before
    page = write_report(tmp_path, old, [], log).read_text()
    assert shared(tree(tmp_path / "report.json")) == before
    assert "refiner latency" in page
    assert "wall time: record 6 s" in summary_table(old)


def test_an_old_run_goes_on(run):
    assert run.done("total")
    assert run.wall_s("train") == tree(RUN / "stages.json")["train"]["wall_s"]
    assert run.fact("mlflow_run_id", str) == tree(RUN / "report.json")["mlflow_run_id"]
    before = tree(run.path("stages.json"))
    run.note("answer", 42)
    assert tree(run.path("stages.json")) == before | {"answer": 42}


def test_the_report_of_an_old_sweep_is_made_again(tmp_path):
    old = read(SweepReport, SWEEP / "sweep.json")
    trials = [result for trial in TRIALS if (result := TrialFolder(root=trial).result())]
    again = build_sweep(
        config=configuration.from_json((RUN / "config.json").read_text()),
        space=old.space,
        settings=old.settings,
        trials=trials,
        objectives=old.objectives,
        importance=old.importance,
        wall_s=old.wall_s,
        hardware=old.hardware,
        mlflow_run_id=old.mlflow_run_id,
    )
    assert shared(plain(again)) == shared(tree(SWEEP / "sweep.json"))
    assert "front" in write_sweep(tmp_path, old).read_text()
    assert sweep_table(old) == sweep_table(again)


def test_an_old_sweeps_plan_is_what_a_continued_one_compares():
    identity: Identity = read(dict[str, object], SWEEP / "plan.json")
    settings = plain(read(SweepReport, SWEEP / "sweep.json").settings)
    assert {name: identity[name] for name in settings if name not in ("hours", "concurrent")} == {
        name: value for name, value in settings.items() if name not in ("hours", "concurrent")
    }


def test_the_measures_of_a_log_are_any_losses_and_parts():
    """Levels and losses are known by no name: what is logged is kept, but what measures no policy is not."""
    rows = [
        LoggedStep(
            step=step,
            metrics={"loss": 3.0, "loss_skill": 1.0 / step, "grad_norm_middle": float(step), "lr": 0.1, "weight_skill": 1.0},
        )
        for step in range(1, 21)
    ]
    assert measures(TrainingLog(rows=rows)) == {"loss": 3.0, "loss_skill": 0.05, "grad_norm_middle": 19.5}


def test_a_log_of_any_levels_is_read(run):
    """Each has its columns; a column without its partner is told."""
    calls = {"coarse_ms": [1.0], "coarse_batch": [2], "middle_ms": [3.0], "middle_batch": [4], "fine_ms": [], "fine_batch": []}
    run.path(LOG_NAME).write_text(json.dumps({"controller": "policy", "latencies": calls}) + "\n")
    found = read_evaluation(run).latencies
    assert {level: (list(of.ms), list(of.robots)) for level, of in found.items()} == {
        "coarse": ([1.0], [2]),
        "middle": ([3.0], [4]),
        "fine": ([], []),
    }
    run.path(LOG_NAME).write_text(json.dumps({"controller": "policy", "latencies": {"coarse_ms": [1.0]}}) + "\n")
    with pytest.raises(ValueError, match="one per latency"):
        read_evaluation(run)


def test_a_broken_report_is_named(tmp_path):
    broken = tree(RUN / "report.json")
    del broken["wall_s"]["total"]
    (tmp_path / "report.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"report\.json: wall_s\.total: Field required"):
        read(Report, tmp_path / "report.json")
