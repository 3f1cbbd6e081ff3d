"""One robot, one controller, one episode: what records with the expert, measures with a policy and tests with a stub."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import Action, Controller, Environment, Episode, Observation, Step


class Rollout:
    """An episode that is driven from outside, action by action: by `run` in one process, or by a fleet's policy far away.

    Args:
        environment: is reset with `seed` by `start`.
        seed: determines the episode.
        history: pictures per camera that observations carry, the present one included.
        settle_steps: control steps after the first success.
        keep_frames_every: control steps between two frames for a video; None keeps none.
        frame_size: height and width of those frames; None means the observation's.

    Attributes:
        observation: what the robot sees now.
        done: whether the episode has ended, by success or truncation.
    """

    observation: Observation

    def __init__(
        self,
        environment: Environment,
        seed: int,
        *,
        history: int = 1,
        settle_steps: int = 0,
        keep_frames_every: int | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> None:
        self.environment, self.seed = environment, seed
        self.done = False
        self._steps: list[Step] = []
        self._frames: list[NDArray[np.uint8]] = []
        self._past: deque[Mapping[str, NDArray[np.uint8]]] = deque(maxlen=history - 1)
        self._settle = settle_steps
        self._left: int | None = None
        self._every, self._frame_size = keep_frames_every, frame_size or ()

    def start(self, *, render: bool) -> None:
        """Reset the environment; with `render` the first observation carries pictures."""
        self.observation = self.environment.reset(self.seed, render=render)

    def step(self, action: Action, *, render: bool) -> None:
        """Execute one action; with `render` the next observation carries pictures."""
        assert not self.done, "the episode has ended"
        if self._every and len(self._steps) % self._every == 0:
            self._frames.append(self.environment.render(*self._frame_size))
        after = self.environment.step(action.value, render=render)
        self._steps.append(Step(observation=self.observation, action=action, reward=after.reward, success=after.success))
        self._observe(after.observation)
        if self._left is not None:
            self._left -= 1
        elif after.success:
            self._left = self._settle
        self.done = after.truncated or self._left == 0

    def episode(self) -> Episode:
        """The episode so far; it has succeeded if any of its steps has."""
        return Episode(
            task=self.environment.task,
            instruction=self.environment.instruction,
            seed=self.seed,
            steps=tuple(self._steps),
            success=any(step.success for step in self._steps),
            frames=tuple(self._frames),
            # Only some families of robots have tasks with a place to be right about, with parts, or one that can be moved.
            position_error_mm=getattr(self.environment, "position_error_mm", None),
            parts_done=getattr(self.environment, "parts_done", None),
            goal_moved_at=getattr(self.environment, "goal_moved_at", None),
        )

    def _observe(self, observation: Observation) -> None:
        if self._past.maxlen and self.observation.images:
            self._past.append(self.observation.images)
        if self._past and observation.images:
            observation = Observation(
                images=observation.images,
                state=observation.state,
                instruction=observation.instruction,
                step=observation.step,
                past=tuple(self._past),
            )
        self.observation = observation


def run(
    environment: Environment,
    controller: Controller,
    seed: int,
    *,
    render: bool | None = None,
    settle_steps: int = 0,
    keep_frames_every: int | None = None,
    frame_size: tuple[int, int] | None = None,
) -> Episode:
    """Run one episode until success, and `settle_steps` beyond it, or truncation.

    Args:
        environment: is reset with `seed`.
        controller: is reset with `seed`.
        seed: determines the episode.
        render: whether observations carry images; None means where the controller needs them.
        settle_steps: control steps after the first success.
        keep_frames_every: control steps between two frames for a video; None keeps none.
        frame_size: height and width of those frames; None means the observation's.

    Returns:
        The episode; it has succeeded if any of its steps has.

    Raises:
        ValueError: images were refused to a controller that needs them.
    """
    if render is False and controller.needs_images:
        raise ValueError(f"{type(controller).__name__} needs images; render must be True or left out")
    with_images = controller.needs_images or render is True
    rollout = Rollout(environment, seed, settle_steps=settle_steps, keep_frames_every=keep_frames_every, frame_size=frame_size)
    rollout.start(render=with_images)
    controller.reset(environment, seed)
    while not rollout.done:
        rollout.step(controller.act(rollout.observation), render=with_images)
    return rollout.episode()


def run_counted(environment: Environment, controller: Controller, seed: int, **options: Any) -> Episode:
    """`run`, where an exception becomes a failed episode with its text: one broken episode must not end a fleet's work."""
    try:
        return run(environment, controller, seed, **options)
    except Exception as error:  # noqa: BLE001
        return failed(environment, seed, error)


def failed(environment: Environment, seed: int, error: Exception) -> Episode:
    """The episode that an exception ended, with its text: it counts as a failure."""
    text = f"{type(error).__name__}: {error}"
    return Episode(task=environment.task, instruction=environment.instruction, seed=seed, steps=(), success=False, error=text)
