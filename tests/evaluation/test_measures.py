"""What an episode's actions tell of its levels: jerk where chunks meet, the reaction to a moved goal, and the small record."""

from dataclasses import replace

import numpy as np
import pytest

from libra_ray.common.json_text import plain
from libra_ray.config import ControlConfig
from libra_ray.control.disagreement import Replan
from libra_ray.control.lockstep import PolicyController
from libra_ray.evaluation.measures import asynchrony_of, chunk_jerk, goal_reaction, mean_measures
from libra_ray.evaluation.rollout import run
from libra_ray.runs.results import ChunkJerk, EpisodeReplans
from libra_ray.types import Action
from tests.control.test_robot import StubPolicy, late
from tests.evaluation.test_rollout import StubController, StubEnvironment


def actions(*chunks):
    """One action a number, of one dimension: a list is a chunk, a number alone is held."""
    found = []
    for chunk in chunks:
        for number in chunk if isinstance(chunk, list) else [chunk]:
            value = np.array([number], np.float32)
            begins = len(found) if not isinstance(chunk, list) or number is chunk[0] else found[-1].chunk_first_step
            held = not isinstance(chunk, list)
            found.append(Action(value=value, label=value, held=held, chunk_first_step=None if held else begins))
    return found


def test_the_jerk_of_a_step_is_its_second_difference_on_its_side_of_the_border():
    # 0 1 2 | 6 7 8: second differences 0 within, 3 at the border, -3 right after it (of two chunks: neither), 0 within.
    assert chunk_jerk(actions([0.0, 1.0, 2.0], [6.0, 7.0, 8.0])) == ChunkJerk(boundary=3.0, within=0.0)
    # 0 1 3: within; 3 -> 3 at the border.
    assert chunk_jerk(actions([0.0, 1.0, 3.0], [3.0])) == ChunkJerk(boundary=2.0, within=1.0)


def test_a_steady_motion_has_no_jerk_wherever_its_chunks_end():
    assert chunk_jerk(actions([0.0, 1.0, 2.0], [3.0, 4.0, 5.0])) == ChunkJerk(boundary=0.0, within=0.0)


def test_chunks_of_one_action_are_all_border():
    assert chunk_jerk(actions([0.0], [1.0], [3.0])) == ChunkJerk(boundary=1.0, within=None)


def test_held_actions_are_neither():
    assert chunk_jerk(actions([0.0, 1.0], 9.0, 9.0, 9.0, [2.0, 3.0])) is None
    assert chunk_jerk(actions([0.0, 1.0, 2.0], 9.0, [0.0, 1.0, 2.0])) == ChunkJerk(boundary=None, within=0.0)


def test_who_has_no_chunks_has_no_record():
    plain_episode = run(StubEnvironment(), StubController(), 0)
    assert asynchrony_of(plain_episode, []) is None
    assert asynchrony_of(replace(plain_episode, goal_moved_at=3), []) is None
    assert asynchrony_of(replace(plain_episode, steps=()), []) is None


class MovedEnvironment(StubEnvironment):
    """Its goal is moved at one step, as it says itself; it runs long enough."""

    goal_moved_at = 7

    def step(self, action, *, render=True):
        return replace(super().step(action, render=render), truncated=len(self.executed) >= 40)


@pytest.mark.parametrize(
    ("delay", "moved", "chunk", "intent"),
    # Chunks begin at 0, 5, 10 ...; with intents 4 steps late that of 10 is there for the chunk of 15.
    [(0, 7, 3, 3), (0, 10, 0, 0), (0, 11, 4, 4), (4, 7, 3, 8), (4, 10, 0, 5), (0, 38, None, None)],
)
def test_the_reaction_ends_with_the_first_action_made_from_a_picture_of_it(delay, moved, chunk, intent):
    environment = MovedEnvironment()
    environment.goal_moved_at = moved
    controller = PolicyController(StubPolicy(), ControlConfig(rule="overlap"), delays=late(delay))
    found = goal_reaction(run(environment, controller, 0))
    assert (found.moved_at, found.chunk_steps, found.intent_steps) == (moved, chunk, intent)


def test_a_goal_that_stays_is_no_reaction():
    controller = PolicyController(StubPolicy(), ControlConfig())
    assert goal_reaction(run(StubEnvironment(), controller, 0)) is None


def test_replans_are_kept_value_by_value_in_few_digits():
    replans = [
        Replan(level="a", value="x", share=1 / 3, difference=2 / 3),
        Replan(level="b", value="x", share=None, difference=0.5),
        Replan(level="a", value="x", share=0.0, difference=0.0),
    ]
    found = asynchrony_of(run(StubEnvironment(), StubController(), 0), replans)
    assert found.replans == [
        EpisodeReplans(level="a", value="x", shares=[0.33333, 0.0], differences=[0.66667, 0.0]),
        EpisodeReplans(level="b", value="x", shares=[], differences=[0.5]),
    ]
    assert set(plain(found)) == {"replans"}


class Measuring(StubPolicy):
    """Says with every chunk whether it is an even one, and once how sure it is."""

    def refine(self, observations, plans):
        chunks = super().refine(observations, plans)
        once = {"sure": 0.25} if observations[0].step == 5 else {}
        return [replace(chunk, measures={"even": float(chunk.first_step % 10 == 0)} | once) for chunk in chunks]


def test_what_chunks_say_of_themselves_is_a_mean_over_the_actions_that_were_executed():
    """Also where an episode ends in the middle of one: 18 steps in chunks of 5 are 5, 5, 5 and 3."""
    episode = run(MovedEnvironment(18), PolicyController(Measuring(), ControlConfig()), 0)
    assert len(episode.steps) == 18
    assert mean_measures([step.action for step in episode.steps]) == {"even": round(10 / 18, 5), "sure": 0.25}


def test_actions_that_are_held_or_an_experts_say_nothing():
    controller = PolicyController(Measuring(), ControlConfig(max_intent_age_steps=5), delays=late(12))
    environment = MovedEnvironment()
    held = [step.action for step in run(environment, controller, 0).steps if step.action.held]
    assert held
    assert mean_measures(held) is None
    assert mean_measures([step.action for step in run(StubEnvironment(), StubController(), 0).steps]) is None
