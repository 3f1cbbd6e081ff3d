"""Meta-World v3 tasks as LeRobot's schema has them: one camera, hand position and gripper opening, four action dimensions."""

import difflib
import functools
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from numpy.typing import NDArray

from libra_ray.config import SimConfig
from libra_ray.sim.render.mesh_decimation import lighter_copy
from libra_ray.sim.render.offscreen import OffscreenRenderer
from libra_ray.sim.validation import checked_action, checked_seed
from libra_ray.spec import RobotSpec, VectorSpec
from libra_ray.types import IMAGE_KEY, Observation, Transition

NAMES = ("x", "y", "z", "gripper")
ACTION = VectorSpec(names=NAMES, ranges=((-1, 1),) * 4, gripper=3, delta=True, rotation="none")
STATE = VectorSpec(names=NAMES, ranges=(None, None, None, (0, 1)), gripper=3, delta=False, rotation="none")
ACTION_DIM = STATE_DIM = len(NAMES)
CONTROL_HZ = 80
CAMERA = "corner2"
CAMERA_POSITION_M = (0.75, 0.075, 0.7)
"""Where LeRobot moves the camera; as shipped it is far away."""
ROBOT_BODY = "right_hand"
ROBOT_FACE_SHARE = 0.1
"""Share of the arm's triangles that small pictures are drawn with."""
WHOLE_MESHES_FROM = 256
"""Picture height or width in pixels from which the whole arm is drawn."""

warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high", category=UserWarning)


@functools.cache
def task_instructions() -> MappingProxyType[str, str]:
    """Task name, e.g. `drawer-open-v3`, to LeRobot's description of it. Read as a file: importing lerobot loads torch."""
    spec = importlib.util.find_spec("lerobot")
    assert spec is not None, "lerobot is a dependency"
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "envs" / "metaworld_config.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text)["TASK_DESCRIPTIONS"])


def task_name(task: str) -> str:
    """Meta-World's name of `task`, which may carry LeRobot's prefix `metaworld-`.

    Raises:
        ValueError: there is no such task; the message names the nearest ones.
    """
    name, known = task.removeprefix("metaworld-"), sorted(task_instructions())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(f"unknown Meta-World task {task!r}; did you mean {' or '.join(near)}?")
    return name


def robot_spec(sim: SimConfig) -> RobotSpec:
    """The arm, the same whatever `sim` says."""
    return RobotSpec(
        action_dim=ACTION_DIM, state_dim=STATE_DIM, cameras=(IMAGE_KEY,), control_hz=CONTROL_HZ, action=ACTION, state=STATE
    )


def episode_instruction(task: str, seed: int) -> str:
    """What `task` asks for in the episode of `seed`: the same in all of them."""
    return task_instructions()[task_name(task)]


