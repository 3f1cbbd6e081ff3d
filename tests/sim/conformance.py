"""What every simulator must obey. A simulator's test subclasses `EnvironmentConformance` and provides the fixture `make`."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from libra_ray.config import SimConfig
from libra_ray.evaluation.rollout import run
from libra_ray.sim import instructions
from libra_ray.sim.gym_adapter import GymEnvironment
from libra_ray.sim.scripted_controllers import ExpertController
from libra_ray.types import IMAGE_KEY, STATE_KEY, Environment, Observation

STEPS = 12


def trace(environment: Environment, seed: int, *, steps: int = STEPS) -> list[Observation]:
    """The first observations of the expert's episode."""
    first = environment.reset(seed)
    return [first, *(environment.step(environment.expert_action()).observation for _ in range(steps))]


def assert_same(ours: list[Observation], theirs: list[Observation]) -> None:
    """Bit for bit: states, pictures and step numbers."""
    assert [o.step for o in ours] == [o.step for o in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.state, b.state)
        assert a.images.keys() == b.images.keys()
        for key, picture in a.images.items():
            np.testing.assert_array_equal(picture, b.images[key])


class EnvironmentConformance:
    """The laws of `libra_ray.types.Environment`."""

    @pytest.fixture(scope="class")
    def make(self) -> Callable[[], Environment]:
        raise NotImplementedError("a simulator's test provides this fixture: a function that makes a fresh environment")

    @pytest.fixture(scope="class")
    def environment(self, make) -> Iterator[Environment]:
        environment = make()
        yield environment
        environment.close()

    def test_observations_are_as_announced(self, environment):
        assert environment.instruction.strip()
        assert IMAGE_KEY in environment.image_shapes
        for number, seen in enumerate(trace(environment, 0, steps=3)):
            assert seen.step == number
            assert seen.instruction == environment.instruction
            assert seen.state.shape == (environment.state_dim,)
            assert seen.state.dtype == np.float32
            assert np.isfinite(seen.state).all()
            assert {key: picture.shape for key, picture in seen.images.items()} == dict(environment.image_shapes)
            assert all(picture.dtype == np.uint8 and picture.flags.c_contiguous for picture in seen.images.values())

    def test_what_is_declared_of_its_numbers_is_true(self, environment):
        action, state = environment.action_spec, environment.state_spec
        for spec, dims in ((action, environment.action_dim), (state, environment.state_dim)):
            assert len(spec.names) == len(spec.ranges) == dims

        def moved(command: np.ndarray) -> np.ndarray:
            before = environment.reset(0, render=False).state
            for _ in range(4):
                after = environment.step(command, render=False).observation.state
                low, high = np.array([pair or (-np.inf, np.inf) for pair in state.ranges]).T
                assert ((low <= after) & (after <= high)).all()
            return after - before

        still = np.zeros(environment.action_dim, np.float32)
        for place, name in enumerate(action.names):
            low, high = action.ranges[place]
            ends = [moved(np.where(np.arange(len(still)) == place, end, still).astype(np.float32)) for end in (low, high)]
            gap = np.abs(ends[1] - ends[0])
            assert np.argmax(gap) == state.names.index(name), f"{name} moves what has its name"
            if place != action.gripper:
                assert ends[0][np.argmax(gap)] < 0 < ends[1][np.argmax(gap)], f"{name} is a change, and none at 0"
        assert action.delta
        assert state.delta is False

    def test_gymnasium_is_told_the_declared_ranges(self, environment):
        adapted = GymEnvironment(environment)
        assert adapted.metadata["action_spec"] == environment.action_spec
        assert adapted.metadata["state_spec"] == environment.state_spec
        for box, spec in (
            (adapted.action_space, environment.action_spec),
            (adapted.observation_space[STATE_KEY], environment.state_spec),
        ):
            bounds = [pair or (-np.inf, np.inf) for pair in spec.ranges]
            np.testing.assert_array_equal(np.stack([box.low, box.high], axis=1), bounds)

    @pytest.mark.parametrize("seed", [0, 1, 7])
    def test_what_an_episode_asks_for_is_known_without_it(self, environment, seed):
        family = "tabletop" if type(environment).__name__ == "Tabletop" else "metaworld"
        seen = environment.reset(seed, render=False)
        sim = SimConfig(family=family, tasks=(environment.task,))
        assert instructions(sim, [seed]) == (seen.instruction,)

    def test_pictures_show_something(self, environment):
        first, other = (environment.reset(seed).images[IMAGE_KEY].astype(int) for seed in (0, 1))
        assert first.std() > 20
        assert len(np.unique(first.reshape(-1, 3), axis=0)) > 50
        assert np.abs(first - other).max() > 20

    def test_later_pictures_leave_earlier_ones_alone(self, environment):
        before = environment.reset(0).images[IMAGE_KEY]
        copy = before.copy()
        environment.reset(1)
        np.testing.assert_array_equal(before, copy)

    def test_nothing_is_rendered_unasked(self, environment):
        assert environment.reset(0, render=False).images == {}
        assert environment.step(environment.expert_action(), render=False).observation.images == {}

    def test_rendering_does_not_change_the_episode(self, environment):
        rendered = [o.state for o in trace(environment, 2)]
        states = [environment.reset(2, render=False).state]
        states += [environment.step(environment.expert_action(), render=False).observation.state for _ in range(STEPS)]
        np.testing.assert_array_equal(rendered, states)

    def test_an_episode_follows_from_its_seed_alone(self, environment, make):
        expected = trace(environment, 3)
        assert_same(trace(environment, 3), expected)
        run(environment, ExpertController(), 4)
        trace(environment, 5, steps=STEPS // 2)
        np.random.seed(0)  # noqa: NPY002
        assert_same(trace(environment, 3), expected)
        fresh = make()
        assert_same(trace(fresh, 3), expected)
        fresh.close()

    def test_seeds_differ(self, environment):
        starts = [environment.reset(seed).images[IMAGE_KEY].tobytes() for seed in range(5)]
        assert len(set(starts)) == len(starts)

    def test_the_expert_succeeds(self, environment):
        episodes = [run(environment, ExpertController(), seed) for seed in range(3)]
        assert sum(episode.success for episode in episodes) >= 2
        assert all(np.abs(step.action.value).max() <= 1 for episode in episodes for step in episode.steps)

    def test_actions_are_clipped(self, environment):
        states = []
        for scale in (1, 100):
            environment.reset(0, render=False)
            action = np.full(environment.action_dim, scale, np.float32)
            states.append(environment.step(action, render=False).observation.state)
        np.testing.assert_array_equal(*states)

    def test_bad_actions_are_refused(self, environment):
        environment.reset(0, render=False)
        good = np.zeros(environment.action_dim, np.float32)
        with pytest.raises(ValueError, match=rf"shape \({environment.action_dim},\)"):
            environment.step(np.append(good, good))
        with pytest.raises(ValueError, match="shape"):
            environment.step(good[None])
        for bad in (np.nan, np.inf):
            broken = good.copy()
            broken[0] = bad
            with pytest.raises(ValueError, match="finite"):
                environment.step(broken)

    def test_bad_seeds_are_refused(self, environment):
        for seed in (-1, 0.5, "0"):
            with pytest.raises(ValueError, match="seed"):
                environment.reset(seed)

    def test_render_takes_any_size(self, environment):
        environment.reset(0)
        assert environment.render(48, 96).shape == (48, 96, 3)
        assert environment.render().shape == environment.image_shapes[IMAGE_KEY]
        with pytest.raises(ValueError, match="at least 1"):
            environment.render(0, 10)

    def test_truncation_ends_the_episode(self, environment):
        environment.reset(0, render=False)
        still = np.zeros(environment.action_dim, np.float32)
        truncated = [environment.step(still, render=False).truncated for _ in range(environment.max_steps)]
        assert truncated == [False] * (environment.max_steps - 1) + [True]
        with pytest.raises(RuntimeError, match="reset"):
            environment.step(still)
        assert environment.reset(0, render=False).step == 0

    def test_use_before_reset_and_after_close_is_refused(self, make):
        environment = make()
        action = np.zeros(environment.action_dim, np.float32)
        for use in (lambda: environment.step(action), environment.expert_action, environment.render):
            with pytest.raises(RuntimeError, match="reset"):
                use()
        environment.reset(0)
        environment.close()
        environment.close()
        for use in (
            lambda: environment.reset(0),
            lambda: environment.step(action),
            environment.expert_action,
            environment.render,
        ):
            with pytest.raises(RuntimeError, match="closed"):
                use()
