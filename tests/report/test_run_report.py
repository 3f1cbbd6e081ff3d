import json
import math
import re
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libra_ray.common.json_text import dump, parse, read
from libra_ray.common.provenance import Hardware, describe_hardware, git_revision, public_config
from libra_ray.config import override, preset
from libra_ray.report.page import render_page
from libra_ray.report.publish import figures_of, margin_figures
from libra_ray.report.records import (
    AgeHistogram,
    EpisodeError,
    Errors,
    HeldActions,
    Report,
    Throughput,
)
from libra_ray.report.run_report import write_report
from libra_ray.report.table import summary_table
from libra_ray.runs.results import EpisodeResult, Evaluation, LevelLatencies, TrainingLog
from libra_ray.stats.intervals import percentiles, wilson
from tests.report import builders


def result(*, seed=0, controller="policy", task="reach-v3", **changes):
    fields = {"success": True, "steps": 10} | changes
    return EpisodeResult(task=task, instruction="reach", controller=controller, seed=seed, **fields)


def report_of(*results, log=None, **measured):
    return builders.report(builders.small_config(), Evaluation(results=results, **measured), log or TrainingLog())


# intervals


def test_wilson_solves_its_own_equation():
    """Each bound is the success rate at which the observed share lies exactly 1.96 standard errors away."""
    share, episodes = 18 / 25, 25
    interval = wilson(18, episodes)
    for bound in (interval.low, interval.high):
        assert abs(share - bound) / math.sqrt(bound * (1 - bound) / episodes) == pytest.approx(1.959964, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(counts):
    successes, episodes = counts
    interval, mirrored = wilson(successes, episodes), wilson(episodes - successes, episodes)
    assert -1e-12 <= interval.low <= successes / episodes + 1e-12
    assert successes / episodes - 1e-12 <= interval.high <= 1 + 1e-12
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-9)


def test_wilson_without_episodes_is_unknown_and_impossible_counts_are_refused():
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match="must lie in"):
        wilson(3, 2)


def test_percentiles_of_nothing_are_unknown():
    assert set(vars(percentiles([])).values()) == {None}
    assert percentiles([1.0, 2.0, 3.0]).p50 == 2.0


# results


def test_evaluation_refuses_an_episode_counted_twice():
    Evaluation(results=[result(seed=1), result(seed=1, controller="expert")])
    with pytest.raises(ValueError, match="more than once"):
        Evaluation(results=[result(seed=1), result(seed=1)])


def test_evaluation_refuses_latencies_without_batch_sizes():
    with pytest.raises(ValueError, match="one per latency, 1"):
        LevelLatencies(ms=[1.0])


