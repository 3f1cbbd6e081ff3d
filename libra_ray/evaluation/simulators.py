"""Simulated robots of one process: any number of environments, each in its slot. Knows neither torch nor Ray."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from libra_ray.config import RecordConfig, SimConfig
from libra_ray.data.spool import save_episode
from libra_ray.data.video import EncodedClip, EncoderSettings, encode
from libra_ray.evaluation.log import EpisodeJob, PlayedEpisode
from libra_ray.evaluation.rollout import Rollout, failed, run_counted
from libra_ray.sim import control_hz, make_environment, take_turn
from libra_ray.sim.scripted_controllers import ExpertController, ZeroController
from libra_ray.types import Action, Controller, Environment, Episode, Observation

TRIES = 3
"""How often an episode is begun before it counts as an error: one that kills its process would do so for ever."""
DIED = f"the simulator's process died {TRIES} times in this episode"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a recorded attempt came to; its pictures are in the spool file, not in this message."""

    task: str
    seed: int
    success: bool
    steps: int
    error: str | None


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a robot's actions led to: the next observation, or the finished episode without its pictures.

    Neither means that the episode is lost and has to begin again; `died` says that its process died while the robot moved.
    """

    observation: Observation | None = None
    episode: Episode | None = None
    died: bool = False


@dataclass(frozen=True, kw_only=True)
class EpisodeRequest:
    """An episode to begin; its observations carry `history` pictures per camera, the present one included."""

    task: str
    seed: int
    history: int = 1


@dataclass(frozen=True, kw_only=True)
class RunningEpisode:
    """A running episode and its request; the environment's own name of the task may lack a prefix."""

    request: EpisodeRequest
    rollout: Rollout


class Simulators:
    """One process with any number of simulated robots, each in its slot; environments are kept and used again per task."""

    def __init__(self, sim: SimConfig, image_size: int, number: int = 0) -> None:
        """Nothing is built before the first episode.

        Args:
            number: of this process among those of its kind, which take turns on the GPUs that they draw on.
        """
        take_turn(number)
        self.sim, self.image_size = sim, image_size
        self.idle: dict[str, list[Environment]] = {}
        self.running: dict[int, RunningEpisode] = {}

    def demonstrate(
        self, task: str, seed: int, record: RecordConfig, path: Path, encoder: EncoderSettings | None = None
    ) -> Attempt:
        """Record one episode by the expert; only a success is written to `path`, its pictures as clips of the encoder."""
        expert = ExpertController(
            noise_std=record.noise_std, noise_share=record.noise_share, recovery_share=record.recovery_share
        )
        episode = self._whole(task, seed, expert, render=True, settle_steps=record.settle_steps)
        if episode.success:
            save_episode(path, episode, {} if encoder is None else self._clips(episode, encoder))
        return Attempt(task=task, seed=seed, success=episode.success, steps=len(episode.steps), error=episode.error)

    def _clips(self, episode: Episode, encoder: EncoderSettings) -> dict[str, EncodedClip]:
        fps = control_hz(self.sim)
        seen = [step.observation.images for step in episode.steps]
        stacks = {key: np.stack([images[key] for images in seen]) for key in seen[0]}
        return {key: encode(stack, fps, encoder) for key, stack in stacks.items()}

    def play(self, job: EpisodeJob) -> PlayedEpisode:
        """One episode by a controller that needs no policy: `expert` or `zero_action`."""
        scripted = ExpertController() if job.controller == "expert" else ZeroController()
        return PlayedEpisode.of(job, self._whole(job.task, job.seed, scripted, render=False))

    def begin(self, episodes: Mapping[int, EpisodeRequest]) -> dict[int, StepResult]:
        """Start episodes in slots."""
        return {slot: self._start(slot, request) for slot, request in episodes.items()}

    def advance(self, actions: Mapping[int, Sequence[Action]]) -> dict[int, StepResult]:
        """Execute each slot's actions; pictures are taken after the last of them (and earlier, for a policy with a history)."""
        results = {}
        for slot, queue in actions.items():
            known = slot in self.running
            results[slot] = self._counted(slot, partial(self._execute, slot, queue)) if known else StepResult()
        return results

    def _whole(self, task: str, seed: int, controller: Controller, **options: Any) -> Episode:
        try:
            environment = self._take(task)
        except Exception as error:  # noqa: BLE001  (the border of one episode)
            return not_begun(task, seed, error)
        episode = run_counted(environment, controller, seed, **options)
        self._give(task, environment, broken=episode.error is not None)
        return episode

    def _start(self, slot: int, request: EpisodeRequest) -> StepResult:
        if left := self.running.pop(slot, None):
            # Whoever drove it is gone; what it was about begins again.
            self._give(left.request.task, left.rollout.environment, broken=False)
        try:
            environment = self._take(request.task)
        except Exception as error:  # noqa: BLE001  (the border of one episode)
            return StepResult(episode=not_begun(request.task, request.seed, error))
        rollout = Rollout(environment, request.seed, history=request.history)
        self.running[slot] = RunningEpisode(request=request, rollout=rollout)
        return self._counted(slot, partial(rollout.start, render=True))

    def _execute(self, slot: int, queue: Sequence[Action]) -> None:
        robot = self.running[slot]
        for i, action in enumerate(queue):
            if not robot.rollout.done:
                robot.rollout.step(action, render=len(queue) - i <= robot.request.history)

    def _counted(self, slot: int, act: Callable[[], None]) -> StepResult:
        """The result of a robot's step; an exception ends its episode as one counted error and disturbs no other robot."""
        robot, rollout = self.running[slot], self.running[slot].rollout
        try:
            act()
            if not rollout.done:
                return StepResult(observation=rollout.observation)
            episode = without_pictures(rollout.episode())
        except Exception as error:  # noqa: BLE001  (the border of one episode)
            episode = failed(rollout.environment, rollout.seed, error)
        del self.running[slot]
        self._give(robot.request.task, rollout.environment, broken=episode.error is not None)
        return StepResult(episode=episode)

    def _take(self, task: str) -> Environment:
        pool = self.idle.setdefault(task, [])
        return pool.pop() if pool else make_environment(self.sim, task, self.image_size)

    def _give(self, task: str, environment: Environment, *, broken: bool) -> None:
        # An environment that raised may be broken: it is not used again.
        if not broken:
            self.idle[task].append(environment)
        else:
            with suppress(Exception):
                environment.close()


def not_begun(task: str, seed: int, error: Exception) -> Episode:
    """The episode of an environment that could not even be made: one counted error like any other."""
    return Episode(task=task, instruction="", seed=seed, steps=(), success=False, error=f"{type(error).__name__}: {error}")


def died(task: str, seed: int) -> Episode:
    """The episode that killed its process every time: one counted error."""
    return Episode(task=task, instruction="", seed=seed, steps=(), success=False, error=DIED)


def without_pictures(episode: Episode) -> Episode:
    """The episode as it travels to the driver, which has seen the pictures already."""
    steps = [replace(step, observation=replace(step.observation, images={}, past=())) for step in episode.steps]
    return replace(episode, steps=steps)
