"""Our own MuJoCo tasks: the instruction decides what is right, tolerance and length are dials, one core is enough."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import SimConfig
from libra_ray.sim.render.offscreen import OffscreenRenderer
from libra_ray.sim.tabletop.expert import expert_action
from libra_ray.sim.tabletop.goals import GoalProgress
from libra_ray.sim.tabletop.mistakes import Mistake
from libra_ray.sim.tabletop.moves import check_goal_moves, move_goal, spots_of
from libra_ray.sim.tabletop.physics import CONTROL_HZ, MOUTH_CLEARANCE_M, Placement, World, draw_placement
from libra_ray.sim.tabletop.tasks import Part, Task, any_push, draw_parts, instruction, parse_task
from libra_ray.sim.validation import checked_action, checked_seed
from libra_ray.spec import RobotSpec, VectorSpec
from libra_ray.types import IMAGE_KEY, Observation, Transition

NAMES = ("x", "y", "z", "gripper")
ACTION = VectorSpec(names=NAMES, ranges=((-1, 1),) * 4, gripper=3, delta=True, rotation="none")
STATE = VectorSpec(names=NAMES, ranges=(None, None, None, (0, 1)), gripper=3, delta=False, rotation="none")
ACTION_DIM = STATE_DIM = len(NAMES)
CAMERAS = {IMAGE_KEY: "front", "observation.images.wrist": "wrist"}
"""Camera feature -> camera of the scene; the second one only where `sim.wrist_camera` asks for it."""
_SCENE_STREAM, _INSTRUCTION_STREAM, _GRASP_STREAM = 0x7363656E, 0x696E7374, 0x67726173
"""Keep scene, instruction and grasp independent of one another, and of the expert's noise, all drawn from the same seed."""


def robot_spec(sim: SimConfig) -> RobotSpec:
    """The gripper, with the wrist's camera where `sim` asks for it."""
    cameras = tuple(CAMERAS) if sim.wrist_camera else (IMAGE_KEY,)
    return RobotSpec(
        action_dim=ACTION_DIM, state_dim=STATE_DIM, cameras=cameras, control_hz=CONTROL_HZ, action=ACTION, state=STATE
    )


def episode_instruction(task: str, seed: int) -> str:
    """What `task` asks for in the episode of `seed`."""
    return instruction(_draw(parse_task(task), _placement(seed), seed))


