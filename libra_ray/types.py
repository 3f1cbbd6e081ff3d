"""The numpy records of the border: what robots, controllers and policies exchange.

Letters used in shapes: `H` control steps in one action chunk, `M` chunks that one of Libra's plans covers, `L = M * H` steps in
a plan, `D` action dimensions, `S` state dimensions. Time inside an episode is counted in *absolute control steps* from 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from libra_ray.spec import UNDECLARED, VectorSpec

IMAGE_KEY = "observation.image"
"""The camera feature of LeRobot's Meta-World schema; more cameras are `observation.images.<name>`."""
STATE_KEY = "observation.state"
ACTION_KEY = "action"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one robot sees at one control step.

    Attributes:
        images: camera feature name -> `(height, width, 3)` uint8, RGB, upright. Empty when nothing was rendered.
        state: proprioception `(S,)` float32, in the robot's own units.
        instruction: the task in plain language.
        step: absolute control step within the episode, from 0.
        past: the pictures of the steps just before, oldest first, for policies with a history.
        committed: `(C, D)` float32, what the robot will do in the control steps from this one on, whatever is answered: it goes
            on with the chunk it has while the next one is computed. None where it waits.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    instruction: str
    step: int = 0
    past: Sequence[Mapping[str, NDArray[np.uint8]]] = ()
    committed: NDArray[np.float32] | None = None

    def pictures(self, key: str, history: int) -> list[NDArray[np.uint8]]:
        """The last `history` pictures of one camera, oldest first; at an episode's start the first one is repeated."""
        seen = [*(past[key] for past in self.past[max(0, len(self.past) - history + 1) :] if history > 1), self.images[key]]
        return [seen[0]] * (history - len(seen)) + seen


@dataclass(frozen=True, kw_only=True)
class RobotShape:
    """What a data set fixes about a model: dimensions of action and state, number of cameras, and its sub-goals in words.

    Attributes:
        subgoals: the different ones that its demonstrations work on, sorted; empty where no data set is there yet.
        action: what the numbers of an action mean; `state` likewise.
    """

    action_dim: int
    state_dim: int
    cameras: int
    subgoals: tuple[str, ...] = ()
    action: VectorSpec = UNDECLARED
    state: VectorSpec = UNDECLARED


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a policy. A policy has at least one, slow to fast; the last one acts.

    Attributes:
        name: e.g. `planner`; unique within the policy.
        covers: control steps that one answer covers.
        reads: the level above whose intent it reads; None reads none.
    """

    name: str
    covers: int
    reads: str | None = None


@dataclass(frozen=True, kw_only=True)
class Intent:
    """The answer of a level that does not act: a value that whoever drives the robot keeps and hands to the level below.

    Attributes:
        level: the level that answered.
        values: by name, what the level below reads, e.g. Libra's `tokens` `(L, D)` int64, one class per step and dimension.
        first_step: the absolute control step of the observation behind it, from which on it holds.
        covers: control steps that it holds for.
        made_at: clock time in seconds at which that observation was taken.
        metadata: what it says to people, plain JSON, e.g. `{"subgoals": ["touch the red block"]}`; no level reads it.
    """

    level: str
    values: Mapping[str, NDArray[Any]]
    first_step: int
    covers: int
    made_at: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end_step(self) -> int:
        """The first absolute control step that it no longer covers."""
        return self.first_step + self.covers


@dataclass(frozen=True, kw_only=True)
class ActionChunk:
    """The answer of the level that acts: continuous actions for consecutive control steps.

    Attributes:
        actions: `(H, D)` float32, in the robot's own units and clipped to its limits.
        first_step: the absolute control step of `actions[0]`.
        intent_first_step: `first_step` of the intent behind the chunk, from which the age of what is executed is counted; of a
            level that reads none, the chunk's own.
        measures: what the level says of this answer, a number by name, e.g. the share of an expert in it.
    """

    actions: NDArray[np.float32]
    first_step: int
    intent_first_step: int
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Action:
    """One action as a controller hands it to a robot.

    Attributes:
        value: `(D,)` float32, what is executed.
        label: `(D,)` float32, what should be learned; differs from `value` only where noise was added for coverage.
        intent_age_steps: control steps between the observation behind the intent in use and this action; None without one.
        held: True where no fresh action was there and the last safe one was repeated.
        chunk_first_step: of the chunk that it comes from, which is the step of the picture behind that; None of no chunk.
        measures: of that chunk.
    """

    value: NDArray[np.float32]
    label: NDArray[np.float32]
    intent_age_steps: int | None = None
    held: bool = False
    chunk_first_step: int | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Transition:
    """What a simulated robot answers to an action."""

    observation: Observation
    reward: float
    success: bool
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """One executed control step of an episode: what was seen, what was done, what came of it."""

    observation: Observation
    action: Action
    reward: float
    success: bool


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One run of one robot.

    Attributes:
        task: the simulator's task name, e.g. `drawer-open-v3`.
        seed: the seed that determines the whole episode, placements and noise.
        steps: the executed control steps in order.
        success: whether the task was done.
        error: the exception's text if the episode raised; such an episode counts as a failed one.
        frames: rendered frames `(height, width, 3)` uint8 for a video, where one was asked for.
        position_error_mm: how far from its goal the task's object ended, where the task is about that.
        parts_done: of a task in parts, how many were done, each in its turn; None where the robot counts none.
        goal_moved_at: the control step whose observation is the first to show the goal at another place; None where it stayed.
    """

    task: str
    instruction: str
    seed: int
    steps: Sequence[Step]
    success: bool
    error: str | None = None
    frames: Sequence[NDArray[np.uint8]] = ()
    position_error_mm: float | None = None
    parts_done: int | None = None
    goal_moved_at: int | None = None

    @property
    def instructions(self) -> list[str]:
        """What the robot was told at its steps, every instruction once, in the order of their first steps."""
        return list(dict.fromkeys(step.observation.instruction for step in self.steps))