def test_training_log_after_a_resume_keeps_the_last_row_of_a_step(tmp_path):
    path = tmp_path / "train_log.jsonl"
    rows = [{"step": 20, "loss": 3.0}, {"step": 40, "loss": 2.0}, {"step": 40, "loss": 1.5}, {"step": 60, "loss": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 80, "lo')
    assert TrainingLog.read(path).series("loss") == ([20, 40, 60], [3.0, 1.5, 1.0])
    assert TrainingLog.read(tmp_path / "missing.jsonl").rows == []


def test_training_log_reads_on_behind_a_row_cut_short(tmp_path):
    path = tmp_path / "train_log.jsonl"
    path.write_text('{"step": 20, "loss": 3.0}\n{"step": 40, "lo{"step": 40, "loss": 2.0}\n{"step": 60, "loss": 1.0}\n')
    assert TrainingLog.read(path).series("loss") == ([20, 40, 60], [3.0, 2.0, 1.0])


def test_training_log_names_the_broken_line(tmp_path):
    path = tmp_path / "train_log.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"train_log.jsonl, line 2"):
        TrainingLog.read(path)


def phases(log) -> list[tuple[str, int]]:
    return [(phase.name, phase.first_step) for phase in log.phases]


def test_training_log_finds_the_phases():
    assert phases(builders.training_log(steps=400, every=20, switch=200)) == [("ground_truth", 20), ("sampled", 200)]
    assert phases(builders.training_log(steps=400, every=20, switch=9999)) == [("ground_truth", 20)]
    three = [
        {"step": step, **{f"phase_{name}": float(i == n) for n, name in enumerate("cab")}} for i, step in enumerate((2, 4, 6))
    ]
    assert phases(builders.log_of(*three)) == [("c", 2), ("a", 4), ("b", 6)]
    assert phases(builders.log_of({"step": 2, "loss": 1.0})) == []


def test_the_log_of_an_earlier_version_says_its_phases_too():
    rows = [{"step": step, "teacher_forcing": float(step < 5)} for step in (2, 4, 6)]
    assert phases(builders.log_of(*rows)) == [("ground_truth", 2), ("sampled", 6)]


# report


def test_every_episode_counts_and_errors_are_failures():
    report = report_of(result(seed=0), result(seed=1, success=False), result(seed=2, error="RuntimeError: boom", success=True))
    row = report.tasks[0]
    assert (row.episodes, row.successes, row.errors) == (3, 1, 1)
    assert row.success == pytest.approx(1 / 3)
    assert row.error_messages == ["RuntimeError: boom"]
    listed = EpisodeError(task="reach-v3", controller="policy", seed=2, error="RuntimeError: boom")
    assert report.errors == Errors(count=1, first=[listed])


def test_success_mean_is_over_tasks_and_only_of_evaluated_controllers():
    one = [result(seed=seed, success=seed < 1) for seed in range(4)]
    two = [result(seed=seed, task="drawer-open-v3") for seed in range(2)]
    report = report_of(*one, *two)
    assert report.success_mean == {"policy": pytest.approx((0.25 + 1) / 2)}
    pooled = wilson(3, 6)
    assert report.success_interval == {"policy": (pooled.low, pooled.high)}


def test_rows_follow_the_configuration():
    report = builders.report(builders.small_config())
    rows = [(row.task, row.controller) for row in report.tasks]
    controllers = ["expert", "policy", "coarse_only", "zero_action"]
    assert rows == [(task, controller) for task in ("reach-v3", "drawer-open-v3") for controller in controllers]
    assert list(report.success_mean) == controllers


def test_what_a_policy_measures_of_its_answers_is_shown_by_task():
    """In the file, on the page, in the table at the end, and for the tracker."""
    shares = [0.25, 0.75, 0.0]
    results = [result(seed=seed, measures={"share_flow": share}) for seed, share in enumerate(shares[:2])]
    results += [result(task="drawer-open-v3", measures={"share_flow": shares[2], "sure": 0.5}), result(controller="expert")]
    report = report_of(*results, result(seed=9))
    rows = {(row.task, row.controller): row.measures for row in report.tasks}
    assert rows == {
        ("reach-v3", "expert"): None,
        ("reach-v3", "policy"): {"share_flow": 0.5},
        ("drawer-open-v3", "policy"): {"share_flow": 0.0, "sure": 0.5},
    }
    assert parse(Report, dump(report), "report.json").tasks == report.tasks
    page = render_page(report, [], TrainingLog())
    table = page[page.index("What the policy measured of its answers") :].partition("</table>")[0]
    assert re.findall("<td>([^<]*)</td>", table) == ["policy", "0.5", "–", "policy", "0", "0.5"]
    assert "Share of the flow expert" in table
    assert "of the policy's answers: share_flow 0.25, sure 0.5" in summary_table(report)
    assert figures_of(report)["measure_share_flow"] == 0.25


def test_where_nothing_is_measured_nothing_is_shown():
    """As in reports of an earlier version."""
    report = report_of(result())
    assert "measures" not in json.loads(dump(report))["tasks"][0]
    assert "measured of its answers" not in render_page(report, [], TrainingLog())
    assert "of the policy's answers" not in summary_table(report)


def test_report_has_what_was_promised_and_is_strict_json():
    rows = [{"step": 1, "loss": math.nan, "samples_per_s": 100.0}, {"step": 2, "loss": 1.0, "samples_per_s": 300.0}]
    made = builders.report(log=builders.log_of(*rows))
    report = json.loads(dump(made))
    promised = {"preset", "wall_s", "tasks", "success_mean", "success_interval", "latency_ms", "intent_age_steps"}
    promised |= {"held_actions", "throughput", "dataset", "checkpoint", "mlflow_run_id", "hardware", "git_revision"}
    promised |= {"config", "created_at"}
    assert promised <= set(report)
    assert set(report["wall_s"]) == {"record", "train", "evaluate", "total"}
    assert report["throughput"]["train_samples_per_s"] == 200.0
    assert report["throughput"]["env_steps_per_s"] > 0
    assert report["training"]["last"]["loss"] == 1.0
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert parse(Report, dump(made), "report.json") == made


def test_difficulty_is_what_was_measured_last():
    gradients = [{"step": step, "grad_norm_loss_plan": float(step)} for step in range(1, 21)]
    held_out = [{"step": 21, "val_token_entropy": 2.0}, {"step": 22, "val_token_entropy": 1.5, "val_residual_share": 0.1}]
    report = builders.report(log=builders.log_of(*gradients, *held_out))
    assert report.difficulty == {"token_entropy": 1.5, "residual_share": 0.1, "grad_norm_loss_plan": 19.5}
    assert builders.report(log=builders.log_of({"step": 1, "loss": 1.0})).difficulty == {}


def test_report_of_nothing_is_null_not_a_crash(tmp_path):
    report = report_of()
    assert report.tasks == []
    assert report.latency_ms["planner"].p99 is None
    assert report.intent_age_steps.p50 is None
    assert report.throughput == Throughput(train_samples_per_s=None, env_steps_per_s=None, data_wait_share=None)
    write_report(tmp_path, report, [], TrainingLog())
    assert "wall time" in summary_table(report)


def test_latency_histogram_counts_every_call():
    latency = builders.report().latency_ms["planner"]
    assert sum(latency.histogram.counts) == latency.count == 400
    assert latency.p50 <= latency.p95 <= latency.p99 <= latency.max


def test_intent_age_speaks_of_the_policy():
    policy = result(intent_age_steps=[0, 1, 2, 2], held_actions=2, steps=8)
    coarse = result(controller="coarse_only", intent_age_steps=[9] * 50, held_actions=7)
    report = report_of(policy, coarse)
    assert report.intent_age_steps.histogram == AgeHistogram(ages=[0, 1, 2], counts=[1, 1, 2])
    assert report.held_actions == HeldActions(count=2, share=0.25)
    assert report_of(coarse).intent_age_steps.max == 9


def test_files_are_written_whole(tmp_path):
    report = builders.report(builders.small_config())
    page = write_report(tmp_path, report, [], builders.training_log())
    assert read(Report, tmp_path / "report.json") == report
    assert page.read_text().rstrip().endswith("</html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_table_shows_every_task_controller_and_interval():
    report = builders.report()
    table = summary_table(report)
    for row in report.tasks:
        low, high = row.interval
        line = next(line for line in table.splitlines() if row.task in line)
        assert f"{row.success:.2f} ({low:.2f}, {high:.2f})" in line
    assert "mean" in table
    assert "p50/p95/p99" in table


def test_every_margin_is_in_table_and_file_and_a_late_level_stands_out():
    report = builders.report()
    planner, refiner = report.margins
    table = summary_table(report).splitlines()
    assert f"LATE: {planner.text}" in table
    assert planner.text.endswith("action.chunks=8 in training would do")
    assert f"in time: {refiner.text}" in table
    assert [margin["margin_steps"] for margin in json.loads(dump(report))["margins"]] == [20 - 2 * 20, 4]
    assert parse(Report, dump(report), "report.json").margins == [planner, refiner]
    assert margin_figures(report.margins, "evaluated_") == {
        "evaluated_margin_steps_planner": -20.0,
        "evaluated_margin_steps_refiner": 4.0,
        "evaluated_latency_p95_ms_planner": 180.0,
        "evaluated_latency_p95_ms_refiner": 11.0,
    }


# provenance


def test_hardware_of_this_machine():
    hardware = describe_hardware()
    assert hardware.cores >= 1
    assert hardware.memory_gb > 0
    assert hardware.libraries["numpy"] == np.__version__
    assert parse(Hardware, dump(hardware), "hardware") == hardware


def test_git_revision_of_something_else_is_unknown(tmp_path):
    assert git_revision(tmp_path) is None


def test_a_tree_is_dirty_where_its_code_differs_and_nowhere_else(tmp_path):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@localhost")
        return subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True).stdout

    code = ["libra_ray/deep/part.py", "jobs/train.py", "benchmarks/noise.py", "benchmarks/peers/bare.py", "uv.lock"]
    others = ["README.md", "docs/results.md", "benchmarks/results/noise.json", "tests/test_noise.py", ".ci/run"]
    for name in code + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    for name in others:
        (tmp_path / name).write_text("after")
    (tmp_path / "libra_ray" / "new.py").touch()
    assert git_revision(tmp_path) == commit
    for name in code:
        (tmp_path / name).write_text("after")
        assert git_revision(tmp_path) == f"{commit}-dirty"
        (tmp_path / name).write_text("before")


def test_credentials_never_reach_a_report():
    config = override(preset("debug"), {"tracking.uri": "postgresql://me:secret@host/db"})
    shown = public_config(config)
    assert shown["tracking.uri"] == "postgresql://***@host/db"
    assert shown["train.steps"] == config.train.steps