class Tabletop:
    """A Cartesian gripper at a table; implements `libra_ray.types.Environment`.

    On the table there are always three blocks, a peg, two marks, two bins and two sockets, wherever the seed has put them.
    What to do with which of them is drawn independently, so the first picture never tells: only the instruction does (of
    `putdown` the picture tells which block, but not where to).
    Actions `(4,)` in [-1, 1]: hand displacement x (right), y (away from the camera), z (up), where 1 means 2 cm per control
    step, and the gripper (1 closes, -1 opens). State `(4,)`: hand position in metres, gripper opening in [0, 1]. Not for use by
    several threads at once.

    Args:
        sim: episode length, how finely pictures are drawn, whether there is a second camera at the wrist, and when the goal is
            moved.
        image_size: height and width of the pictures, in pixels.
        task: `touch`, `push`, `bin`, `place`, `putdown` (a `place` that begins with its block in the hand), `stack`, `insert`,
            `chain1` to `chain4`, or `contact1` to `contact3`; `place`, `putdown`, `insert` and `chain` take a tolerance, e.g.
            `place-1mm`.

    Attributes:
        instruction: of the present episode; before the first one, the task's name.
        parts: the instruction's sub-goals, in order.
        goal_moved_at: the control step whose observation is the first to show the goal moved; None as long as it was not.

    Raises:
        ValueError: there is no such task, or its goal is to be moved and has no other place.
    """

    state_dim = STATE_DIM
    action_dim = ACTION_DIM
    action_spec = ACTION
    state_spec = STATE
    control_hz = CONTROL_HZ

    def __init__(self, sim: SimConfig, task: str, image_size: int) -> None:
        self._task = parse_task(task)
        self.task = self.instruction = task
        self.parts: tuple[Part, ...] = ()
        self.max_steps, self._goal_moves_at = sim.max_steps, sim.goal_moves_at
        if sim.goal_moves_at:
            check_goal_moves(task)
        self.goal_moved_at: int | None = None
        self._supersample = sim.supersample
        shape = (image_size, image_size, 3)
        self.image_shapes: Mapping[str, tuple[int, int, int]] = dict.fromkeys(robot_spec(sim).cameras, shape)
        self._world = World(min(self._task.tolerance_mm / 1000, MOUTH_CLEARANCE_M))
        self._renderers: dict[tuple[str, int, int], OffscreenRenderer] = {}
        self._progress: GoalProgress | None = None
        self._steps = 0
        self._closed = False

    @property
    def parts_done(self) -> int:
        """Sub-goals done so far in this episode, in their order."""
        return self._running().parts_done

    @property
    def position_error_mm(self) -> float | None:
        """Distance on the table from the current sub-goal's place (`place`, `insert`, `stack`; None for others)."""
        return self._running().error_mm

    def reset(self, seed: int, *, render: bool = True, scene_seed: int | None = None) -> Observation:
        """Start the episode that `seed` (an integer of at least 0) determines, whatever was run before.

        With `scene_seed` the scene is that seed's, and only the instruction follows from `seed`.

        Raises:
            ValueError: a seed is negative or no integer.
            RuntimeError: the environment is closed.
        """
        self._check_open()
        placement = _placement(checked_seed(seed if scene_seed is None else scene_seed))
        self.parts = _draw(self._task, placement, checked_seed(seed))
        self.instruction = instruction(self.parts)
        self._world.reset(placement)
        if self._task.in_hand:
            self._world.take(self.parts[0].item, np.random.default_rng([checked_seed(seed), _GRASP_STREAM]))
        self._progress, self._steps = GoalProgress(self._world, self.parts, self._task.tolerance_mm), 0
        self._seed, self.goal_moved_at = checked_seed(seed), None
        return self._observation(render)

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> Transition:
        """Execute one action for one control step (1/20 s); values outside [-1, 1] are clipped.

        Once all sub-goals are done, the episode stays a success. A step's reward is the share of the sub-goals that it did.

        Raises:
            ValueError: the action is not `(4,)` finite numbers.
            RuntimeError: there is no running episode: closed, not yet reset, or truncated at `max_steps`.
        """
        progress = self._running()
        if self._steps >= self.max_steps:
            raise RuntimeError(f"the episode was truncated after {self.max_steps} steps; call reset first")
        self._world.advance(checked_action(action, ACTION_DIM))
        self._steps += 1
        before = progress.parts_done
        progress.update()
        if self._steps == self._goal_moves_at and not progress.done:
            self._move_goal(progress)
        return Transition(
            observation=self._observation(render),
            reward=(progress.parts_done - before) / len(self.parts),
            success=progress.done,
            truncated=self._steps >= self.max_steps,
        )

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert on the privileged state, in [-1, 1].

        Raises:
            RuntimeError: closed, or not yet reset.
        """
        return expert_action(self._world, self._running(), self._task.tolerance_mm)

    def mistake(self, rng: np.random.Generator) -> Mistake:
        """A mistake that the expert will make in the episode that was just started, and recover from.

        Raises:
            RuntimeError: closed, or not yet reset.
        """
        return Mistake(self._world, self._running(), self._task.tolerance_mm, in_hand=self._task.in_hand, rng=rng)

    def render(self, height: int | None = None, width: int | None = None) -> NDArray[np.uint8]:
        """The front camera's `(height, width, 3)` uint8 picture of the present state; by default of the observation's size.

        Raises:
            ValueError: a size is not positive.
            RuntimeError: closed, or not yet reset.
        """
        self._running()
        default_height, default_width, _ = self.image_shapes[IMAGE_KEY]
        return self._picture(IMAGE_KEY, default_height if height is None else height, default_width if width is None else width)

    def close(self) -> None:
        """Free the rendering contexts; closing twice is fine."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._closed = True

    def _move_goal(self, progress: GoalProgress) -> None:
        thing = move_goal(self._world, progress.current, spots_of(self._seed))
        if thing is not None:
            self.goal_moved_at = self._steps
            if thing in progress.start:
                progress.moved(thing)

    def _picture(self, key: str, height: int, width: int) -> NDArray[np.uint8]:
        view = (CAMERAS[key], height, width)
        if view not in self._renderers:
            self._renderers[view] = OffscreenRenderer(
                self._world.model, camera=CAMERAS[key], height=height, width=width, supersample=self._supersample
            )
        return self._renderers[view].render(self._world.data)

    def _observation(self, render: bool) -> Observation:
        shapes = self.image_shapes if render else {}
        return Observation(
            images={key: self._picture(key, height, width) for key, (height, width, _) in shapes.items()},
            state=np.array([*self._world.hand, self._world.opening_01], np.float32),
            instruction=self.instruction,
            step=self._steps,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this environment is closed; make a new one")

    def _running(self) -> GoalProgress:
        self._check_open()
        if self._progress is None:
            raise RuntimeError("no episode is running; call reset(seed) first")
        return self._progress


def _draw(task: Task, placement: Placement, seed: int) -> tuple[Part, ...]:
    """The seed's instruction in a scene."""
    return draw_parts(task, placement, np.random.default_rng([seed, _INSTRUCTION_STREAM]))


def _placement(seed: int) -> Placement:
    """The seed's scene: the first one that leaves a choice of pushes, whatever the task, so that scenes tell no tasks apart."""
    rng = np.random.default_rng([seed, _SCENE_STREAM])
    placement = draw_placement(rng)
    while not any_push(placement):
        placement = draw_placement(rng)
    return placement
