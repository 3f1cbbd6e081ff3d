"""One loop for recording, measuring and testing: when it stops, when it renders, what it keeps."""

import numpy as np
import pytest

from libra_ray.evaluation.rollout import Rollout, run, run_counted
from libra_ray.types import IMAGE_KEY, Action, Observation, Transition

MAX_STEPS = 10


class StubEnvironment:
    """Counts steps; succeeds at step `success_at` and stays successful for one step only."""

    task, instruction, state_dim, action_dim, control_hz, max_steps = "stub-v0", "count", 2, 4, 80, MAX_STEPS

    def __init__(self, success_at=None):
        self.image_shapes = {IMAGE_KEY: (2, 2, 3)}
        self.success_at = success_at
        self.executed = []

    def reset(self, seed, *, render=True):
        self.seed, self.executed = seed, []
        return self._observation(render)

    def step(self, action, *, render=True):
        self.executed.append(action)
        now = len(self.executed)
        return Transition(
            observation=self._observation(render), reward=now, success=now == self.success_at, truncated=now >= MAX_STEPS
        )

    def expert_action(self):
        return np.zeros(4, np.float32)

    def render(self, height=None, width=None):
        return np.full((height or 2, width or 2, 3), len(self.executed), np.uint8)

    def close(self):
        pass

    def _observation(self, render):
        now = len(self.executed)
        images = {IMAGE_KEY: self.render()} if render else {}
        return Observation(images=images, state=np.full(2, now, np.float32), instruction=self.instruction, step=now)


class StubController:
    """Executes the step's number, labels it with its negative; raises at step `raises_at`."""

    def __init__(self, *, needs_images=False, raises_at=None):
        self.needs_images, self.raises_at = needs_images, raises_at

    def reset(self, environment, seed):
        self.seed = seed

    def act(self, observation):
        if observation.step == self.raises_at:
            raise KeyError("no such thing")
        value = np.full(4, observation.step, np.float32)
        return Action(value=value, label=-value)


@pytest.mark.parametrize(
    ("success_at", "settle", "length"),
    [(3, 0, 3), (3, 2, 5), (None, 0, MAX_STEPS), (8, 5, MAX_STEPS), (MAX_STEPS, 0, MAX_STEPS)],
)
def test_stops_at_success_and_settling_or_truncation(success_at, settle, length):
    episode = run(StubEnvironment(success_at), StubController(), 5, settle_steps=settle)
    assert len(episode.steps) == length
    assert episode.success == (success_at is not None)
    assert (episode.task, episode.instruction, episode.seed, episode.error) == ("stub-v0", "count", 5, None)


def test_a_step_holds_what_was_seen_done_and_answered():
    environment, controller = StubEnvironment(3), StubController()
    episode = run(environment, controller, 9)
    assert (environment.seed, controller.seed) == (9, 9)
    assert [step.observation.step for step in episode.steps] == [0, 1, 2]
    assert [step.reward for step in episode.steps] == [1, 2, 3]
    assert [step.success for step in episode.steps] == [False, False, True]
    assert [step.action.label[0] for step in episode.steps] == [0, -1, -2]
    np.testing.assert_array_equal([value[0] for value in environment.executed], [0, 1, 2])


@pytest.mark.parametrize(("needs", "render", "rendered"), [(False, None, False), (True, None, True), (False, True, True)])
def test_renders_only_where_wanted(needs, render, rendered):
    episode = run(StubEnvironment(2), StubController(needs_images=needs), 0, render=render)
    assert [bool(step.observation.images) for step in episode.steps] == [rendered] * 2


def test_images_cannot_be_refused_to_who_needs_them():
    with pytest.raises(ValueError, match="StubController needs images"):
        run(StubEnvironment(), StubController(needs_images=True), 0, render=False)


def test_frames_for_a_video():
    episode = run(StubEnvironment(7), StubController(), 0, keep_frames_every=3, frame_size=(4, 6))
    assert [frame.shape for frame in episode.frames] == [(4, 6, 3)] * 3
    assert [frame[0, 0, 0] for frame in episode.frames] == [0, 3, 6]
    assert run(StubEnvironment(7), StubController(), 0).frames == ()


def test_an_exception_becomes_a_failed_episode():
    episode = run_counted(StubEnvironment(5), StubController(raises_at=2), 4)
    assert (episode.task, episode.seed, episode.success) == ("stub-v0", 4, False)
    assert "KeyError" in episode.error
    assert "no such thing" in episode.error
    with pytest.raises(KeyError):
        run(StubEnvironment(5), StubController(raises_at=2), 4)


def test_a_good_episode_is_counted_as_it_is():
    assert run_counted(StubEnvironment(5), StubController(), 4, settle_steps=1).success


def test_observations_carry_the_pictures_before():
    rollout = Rollout(StubEnvironment(), 0, history=3)
    rollout.start(render=True)
    seen = []
    while not rollout.done:
        seen.append([picture[0, 0, 0] for picture in rollout.observation.pictures(IMAGE_KEY, 3)])
        rollout.step(StubController().act(rollout.observation), render=True)
    assert seen[:4] == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_where_the_object_ended_and_which_parts_were_done_is_part_of_the_episode():
    class Placing(StubEnvironment):
        @property
        def position_error_mm(self):
            return 100.0 - len(self.executed)

        @property
        def parts_done(self):
            return len(self.executed) // 2

    placed, other = (run(robot(success_at=4), StubController(), 0) for robot in (Placing, StubEnvironment))
    assert (placed.position_error_mm, placed.parts_done) == (96, 2)
    assert (other.position_error_mm, other.parts_done) == (None, None)
