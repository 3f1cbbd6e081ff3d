"""Lockstep evaluation: every job ends in exactly one result, whatever raises or dies on the way."""

import numpy as np
import pytest

from libra_ray.evaluation.lockstep import Lockstep
from libra_ray.evaluation.log import EpisodeJob
from libra_ray.evaluation.measures import asynchrony_of
from libra_ray.evaluation.simulators import DIED, TRIES, EpisodeRequest, Simulators
from libra_ray.spec import VectorSpec
from libra_ray.types import Action
from tests.on_ray.doubles import STEPS, LocalFleet, Noted, StubPolicy, StubSimulators, debug_config

CONFIG = debug_config(evaluate__robots=3)


def _jobs(count, task="stub"):
    return [EpisodeJob(controller="policy", task=task, seed=seed) for seed in range(count)]


def _play(jobs, fleet, config=CONFIG):
    noted, policy = Noted(), StubPolicy()
    Lockstep(config, config, fleet, policy, noted).play(jobs)
    assert set(noted.episodes) == set(jobs)
    assert all(episode.seed == job.seed for job, episode in noted.episodes.items())
    return noted, policy


def test_every_job_is_played_once_in_batches():
    noted, policy = _play(_jobs(7), LocalFleet(StubSimulators()))
    assert [episode.success for episode in noted.episodes.values()] == [job.seed % 2 == 0 for job in noted.episodes]
    assert all(len(episode.steps) == STEPS for episode in noted.episodes.values())
    assert max(policy.batches) == 2, "of three robots two are thought for while one moves"
    assert noted.calls == len(policy.batches)
    assert all(pictures > 0 for pictures in noted.pictures.values())


def test_robots_know_what_the_actions_mean():
    absolute = VectorSpec(delta=False)
    fleet = Lockstep(CONFIG, CONFIG, LocalFleet(StubSimulators()), StubPolicy(), Noted(), action=absolute)
    fleet.play(_jobs(2))
    assert [robot.action for robot in fleet.robots.values()] == [absolute] * 2


def test_while_one_group_moves_the_other_is_thought_for():
    """Two robots of each group in each of two processes; whoever is thought for, the others' answers are still to come."""
    moving, thought = [], []

    class Fleet(LocalFleet):
        def send(self, method, arguments, alone=()):
            sent, results = frozenset(arguments), self.ask(method, arguments, alone)
            moving.append(sent)

            def collect():
                moving.remove(sent)
                return results

            return collect

    class Thinking(StubPolicy):
        def refine(self, observations, plans):
            thought.append((len(observations), set().union(*moving)))
            return super().refine(observations, plans)

    config = debug_config(evaluate__robots=8)
    Lockstep(config, config, Fleet(StubSimulators(), processes=2), Thinking(), Noted()).play(_jobs(8))
    groups = [{0, 3, 4, 7}, {1, 2, 5, 6}]
    assert thought == [(4, groups[(call + 1) % 2]) for call in range(6)]
    assert [sum(slot % 2 for slot in group) for group in groups] == [2, 2], "each process has robots of both"


def test_each_episode_has_the_replans_of_its_own_robot():
    """Plans at 0, 5 and 10 of 12 steps, of which two replace one in use; slots are used again."""
    noted, _ = _play(_jobs(7), LocalFleet(StubSimulators()), debug_config(evaluate__robots=3, control__rule="overlap"))
    assert [len(replans) for replans in noted.replans.values()] == [2] * 7
    lost, _ = _play(
        _jobs(6), LocalFleet(StubSimulators(), dies_at=(3,)), debug_config(evaluate__robots=3, control__rule="overlap")
    )
    assert [len(replans) for replans in lost.replans.values()] == [2] * 6, "what was begun again counts once"


def test_an_environment_that_raises_is_one_counted_error():
    simulators = StubSimulators(broken=(1, 4))
    noted, _ = _play(_jobs(7), LocalFleet(simulators))
    wrong = {job.seed: episode.error for job, episode in noted.episodes.items() if episode.error}
    assert wrong == dict.fromkeys((1, 4), "FloatingPointError: the arm fell off")
    assert all(len(e.steps) == STEPS for e in noted.episodes.values() if not e.error), "other robots are undisturbed"
    assert sum(environment.closed for environment in simulators.made) == 2, "and not used again, which would raise"