class Metaworld:
    """A simulated Sawyer arm with one Meta-World task; implements `libra_ray.types.Environment`.

    Every seed is a placement of its own, drawn afresh from the task's whole range. Actions `(4,)` in [-1, 1]: hand
    displacement x, y, z (1 means 1 cm per control step) and gripper effort (1 closes). State `(4,)`: hand position in metres,
    gripper opening in [0, 1]. Not for use by several threads at once.

    Args:
        sim: episode length, and how finely pictures are drawn.
        task: e.g. `drawer-open-v3` or `metaworld-drawer-open-v3`.
        image_size: height and width of the pictures, in pixels.

    Raises:
        ValueError: there is no such task.
    """

    state_dim = STATE_DIM
    action_dim = ACTION_DIM
    action_spec = ACTION
    state_spec = STATE
    control_hz = CONTROL_HZ

    def __init__(self, sim: SimConfig, task: str, image_size: int) -> None:
        self.task = task_name(task)
        self.instruction = task_instructions()[self.task]
        self.max_steps = sim.max_steps
        self._supersample = sim.supersample
        self.image_shapes: Mapping[str, tuple[int, int, int]] = {IMAGE_KEY: (image_size, image_size, 3)}
        self._env = _make_env(self.task, sim.max_steps)
        self._expert = ENV_POLICY_MAP[self.task]()
        self._renderers: dict[tuple[int, int], OffscreenRenderer] = {}
        self._raw: NDArray[np.float64] | None = None
        self._steps = 0
        self._closed = False

    def reset(self, seed: int, *, render: bool = True) -> Observation:
        """Start the episode that `seed` (an integer of at least 0) determines, whatever was run before.

        Raises:
            ValueError: the seed is negative or no integer.
            RuntimeError: the environment is closed.
        """
        self._check_open()
        placement_seed = checked_seed(seed)
        mujoco.mj_resetData(self._env.model, self._env.data)
        self._env.seed(placement_seed)
        self._env.reset()
        self._raw, self._steps = _first_observation(self._env), 0
        return self._observation(render)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> Transition:
        """Execute one action for one control step (1/80 s); values outside [-1, 1] are clipped.

        Raises:
            ValueError: the action is not `(4,)` finite numbers.
            RuntimeError: there is no running episode: closed, not yet reset, or truncated at `max_steps`.
        """
        self._check_running()
        if self._steps >= self.max_steps:
            raise RuntimeError(f"the episode was truncated after {self.max_steps} steps; call reset first")
        self._raw, reward, _, _, info = self._env.step(checked_action(action, ACTION_DIM))
        self._steps += 1
        return Transition(
            observation=self._observation(render),
            reward=float(reward),
            success=bool(info["success"] > 0),
            truncated=self._steps >= self.max_steps,
        )

    def expert_action(self) -> NDArray[np.float32]:
        """Meta-World's scripted policy on the privileged observation (object and goal positions), clipped to [-1, 1].

        Raises:
            RuntimeError: closed, or not yet reset.
        """
        self._check_running()
        return np.clip(self._expert.get_action(self._raw), -1, 1).astype(np.float32)

    def render(self, height: int | None = None, width: int | None = None) -> NDArray[np.uint8]:
        """The camera's `(height, width, 3)` uint8 picture of the present state, upright; by default of the observation's size.

        Raises:
            ValueError: a size is not positive.
            RuntimeError: closed, or not yet reset.
        """
        self._check_running()
        default_height, default_width, _ = self.image_shapes[IMAGE_KEY]
        size = (default_height if height is None else height, default_width if width is None else width)
        if size not in self._renderers:
            self._renderers[size] = self._make_renderer(*size)
        # This camera hangs upside down: LeRobot flips both axes.
        return np.ascontiguousarray(self._renderers[size].render(self._env.data)[::-1, ::-1])

    def close(self) -> None:
        """Free the rendering contexts; closing twice is fine."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._closed = True

    def _make_renderer(self, height: int, width: int) -> OffscreenRenderer:
        model = self._env.model
        if max(height, width) < WHOLE_MESHES_FROM:
            model = lighter_copy(model, ROBOT_BODY, ROBOT_FACE_SHARE)
        return OffscreenRenderer(model, camera=CAMERA, height=height, width=width, supersample=self._supersample)

    def _observation(self, render: bool) -> Observation:
        assert self._raw is not None
        return Observation(
            images={IMAGE_KEY: self.render()} if render else {},
            state=self._raw[:STATE_DIM].astype(np.float32),
            instruction=self.instruction,
            step=self._steps,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this environment is closed; make a new one")

    def _check_running(self) -> None:
        self._check_open()
        if self._raw is None:
            raise RuntimeError("no episode is running; call reset(seed) first")


def _make_env(task: str, max_steps: int) -> SawyerXYZEnv:
    """The task's own class, without the benchmark around it, which would draw fifty placements first."""
    env = ALL_V3_ENVIRONMENTS[task]()
    # As MT1 sets its tasks: the goal is visible (to the expert).
    env._partially_observable = False  # noqa: SLF001
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = True  # noqa: SLF001
    env._freeze_rand_vec, env.seeded_rand_vec = False, True  # noqa: SLF001
    env.max_path_length = max_steps
    env.model.camera(CAMERA).pos = CAMERA_POSITION_M
    return env


def _first_observation(env: SawyerXYZEnv) -> NDArray[np.float64]:
    """Meta-World's raw observation of the placement just made.

    Tasks move fixtures after their last forward pass: what `reset` returns, and what would be drawn, shows a drawer or a
    button where an earlier draw had put it.
    """
    mujoco.mj_forward(env.model, env.data)
    env._prev_obs = env._get_curr_obs_combined_no_goal()  # noqa: SLF001
    return env._get_obs()  # noqa: SLF001
