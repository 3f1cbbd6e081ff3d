"""Policy replicas: how many there are, and that nobody can tell from the results."""

import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ray import cloudpickle

from libra_ray.config import override
from libra_ray.evaluation.lockstep import Lockstep
from libra_ray.evaluation.log import ResultBuffer
from libra_ray.evaluation.simulators import Simulators
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray import replicas as module
from libra_ray.on_ray import stages
from libra_ray.on_ray.replicas import ReplicaPlan, ReplicaPool, by_node
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.types import Policy
from tests.on_ray.doubles import LocalFleet, debug_config

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _plan(cpus, gpus=0.0, **changes):
    return ReplicaPlan.of(debug_config(**{"evaluate__episodes_per_task": 1000, **changes}), cpus, gpus)


def test_a_laptop_has_none_and_a_large_machine_several():
    assert [_plan(cpus).count for cpus in (1, 2, 4, 8, 16, 64)] == [0, 0, 0, 2, 4, 16]
    assert _plan(16) == ReplicaPlan(count=4, cpus_each=1, threads=4)
    assert [_plan(64, evaluate__episodes_per_task=count).count for count in (1, 16, 33)] == [1, 1, 3]
    assert _plan(2, evaluate__policy_replicas=1) == ReplicaPlan(count=1, cpus_each=1, threads=2)


def test_on_gpus_there_is_always_one():
    assert _plan(2, 1.0, ray__use_gpu=True) == ReplicaPlan(count=1, gpus_each=0.5, threads=2)
    assert [_plan(64, gpus, ray__use_gpu=True).count for gpus in (1, 2, 8)] == [2, 4, 16]
    assert _plan(64, 2, ray__use_gpu=True, evaluate__gpus_per_replica=1).count == 2


def test_the_driver_of_a_shared_cluster_computes_nothing(monkeypatch):
    """A submitted job on a head without CPUs and GPUs, whose machines are yet to come."""
    monkeypatch.setattr(module, "is_private", lambda: False)
    assert _plan(0) == ReplicaPlan(count=1, cpus_each=1)
    assert _plan(0, ray__use_gpu=True, ray__simulator_actors=16) == ReplicaPlan(count=1, gpus_each=0.5)
    assert _plan(0, evaluate__policy_replicas=9) == ReplicaPlan(count=9, cpus_each=1)
    assert _plan(2, ray__simulator_actors=16) == ReplicaPlan(count=4, cpus_each=1), "more machines have to come"


@pytest.mark.parametrize("own", [True, False])
def test_replicas_that_nobody_asked_for_take_no_cpu_from_simulators(monkeypatch, own):
    """Or these would wait for ever, on a cluster that stays as it is."""
    monkeypatch.setattr(module, "is_private", lambda: own)
    assert [_plan(cpus, ray__simulator_actors=cpus).cpus for cpus in (1, 2, 4, 8, 16)] == [0] * 5
    assert _plan(1).cpus == 0
    assert _plan(16, ray__simulator_actors=16) == ReplicaPlan(count=4, cpus_each=0, threads=4)
    assert _plan(16, ray__simulator_actors=1).count == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate__policy_replicas": 2}, r"policy_replicas=2 .*simulator_actors=2\) want 4 CPUs, .* gives Ray 2; lower"),
        ({"evaluate__policy_replicas": 1, "ray__simulator_actors": 2}, r"simulator_actors=2\) want 3 CPUs, .* gives Ray 2"),
        ({"evaluate__policy_replicas": 3, "ray__use_gpu": True}, r"gpus_per_replica=0.5 want 1.5 GPUs, .* gives Ray 1; lower"),
        ({"evaluate__policy_replicas": 2, "ray__use_gpu": True, "ray__simulator_actors": 1}, r"exceeds ray.simulator_actors=1"),
    ],
)
def test_more_than_a_machine_has_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        _plan(2, 1.0, **changes)


def test_it_is_refused_before_anything_is_recorded(make_run):
    with pytest.raises(ValueError, match=r"evaluate.policy_replicas=99 .*lower one of them"):
        stages.check(make_run(evaluate__policy_replicas=99), "record", "train", "evaluate")
    with pytest.raises(ValueError, match=r"gpus_per_replica=0\.0 .* above 0 and at most 1"):
        debug_config(evaluate__gpus_per_replica=0)


