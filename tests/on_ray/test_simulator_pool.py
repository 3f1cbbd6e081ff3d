"""Fleets on real Ray actors: what they load, and what the death of a process costs."""

import os
import signal
import sys
from collections import Counter

import pytest
import ray

from libra_ray.common.disk import NoRoomError
from libra_ray.config import SimConfig
from libra_ray.evaluation.simulators import TRIES, EpisodeRequest, Simulators, StepResult
from libra_ray.on_ray import simulator_pool as module
from libra_ray.on_ray.simulator_pool import SimulatorPool
from tests.on_ray.doubles import debug_config

HEAVY = {"torch", "lerobot", "transformers", "mlflow"}


def mortal(marks):
    """Simulators without simulation. Seed 1 kills its process once, 13 always, 28 finds a full disk; they answer themselves."""

    class Mortal(Simulators):
        def play(self, seed):
            mark = marks / f"{seed}-{os.getpid()}"
            mark.touch()
            if seed == 28:
                raise NoRoomError("no space left on the disk of somewhere")
            if seed == 13 or (seed == 1 and len(list(marks.glob("1-*"))) == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return seed

        def begin(self, episodes):
            for start in episodes.values():
                self.play(start.seed)
            self.running |= episodes
            return {slot: StepResult(observation=start.seed) for slot, start in episodes.items()}

    return Mortal


@pytest.fixture
def make_pool(ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "Simulators", mortal(tmp_path))
    return lambda actors: SimulatorPool(SimConfig(), 64, actors)


def test_whole_episodes_survive_the_death_of_a_process(make_pool, tmp_path):
    queue = iter([0, 1, 13, 2, 3])
    with make_pool(2) as pool:
        before = list(pool.actors)
        answers = list(pool.work(lambda: next(queue, None), lambda actor, seed: actor.play.remote(seed)))
        assert not set(before) & set(pool.actors), "whoever died was replaced"
    assert sorted(answers, key=lambda pair: pair[0]) == [(0, 0), (1, 1), (2, 2), (3, 3), (13, None)]
    tries = Counter(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert tries == {"0": 1, "1": 2, "2": 1, "3": 1, "13": TRIES}


def test_a_full_disk_is_no_failed_episode(make_pool):
    """No attempt would find more room: nothing is tried again, and nobody but the disk is blamed."""
    queue = iter([0, 28])
    with make_pool(1) as pool, pytest.raises(NoRoomError, match=r"^no space left on the disk of somewhere$"):
        list(pool.work(lambda: next(queue, None), lambda actor, seed: actor.play.remote(seed)))


def test_robots_of_a_dead_process_are_lost_and_only_the_guilty_call_is_blamed(make_pool):
    with make_pool(2) as pool:
        # Slots 0, 2 and 4 live in the first process; slot 2 has a call of its own, and kills it.
        starts = {slot: EpisodeRequest(task="", seed=1 if slot == 2 else 20 + slot) for slot in range(5)}
        outcomes = pool.ask("begin", starts, alone={2, 4})
        assert {slot for slot, outcome in outcomes.items() if outcome.died} == {2}
        assert [outcomes[slot].observation for slot in (0, 1, 3, 4)] == [20, 21, 23, 24]
        assert pool.ask("begin", {2: starts[2]})[2].observation == 1
        assert pool.ask("advance", {0: []})[0] == StepResult(), "the new process knows nothing of the others"


def test_a_call_alone_waits_for_what_the_process_has_to_do(make_pool):
    """Slot 0's call dies while slot 2's, of the other group, stands behind it: alone, neither is blamed for the other."""
    with make_pool(1) as pool:
        both = [pool.send("begin", {slot: EpisodeRequest(task="", seed=seed)}) for slot, seed in ((0, 1), (2, 22))]
        assert [collect()[slot].died for collect, slot in zip(both, (0, 2), strict=True)] == [True, True]
        assert len(pool.actors) == 1
        replaced = pool.actors[0]
        alone = pool.send("begin", {0: EpisodeRequest(task="", seed=20)}, alone={0})
        guilty = pool.send("begin", {2: EpisodeRequest(task="", seed=13)})
        assert alone()[0].observation == 20, "in the process that stands in the place of the one that died"
        assert guilty()[2].died
        assert pool.actors[0] != replaced
        pool.renew()
        assert pool.ask("begin", {1: EpisodeRequest(task="", seed=24)})[1].observation == 24


def test_more_actors_than_cpus_are_refused_where_nobody_would_add_any(ray_cluster, monkeypatch):
    with pytest.raises(ValueError, match=r"ray.simulator_actors=99.*give at most 4, or 0"):
        SimulatorPool(SimConfig(), 64, 99)


def test_simulator_processes_never_load_torch(ray_cluster, tmp_path):
    """After a real rendered episode's first step; and the check would see it."""
    (tmp_path / "torch.py").touch()

    def loaded(simulators):
        return sorted(HEAVY & {name.split(".")[0] for name in sys.modules})

    def load(simulators):
        sys.path.insert(0, str(tmp_path))
        import torch  # noqa: F401

    with SimulatorPool(debug_config().sim, 32, 1) as pool:
        begun = pool.ask("begin", {0: EpisodeRequest(task="reach-v3", seed=0)})[0]
        assert begun.observation is not None, begun.episode
        actor = pool.actors[0]
        assert ray.get(actor.__ray_call__.remote(loaded)) == []
        ray.get(actor.__ray_call__.remote(load))
        assert ray.get(actor.__ray_call__.remote(loaded)) == ["torch"]
