"""The expert's noise: decided by the seed, only on the executed action, never on the gripper."""

import numpy as np
import pytest

from libra_ray.sim.scripted_controllers import GRIPPER, ExpertController, ZeroController
from libra_ray.types import Observation

OBSERVATION = Observation(images={}, state=np.zeros(4, np.float32), instruction="wait")


class StubEnvironment:
    """Its expert always answers the same."""

    action_dim = 4

    def expert_action(self):
        return np.array([0.9, -0.2, 0.1, 1], np.float32)


def actions(controller, seed, steps=120):
    controller.reset(StubEnvironment(), seed)
    return [controller.act(OBSERVATION) for _ in range(steps)]


def is_noisy(episode):
    return any((action.value != action.label).any() for action in episode)


def test_labels_stay_clean_and_the_gripper_undisturbed():
    episode = actions(ExpertController(noise_std=0.5, noise_share=1), 0)
    assert is_noisy(episode)
    for action in episode:
        np.testing.assert_array_equal(action.label, StubEnvironment().expert_action())
        assert action.value[GRIPPER] == action.label[GRIPPER]
        assert np.abs(action.value).max() <= 1
        assert action.value.dtype == np.float32


def test_noise_follows_from_the_seed_whatever_went_before():
    controller = ExpertController(noise_std=0.3, noise_share=1)
    first = [action.value for action in actions(controller, 7)]
    other = [action.value for action in actions(controller, 8)]
    np.testing.assert_array_equal([action.value for action in actions(controller, 7)], first)
    assert not np.array_equal(first, other)


def test_disturbances_are_held_and_leave_time_to_recover():
    values = np.array(
        [action.value - action.label for action in actions(ExpertController(noise_std=0.3, noise_share=1), 1, 400)]
    )
    disturbed = (values[:, 1] != 0).astype(int)
    starts = int((np.diff(disturbed) == 1).sum())
    assert 0.1 < disturbed.mean() < 0.5
    assert disturbed.sum() / starts >= 5


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_the_share_of_noisy_episodes(share):
    controller = ExpertController(noise_std=0.3, noise_share=share)
    noisy = np.mean([is_noisy(actions(controller, seed, 60)) for seed in range(200)])
    assert noisy == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)


def test_without_a_standard_deviation_nothing_is_disturbed():
    assert not is_noisy(actions(ExpertController(noise_std=0, noise_share=1), 0))


class FallibleStub(StubEnvironment):
    """Its expert's mistake is to stand still, once."""

    class Stop:
        def __init__(self) -> None:
            self.asked = 0

        def action(self, label):
            self.asked += 1
            return np.zeros(4, np.float32) if self.asked == 1 else label

    def mistake(self, rng):
        assert rng.random() is not None
        return self.Stop()


def on_fallible(controller, seed, steps=60):
    controller.reset(FallibleStub(), seed)
    return [controller.act(OBSERVATION) for _ in range(steps)]


def test_a_mistake_changes_no_noise_and_no_label():
    noise = {"noise_std": 0.3, "noise_share": 0.5}
    for seed in range(10):
        clean = on_fallible(ExpertController(**noise), seed)
        wrong = on_fallible(ExpertController(**noise, recovery_share=1), seed)
        np.testing.assert_array_equal([a.label for a in wrong], [a.label for a in clean])
        np.testing.assert_array_equal([a.value for a in wrong[1:]], [a.value for a in clean[1:]])
        np.testing.assert_array_equal(wrong[0].value, np.zeros(4))


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_the_share_of_episodes_with_a_mistake(share):
    controller = ExpertController(noise_std=0.3, noise_share=0.5, recovery_share=share)
    mistaken = [is_noisy(on_fallible(controller, seed, 1)) for seed in range(300)]
    assert np.mean(mistaken) == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)


def test_zero_never_moves():
    for action in actions(ZeroController(), 0, 3):
        np.testing.assert_array_equal(action.value, np.zeros(4, np.float32))