def test_simulators_of_one_machine_go_together():
    assert by_node(["b", "a", "b", "", "a"]) == [3, 1, 4, 0, 2]


@dataclass
class _Mortal:
    """A policy whose process dies once, as for lack of memory, after the first episodes have ended."""

    policy: Policy
    mark: Path
    left: int = 16

    @property
    def levels(self):
        return self.policy.levels

    def infer(self, level, observations, above):
        self.left -= level == self.levels[-1].name
        if not self.left:
            with suppress(FileExistsError):
                self.mark.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return self.policy.infer(level, observations, above)


def _dying_once(mark, folder, controller):
    driver = evaluation.driver_of(folder, evaluation.load_trained, controller)
    return replace(driver, policy=_Mortal(driver.policy, mark))


def test_two_replicas_are_one_are_none(ray_cluster, make_run, untrained, tmp_path):
    """Every episode's row, whoever thinks, also where one that thought has died."""
    folder = make_run(
        sim__max_steps=27,
        control__rule="overlap",
        evaluate__checkpoint=str(untrained),
        evaluate__episodes_per_task=5,
        evaluate__controllers="policy",
        evaluate__robots=4,
    )
    config, jobs, said = folder.config, evaluation.all_jobs(folder.config, ["policy"]), []
    driver = evaluation.driver_of(folder, evaluation.load_trained, "policy")
    alone, reports = ResultBuffer(0), {1: [], 2: []}
    robots = LocalFleet(Simulators(config.sim, config.data.image_size))
    Lockstep(config, driver.trained, robots, driver.policy, alone).play(jobs)
    plan, opened = ReplicaPlan(count=2, cpus_each=1), partial(_dying_once, tmp_path / "died", folder)
    with SimulatorPool(config.sim, config.data.image_size, 2) as pool, ReplicaPool(config, plan, opened, said.append) as two:
        two.play("policy", jobs, pool, reports[2].append)
        one = replace(two, actors=two.actors[:1])
        one.play("policy", jobs, pool, reports[1].append)
        with pytest.raises(ValueError, match="no variant 'nobody'"):
            one.play("nobody", jobs, pool, reports[1].append)
    assert (tmp_path / "died").exists()
    # A busy machine is also told that replicas wait for it.
    [death] = [line for line in said if "died" in line]
    assert two.deaths == 1
    assert re.search(r"policy replica 1 died; another one plays its [12] episodes without a result", death)
    known = {played.job: played.result for played in alone.episodes}
    for many in reports.values():
        rows = [played for report in many for played in report.episodes]
        assert sorted(played.job for played in rows) == sorted(jobs), "all, and none twice"
        assert {level for report in many for calls in report.calls.values() for level in calls} == {"planner", "refiner"}
        for played in rows:
            ours, theirs = played.result, known[played.job]
            assert replace(ours, asynchrony=None) == replace(theirs, asynchrony=None)
            assert ours.asynchrony.jerk.boundary == pytest.approx(theirs.asynchrony.jerk.boundary, abs=1e-3)
            for mine, other in zip(ours.asynchrony.replans, theirs.asynchrony.replans, strict=True):
                np.testing.assert_allclose(mine.differences, other.differences, atol=1e-3)


def test_replicas_that_go_on_dying_end_the_evaluation(ray_cluster, make_run, monkeypatch):
    monkeypatch.setattr(module, "MOST_DEATHS", 1)

    def dies(controller):
        os.kill(os.getpid(), signal.SIGKILL)

    folder, said = make_run(evaluate__controllers="policy"), []
    jobs = evaluation.all_jobs(folder.config, ["policy"])
    with (
        SimulatorPool(folder.config.sim, folder.config.data.image_size, 1) as pool,
        ReplicaPool(folder.config, ReplicaPlan(count=1), dies, said.append) as replicas,
        pytest.raises(RuntimeError, match=r"2 policy replicas died .*the same command goes on"),
    ):
        replicas.play("policy", jobs, pool, lambda report: None)
    assert len([line for line in said if "died" in line]) == 1


def test_a_sweep_has_no_replicas():
    from libra_ray.on_ray.sweep import runner

    with pytest.raises(ValueError, match=r"evaluate.policy_replicas=2 has no place in a sweep"):
        runner.check(None, override(debug_config(), {"evaluate.policy_replicas": 2}), "asha", None)
