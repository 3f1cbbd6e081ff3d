"""Meta-World obeys the laws of every simulator, looks as LeRobot has it, and starts as it will go on."""

import subprocess
import sys

import numpy as np
import pytest

from libra_ray.config import SimConfig
from libra_ray.config.presets import MT10, QUICKSTART_TASKS
from libra_ray.sim import make_environment
from libra_ray.sim.metaworld import Metaworld, task_instructions
from libra_ray.types import IMAGE_KEY
from tests.sim.conformance import EnvironmentConformance
from tests.test_imports import loaded_after

SIM = SimConfig(max_steps=150)


@pytest.mark.parametrize("task", ["drawer-open-v3", "pick-place-v3"], scope="class")
class TestMetaworld(EnvironmentConformance):
    @pytest.fixture(scope="class")
    def make(self, task):
        return lambda: make_environment(SIM, task, 64)


def test_tasks_have_lerobots_names_and_instructions():
    assert len(task_instructions()) == 50
    assert set(MT10) | set(QUICKSTART_TASKS) <= set(task_instructions())
    environment = make_environment(SIM, "metaworld-window-open-v3", 64)
    assert (environment.task, environment.instruction) == ("window-open-v3", "Push and open a window")


def test_an_unknown_task_names_its_neighbours():
    with pytest.raises(ValueError, match="drawer-open-v3"):
        make_environment(SIM, "drawer-opn", 64)
    with pytest.raises(ValueError, match="did you mean"):
        make_environment(SIM, "", 64)


@pytest.mark.parametrize("task", ["drawer-open-v3", "door-open-v3", "button-press-topdown-v3"])
def test_the_first_observation_shows_where_the_fixture_is(task):
    """Meta-World moves fixtures without a forward pass; one step must not make a drawer jump."""
    environment = Metaworld(SIM, task, 64)
    for seed in range(5):
        environment.reset(seed, render=False)
        before = environment._raw[4:7].copy()
        environment.step(np.zeros(4, np.float32), render=False)
        assert np.linalg.norm(environment._raw[4:7] - before) < 0.01


def test_the_goal_is_visible_to_the_expert():
    environment = Metaworld(SIM, "reach-v3", 64)
    environment.reset(0)
    goal = environment._raw[-3:]
    environment.step(np.zeros(4, np.float32))
    assert np.linalg.norm(goal) > 0.1
    np.testing.assert_array_equal(environment._raw[-3:], goal)


AS_LEROBOT = """
import sys, numpy as np
from libra_ray.sim.render.gl_backend import choose_backend
choose_backend()
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
env = ALL_V3_ENVIRONMENTS["drawer-open-v3"](render_mode="rgb_array", camera_name="corner2")
env._partially_observable, env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, False, True, True
env.model.cam_pos[2] = [0.75, 0.075, 0.7]
env.seed(0)
env.reset()
env.step(np.zeros(4, np.float32))
np.save(sys.argv[1], np.flip(env.render(), (0, 1)))
"""


def test_pictures_look_as_lerobots(tmp_path):
    """The same camera and orientation: of all ways to flip the picture, ours is by far the nearest."""
    subprocess.run([sys.executable, "-c", AS_LEROBOT, str(tmp_path / "theirs.npy")], check=True, capture_output=True)
    theirs = np.load(tmp_path / "theirs.npy").astype(float)
    environment = make_environment(SimConfig(), "drawer-open-v3", 60)
    environment.reset(0)
    ours = environment.step(np.zeros(4, np.float32)).observation.images[IMAGE_KEY].astype(float)
    small = theirs.reshape(60, 8, 60, 8, 3).mean((1, 3))
    table = slice(25, None)  # the sky differs: we draw none
    distance = {flips: np.abs(small[table] - np.flip(ours, flips)[table]).mean() for flips in ((), (0,), (1,), (0, 1))}
    assert distance[()] < 0.5 * min(distance[flips] for flips in distance if flips), distance


def test_a_simulator_worker_loads_neither_torch_nor_ray():
    loaded = loaded_after(
        "from libra_ray.config import SimConfig",
        "from libra_ray.sim import make_environment",
        "from libra_ray.sim.scripted_controllers import ExpertController",
        "from libra_ray.evaluation.rollout import run",
        "environment = make_environment(SimConfig(max_steps=3), 'reach-v3', 64)",
        "assert len(run(environment, ExpertController(noise_std=0.3, noise_share=1), 0, render=True).steps) == 3",
    )
    assert "mujoco" in loaded
    assert not loaded & {"torch", "ray", "lerobot", "transformers", "mlflow"}
