"""The expert makes a mistake in mid-task and goes on from there; what is learned from it is right at every step."""

from dataclasses import dataclass

import numpy as np
import pytest

from libra_ray.config import Config, RecordConfig, SimConfig, override
from libra_ray.data.spool import load_episode
from libra_ray.evaluation.rollout import run
from libra_ray.evaluation.simulators import Simulators
from libra_ray.sim.scripted_controllers import ExpertController
from libra_ray.sim.tabletop.environment import Tabletop
from libra_ray.types import Action, Episode, Observation

SEEDS = range(20)
PLACEMENTS = ("place-5mm", "place-1mm")
SHUT = 0.05
"""Of the way between the fingertips: nothing on the table is as thin."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was true before a control step (privileged)."""

    closed_on_nothing: bool
    held: bool
    loose: bool
    expert: np.ndarray


class Witness(ExpertController):
    """The expert, with what was true whenever it acted."""

    def act(self, observation: Observation) -> Action:
        environment = self._environment
        world, item = environment._world, environment._progress.current.item
        expert = environment.expert_action()
        shut = not world.told_to_open and world.opening_01 < SHUT and not world.touching()
        self.seen.append(
            Seen(closed_on_nothing=shut, held=world.holds(item), loose=item not in world.touching(), expert=expert)
        )
        return super().act(observation)


def played(task: str, seed: int, **shares: float) -> tuple[Episode, Witness]:
    environment, controller = Tabletop(SimConfig(family="tabletop", max_steps=200), task, 64), Witness(**shares)
    controller.seen = []
    episode = run(environment, controller, seed)
    environment.close()
    return episode, controller


def actions(episode: Episode) -> np.ndarray:
    return np.array([(step.action.value, step.action.label) for step in episode.steps])


@pytest.fixture(scope="module")
def recovered() -> dict[tuple[str, int], tuple[Episode, Witness]]:
    """Every episode with a mistake, none with noise."""
    return {(task, seed): played(task, seed, recovery_share=1) for task in PLACEMENTS for seed in SEEDS}


@pytest.mark.parametrize("task", PLACEMENTS)
def test_the_expert_recovers(task, recovered):
    successes = [recovered[task, seed][0].success for seed in SEEDS]
    assert np.mean(successes) >= 0.95


@pytest.mark.parametrize("task", ["bin", "stack", "insert-2mm", "putdown-1mm", "push", "chain2"])
def test_so_it_does_in_the_other_tasks(task):
    assert sum(played(task, seed, recovery_share=1)[0].success for seed in range(6)) >= 5


def test_what_is_learned_is_the_experts_own_action(recovered):
    for episode, witness in recovered.values():
        values, labels = actions(episode).swapaxes(0, 1)
        np.testing.assert_array_equal(labels, [seen.expert for seen in witness.seen])
        wrong = (values != labels).any(1)
        assert wrong.any()
        assert not wrong[-1], "it has gone on from there"


def of(recovered, moment: str) -> list[Witness]:
    found = [witness for _, witness in recovered.values() if witness._mistake.moment == moment]
    assert len(found) >= 4
    return found


def test_who_misses_closes_on_nothing_and_then_grasps(recovered):
    missed = 0
    for witness in of(recovered, "grasp"):
        held = [number for number, seen in enumerate(witness.seen) if seen.held]
        shut = [number for number, seen in enumerate(witness.seen) if seen.closed_on_nothing]
        assert held
        missed += bool(shut) and shut[0] < held[-1]
    # The others grasped it askew.
    assert missed >= 2 / 3 * len(of(recovered, "grasp"))


def test_who_lets_go_at_the_wrong_place_takes_it_again(recovered):
    for witness in of(recovered, "release"):
        states = [seen.held for seen in witness.seen]
        first = states.index(True)
        lost = first + states[first:].index(False)
        assert any(states[lost:])


def test_who_is_shoved_may_drop_what_it_carries(recovered):
    dropped = 0
    for witness in of(recovered, "way"):
        held = [number for number, seen in enumerate(witness.seen) if seen.held]
        dropped += any(seen.loose for seen in witness.seen[held[0] : held[-1]])
    assert 0 < dropped < len(of(recovered, "way"))


@pytest.mark.parametrize(
    ("task", "possible"),
    [
        ("touch", {"way"}),
        ("push", {"way"}),
        ("place", {"way", "grasp", "release"}),
        ("putdown", {"way", "release"}),
        ("insert", {"way", "grasp"}),
        ("stack", {"way", "grasp"}),
    ],
)
def test_a_mistake_is_one_that_the_task_has_room_for(task, possible):
    environment = Tabletop(SimConfig(family="tabletop"), task, 64)
    environment.reset(0, render=False)
    assert {str(environment.mistake(np.random.default_rng(seed)).moment) for seed in range(30)} == possible
    environment.close()


def test_the_same_seed_makes_the_same_mistake(recovered):
    for seed in (0, 3):
        np.testing.assert_array_equal(
            actions(played("place-1mm", seed, recovery_share=1)[0]), actions(recovered["place-1mm", seed][0])
        )


def test_other_episodes_are_as_they_were():
    """Those that the share leaves alone, to the bit, with noise and without."""
    noise = {"noise_std": 0.25, "noise_share": 0.5}
    mistaken = 0
    for seed in range(10):
        before, (now, witness) = played("place-5mm", seed, **noise)[0], played("place-5mm", seed, **noise, recovery_share=0.5)
        if witness._mistake is None:
            np.testing.assert_array_equal(actions(now), actions(before))
        mistaken += witness._mistake is not None
    assert 0 < mistaken < 10


def test_a_recording_has_them(tmp_path):
    simulators = Simulators(SimConfig(family="tabletop", max_steps=200), 16)
    steps = {}
    for share in (0, 1):
        record = RecordConfig(noise_share=0, recovery_share=share)
        assert simulators.demonstrate("place-5mm", 0, record, tmp_path / f"{share}.npz").success
        steps[share] = load_episode(tmp_path / f"{share}.npz").steps
    assert len(steps[1]) > len(steps[0])
    labels = np.array([step.action.label for step in steps[1]])
    np.testing.assert_array_equal(labels, actions(played("place-5mm", 0, recovery_share=1)[0])[:, 1])


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match=r"record\.recovery_share=0\.3 needs sim\.family=tabletop"):
        override(Config(), {"record.recovery_share": 0.3})
    with pytest.raises(ValueError, match=r"record\.recovery_share=1\.5 is not a share"):
        override(Config(), {"record.recovery_share": 1.5, "sim.family": "tabletop", "sim.tasks": "place"})
    assert override(
        Config(), {"record.recovery_share": 1, "sim.family": "tabletop", "sim.tasks": "place"}
    ).record.recovery_share