def test_an_environment_that_cannot_be_made_is_one_counted_error():
    jobs = [*_jobs(2), EpisodeJob(controller="policy", task="nowhere", seed=9)]
    noted, _ = _play(jobs, LocalFleet(StubSimulators()))
    assert [episode.error for episode in noted.episodes.values() if episode.error] == ["OSError: no such place"]


def test_results_carry_the_name_that_was_asked_for():
    noted, _ = _play(_jobs(4, "metaworld-stub"), LocalFleet(StubSimulators()))
    assert not any(episode.error for episode in noted.episodes.values())


@pytest.mark.parametrize("dies_at", [(1,), (2,), (2, 3), (1, 4, 8), (5, 9)])
def test_a_dying_process_costs_no_episode(dies_at):
    fleet = LocalFleet(StubSimulators(), dies_at=dies_at)
    noted, _ = _play(_jobs(6), fleet)
    assert fleet.deaths == len(dies_at)
    assert [e.error for e in noted.episodes.values()] == [None] * 6
    assert all(len(episode.steps) == STEPS for episode in noted.episodes.values()), "begun again from scratch"


def test_an_episode_that_always_kills_its_process_is_the_only_error():
    fleet = LocalFleet(StubSimulators(), killers=(2,))
    noted, _ = _play(_jobs(6), fleet)
    assert {job.seed: episode.error for job, episode in noted.episodes.items() if episode.error} == {2: DIED}
    assert fleet.deaths == TRIES


def test_unknown_slots_are_lost_not_failed():
    outcome = StubSimulators().advance({4: []})[4]
    assert (outcome.observation, outcome.episode, outcome.died) == (None, None, False)


@pytest.mark.parametrize("history", [1, 3])
def test_observations_carry_as_many_pictures_as_asked(history):
    simulators = StubSimulators()
    begun = simulators.begin({0: EpisodeRequest(task="stub", seed=0, history=history)})[0]
    zeros = np.zeros(4, np.float32)
    moved = simulators.advance({0: [Action(value=zeros, label=zeros)] * 4})[0]
    assert len(begun.observation.past) == 0
    assert len(moved.observation.past) == history - 1


def test_a_moved_goal_is_in_the_episode_and_its_record():
    """From the simulator's process to the row: the goal moves at step 7, chunks begin at every fifth."""
    changes = {"sim__family": "tabletop", "sim__tasks": ("place",), "sim__max_steps": 14, "sim__goal_moves_at": 7}
    config = debug_config(evaluate__robots=2, control__rule="overlap", **changes)
    noted, jobs = Noted(), _jobs(3, "place")
    Lockstep(config, config, LocalFleet(Simulators(config.sim, config.data.image_size)), StubPolicy(), noted).play(jobs)
    for job, episode in noted.episodes.items():
        found = asynchrony_of(episode, noted.replans[job])
        assert episode.goal_moved_at == 7
        assert (found.reaction.chunk_steps, found.reaction.intent_steps) == (3, 3)
        assert (found.jerk.boundary, found.jerk.within) == (0, 0)
        assert [len(of.differences) for of in found.replans] == [2]


def test_lockstep_is_what_a_single_robot_does(untrained):
    """Two robots in one batch, and each alone by `rollout.run`: the same episodes up to float noise."""
    from libra_ray.control.lockstep import PolicyController
    from libra_ray.evaluation.rollout import run
    from libra_ray.policy import load_policy
    from libra_ray.sim import make_environment

    config = debug_config(sim__max_steps=27, evaluate__robots=2)
    policy = load_policy(untrained)
    jobs = _jobs(2, "reach-v3")
    noted = Noted()
    Lockstep(config, policy.source.config, LocalFleet(Simulators(config.sim, config.data.image_size)), policy, noted).play(jobs)
    environment = make_environment(config.sim, "reach-v3", config.data.image_size)
    for job in jobs:
        alone = run(environment, PolicyController(policy, config.control), job.seed)
        together = noted.episodes[job]
        assert (len(together.steps), together.success) == (len(alone.steps), alone.success)
        for name in ("value", "intent_age_steps"):
            ours, theirs = ([getattr(step.action, name) for step in episode.steps] for episode in (together, alone))
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
    environment.close()
