"""Evaluation on a real fleet: interrupted, killed and resumed, every job has exactly one row."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from libra_ray.common.files import append_jsonl
from libra_ray.config import override
from libra_ray.evaluation.log import LOG_NAME, EpisodeJob, EvaluationLogWriter, read_evaluation, read_rollouts
from libra_ray.evaluation.rollout import Rollout
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import stages
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import EpisodeResult
from libra_ray.types import Action
from tests.on_ray.doubles import StubEnvironment, debug_config, dying


def _rows(folder):
    rows = [json.loads(line) for line in folder.path(LOG_NAME).read_text().splitlines()]
    return [row["episode"] for row in rows if "episode" in row]


def _evaluate(folder):
    with folder.stage("evaluate") as clock:
        evaluation.evaluate(folder, clock)


@pytest.mark.parametrize("replicas", [0, 1])
def test_resumes_after_an_interruption_and_outlives_its_simulators(ray_cluster, make_run, untrained, monkeypatch, replicas):
    """Half of the rows are there, the last one cut short; one process dies while the policy is moving its robots."""
    folder = make_run(
        sim__max_steps=12,
        evaluate__checkpoint=str(untrained),
        evaluate__episodes_per_task=3,
        evaluate__controllers="zero_action,policy,coarse_only",
        evaluate__policy_replicas=replicas,
        ray__simulator_actors=2,
    )
    known = [EpisodeJob(controller=c, task="reach-v3", seed=100_000) for c in ("zero_action", "policy")]
    for job in known:
        result = EpisodeResult(task=job.task, instruction="", controller=job.controller, seed=job.seed, success=True, steps=1)
        append_jsonl(folder.path(LOG_NAME), [{"episode": asdict(result)}])
    before = folder.path(LOG_NAME).read_text()
    with folder.path(LOG_NAME).open("a") as file:
        file.write('{"episode": {"task": "reach-v3", "contr')
    monkeypatch.setattr("libra_ray.on_ray.simulator_pool.Simulators", dying("advance", folder.path("died"), call=2))
    _evaluate(folder)
    assert folder.path("died").exists()
    assert folder.path(LOG_NAME).read_text().startswith(before), "what was there is not run again"
    jobs = [EpisodeJob(controller=row["controller"], task=row["task"], seed=row["seed"]) for row in _rows(folder)]
    assert sorted(jobs) == sorted(evaluation.all_jobs(folder.config, folder.config.evaluate.controllers)), "all, and none twice"
    assert not any(row["error"] for row in _rows(folder)[2:])
    assert {row["steps"] for row in _rows(folder)[2:]} == {12}
    after = folder.path(LOG_NAME).read_text()
    _evaluate(folder)
    assert folder.path(LOG_NAME).read_text() == after
    read = read_evaluation(folder)
    assert len(read.results) == 9
    assert len(read.latencies["refiner"].ms) == len(read.latencies["refiner"].robots) > 0
    assert [rollout.task for rollout in read_rollouts(folder)] == ["reach-v3"]

    planner, refiner = evaluation.margins_of(folder, read)
    assert (planner.level, planner.robots) == ("planner", np.mean(read.latencies["planner"].robots))
    assert refiner.p95_ms == pytest.approx(np.percentile(read.latencies["refiner"].ms, 95))
    late = override(folder.config, {"delay.intent_steps": 9, "delay.chunk_steps": 2})
    for before, margin, injected in zip(
        (planner, refiner), evaluation.margins_of(RunFolder(folder.root, late), read), (9, 2), strict=True
    ):
        assert margin.late_steps == before.late_steps + injected
        assert f"and {injected} steps of injected delay" in margin.text


def test_a_checkpoint_of_other_pictures_is_refused(make_run, untrained):
    folder = make_run(data__image_size=48, evaluate__checkpoint=str(untrained))
    with pytest.raises(
        ValueError, match=r"data.image_size=48, but the checkpoint was trained with 32; give --data.image_size 32"
    ):
        evaluation.check_fits(folder.config, debug_config())


def test_longer_chunks_than_were_trained_are_refused():
    config = override(debug_config(), {"action.horizon": 8, "control.execute_steps": 7})
    with pytest.raises(ValueError, match=r"control.execute_steps=7 exceeds the checkpoint's horizon of 5"):
        evaluation.check_fits(config, debug_config())
    config = override(debug_config(), {"action.horizon": 8, "control.committed_steps": 3})
    with pytest.raises(
        ValueError, match=r"control.committed_steps=3 is .*half of the checkpoint's horizon of 5; give at most 2"
    ):
        evaluation.check_fits(config, debug_config())


def test_a_variant_that_the_system_has_not_is_refused(make_run):
    """Refused before anything is recorded or trained."""
    folder = make_run(model__system="monolithic", evaluate__controllers="expert,policy,coarse_only,zero_action")
    with pytest.raises(ValueError, match=r"names coarse_only; .*monolithic there are expert, policy, zero_action"):
        stages.check(folder, "record", "train", "evaluate")


def test_by_default_everyone_is_evaluated_whom_the_system_has():
    config = debug_config()
    assert evaluation.controllers_of(config, config) == ("expert", "policy", "coarse_only", "zero_action")
    monolithic = override(config, {"model.system": "monolithic"})
    assert evaluation.controllers_of(monolithic, monolithic) == ("expert", "policy", "zero_action")
    experts = override(config, {"model.system": "experts", "experts.names": "flow,token"})
    alone = ("expert_flow", "expert_token")
    assert evaluation.controllers_of(experts, experts) == ("expert", "policy", *alone, "zero_action")
    with pytest.raises(ValueError, match=r"names expert_diffusion; .*experts there are expert, policy, expert_flow"):
        evaluation.controllers_of(override(experts, {"evaluate.controllers": "expert_diffusion"}), experts)


class _Bar:
    count = 0

    def to(self, count):
        self.count = count


def test_a_broken_rollout_file_is_never_left_behind(make_run, monkeypatch):
    """Killed while pictures are written, the report of the next start does not stumble over half a file."""
    folder: RunFolder = make_run()
    rollout = Rollout(StubEnvironment("reach-v3"), 0)
    rollout.start(render=True)
    pictures = [np.zeros((2, 2, 3), np.uint8)] * 3
    with folder.stage("evaluate") as clock:
        notes = EvaluationLogWriter(folder, clock, _Bar())
        monkeypatch.setattr(np, "savez_compressed", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            notes.episode(EpisodeJob(controller="policy", task="reach-v3", seed=0), rollout.episode(), pictures)
        assert read_rollouts(folder) == []
        assert read_evaluation(folder).results == []
        monkeypatch.undo()
        notes.episode(EpisodeJob(controller="policy", task="reach-v3", seed=0), rollout.episode(), pictures)
    assert [len(kept.frames) for kept in read_rollouts(folder)] == [3]
    assert [result.seed for result in read_evaluation(folder).results] == [0]


def test_what_chunks_said_of_themselves_is_in_the_row(make_run):
    folder: RunFolder = make_run()
    rollout = Rollout(StubEnvironment("reach-v3"), 0)
    rollout.start(render=False)
    for share in (0.0, 1.0):
        action = np.zeros(4, np.float32)
        rollout.step(Action(value=action, label=action, measures={"share_flow": share}), render=False)
    with folder.stage("evaluate") as clock:
        for controller, episode in (("policy", rollout.episode()), ("zero_action", replace(rollout.episode(), steps=()))):
            job = EpisodeJob(controller=controller, task="reach-v3", seed=0)
            EvaluationLogWriter(folder, clock, _Bar()).episode(job, episode)
    assert [result.measures for result in read_evaluation(folder).results] == [{"share_flow": 0.5}, None]
    assert ["measures" in row for row in _rows(folder)] == [True, False]


def _interrupted(file, **_):
    file.write(b"PK half a file")
    raise KeyboardInterrupt
