"""The sub-goals of demonstrations: where recorded rewards mark them, and where nothing does."""

from dataclasses import replace

import numpy as np
import pytest

from libra_ray.config import HierarchyConfig, SimConfig
from libra_ray.data.dataset import open_dataset, write_dataset
from libra_ray.data.subgoals import THEN
from libra_ray.evaluation.rollout import run
from libra_ray.sim.scripted_controllers import ExpertController
from libra_ray.sim.tabletop.environment import Tabletop
from tests.data.builders import edit_column, make_episode, make_recorded
from tests.data.test_windows import make_windows

CHAIN = ("touch", "push", "lift")
WHOLE = THEN.join(CHAIN)


def rewarded(at, value=None, told=WHOLE, length=10):
    """One episode whose steps `at` were rewarded."""
    reward = np.zeros(length, np.float32)
    reward[list(at)] = 1 / len(told.split(THEN)) if value is None else value
    return replace(make_recorded([length], [told]), reward=reward)


def words(recorded):
    return [recorded.subgoals.names[place] for place in recorded.subgoals.of_frame]


def test_the_sub_goals_of_a_recorded_chain_are_what_the_expert_worked_on(tmp_path):
    """Of the simulator itself, through the files: at every frame the part whose turn it was."""
    environment, parts = Tabletop(SimConfig(max_steps=400), "chain3", 16), []

    class Noting(ExpertController):
        def act(self, observation):
            parts.append(environment.parts[environment.parts_done].text())
            return super().act(observation)

    made = [run(environment, Noting(), seed, render=True) for seed in (0, 1)]
    environment.close()
    recorded = open_dataset(write_dataset(made, tmp_path / "chains", fps=20))
    assert words(recorded) == parts
    assert len(set(parts)) > 3
    assert recorded.instructions == tuple(
        sorted({THEN.join(dict.fromkeys(p)) for p in (parts[: len(made[0].steps)], parts[len(made[0].steps) :])})
    )


def test_a_reward_marks_the_frame_whose_action_ended_a_part():
    assert words(rewarded([2, 6, 9])) == ["touch"] * 3 + ["push"] * 4 + ["lift"] * 3
    assert words(rewarded([2, 5, 6])) == ["touch"] * 3 + ["push"] * 3 + ["lift"] * 4, "it goes on after the last one"
    assert words(rewarded([4])) == ["touch"] * 5 + ["push"] * 5, "it was broken off"


@pytest.mark.parametrize(
    "recorded",
    [
        make_recorded([10], [THEN.join(CHAIN)]),
        rewarded([]),
        rewarded([2, 6, 9], value=0.2),
        rewarded([1, 2, 3, 4]),
        rewarded([1], value=np.nan),
    ],
    ids=["no rewards", "never rewarded", "other rewards", "more than parts", "no number"],
)
def test_where_no_boundaries_are_recorded_an_instruction_is_one_sub_goal(recorded):
    assert words(recorded) == [THEN.join(CHAIN)] * 10


def test_an_instruction_that_changes_ends_a_sub_goal():
    recorded = make_recorded([4, 3], [["reach", "reach", "grasp", "lift"], "grasp"])
    assert words(recorded) == ["reach", "reach", "grasp", "lift", "grasp", "grasp", "grasp"]
    place = recorded.subgoals.names.index
    found = recorded.subgoals.ahead(np.array([0, 1, 2, 3, 4, 6]), np.array([3, 3, 3, 3, 6, 6]), 4)
    end = 3
    expected = [[place("reach"), place("grasp"), place("lift"), end]] * 2
    expected += [[place("grasp"), place("lift"), end, end], [place("lift"), end, end, end]]
    assert found.tolist() == [*expected, *[[place("grasp"), end, end, end]] * 2], "and no other episode's follows"


def test_a_column_that_holds_no_rewards_is_not_read(tmp_path):
    root = write_dataset([make_episode(instruction=THEN.join(CHAIN))], tmp_path / "d", fps=10)
    assert open_dataset(root).reward is not None
    edit_column(root, "next.reward", lambda rows: [None, *rows[1:]])
    assert open_dataset(root).reward is None


def test_windows_name_what_is_done_next_and_what_was_said_of_it_before():
    """What was heard is as of any step up to the oldest answer that is still in use, and of none before the episode."""
    recorded = rewarded([11, 23, 35], length=36)
    recorded = replace(recorded, reward=recorded.reward)
    windows, dials, seen = make_windows(recorded, horizon=3, chunks=2), HierarchyConfig(), set()
    subgoals, names = recorded.subgoals, np.arange(36)
    for seed in range(40):
        batch = windows.batch(names, np.random.default_rng(seed))
        ahead = subgoals.ahead(names, np.full(36, 35), dials.subgoals)
        np.testing.assert_array_equal(batch.subgoals, ahead)
        for row, heard in enumerate(batch.heard_subgoals.numpy()):
            ages = [age for age in range(row + 1) if (ahead[row - age] == heard).all()]
            assert ages
            assert ages[0] <= dials.plans * 6
            seen.add(ages[0])
    assert {0, dials.plans * 6} <= seen
    path = windows.batch(names, np.random.default_rng(0)).path
    state = windows.batch(names, np.random.default_rng(0)).plan_state
    for row in range(36):
        np.testing.assert_array_equal(path[row], state[np.minimum(row + 1 + np.arange(6), 35)])