class Environment(Protocol):
    """A simulated robot with one task. `libra_ray.sim` holds the implementations, `tests/sim/conformance.py` their law."""

    task: str
    instruction: str
    state_dim: int
    action_dim: int
    action_spec: VectorSpec
    state_spec: VectorSpec
    control_hz: int
    max_steps: int
    image_shapes: Mapping[str, tuple[int, int, int]]

    def reset(self, seed: int, *, render: bool = True) -> Observation:
        """Start the episode that `seed` determines; with `render=False` the observation carries no images."""

    def step(self, action: NDArray[np.float32], *, render: bool = True) -> Transition:
        """Execute one `(D,)` action in [-1, 1] for one control step."""

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert's `(D,)` action in [-1, 1] for the present simulator state (privileged)."""

    def render(self, height: int | None = None, width: int | None = None) -> NDArray[np.uint8]:
        """The main camera's `(height, width, 3)` uint8 picture of the present state."""

    def close(self) -> None:
        """Free the rendering context."""


@runtime_checkable
class Controller(Protocol):
    """Whatever drives one robot: the expert, a policy, a stub."""

    needs_images: bool

    def reset(self, environment: Environment, seed: int) -> None:
        """Forget the last episode."""

    def act(self, observation: Observation) -> Action:
        """The action for this control step."""


class Policy(Protocol):
    """A policy as levels. Stateless: intents are handed back in, so that any replica can serve any robot."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Slow to fast; the last one acts."""

    def infer(
        self, level: str, observations: Sequence[Observation], above: Sequence[Intent | None]
    ) -> Sequence[Intent | ActionChunk]:
        """The answers of one level, batched over robots: chunks of the last one, intents of the others.

        Args:
            level: its name.
            observations: of every robot.
            above: per robot the intent to read, no younger than the observation; where it is used up, or None, nothing of it is
                known any more.
        """


def check_levels(levels: Sequence[Level]) -> None:
    """Refuse levels that are none of a policy.

    Raises:
        ValueError: none, two of one name, one that reads a level which is not above it, or one above the last that no level
            reads.
    """
    names = [level.name for level in levels]
    if not levels or len(set(names)) < len(names):
        raise ValueError(f"a policy has levels of different names, at least one; got {', '.join(names) or 'none'}")
    for i, level in enumerate(levels):
        if level.covers < 1 or (level.reads is not None and level.reads not in names[:i]):
            above = ", ".join(names[:i]) or "none"
            raise ValueError(
                f"level {level.name} covers {level.covers} steps and reads {level.reads}; it must cover at least one, and read "
                f"one of the levels above it ({above})"
            )
    read = {level.reads for level in levels}
    if unread := [name for name in names[:-1] if name not in read]:
        raise ValueError(f"no level reads {unread[0]}; each level above the last must be read by one below it")


Json = dict[str, Any]
