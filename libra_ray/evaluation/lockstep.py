"""A policy drives a fleet in lockstep time: all robots observe, one batch answers, all act; then time advances."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import Config
from libra_ray.control.delays import Delays
from libra_ray.control.disagreement import Replan
from libra_ray.control.lockstep import IN_TIME, Latencies, drive
from libra_ray.control.robot import RobotControl
from libra_ray.evaluation.log import EpisodeJob
from libra_ray.evaluation.simulators import TRIES, EpisodeRequest, StepResult, died
from libra_ray.types import Action, Episode, Observation, Policy

FLUSH_CALLS = 200
"""Calls whose latencies are noted at once."""


class ResultSink(Protocol):
    """Takes results as they come."""

    def episode(
        self, job: EpisodeJob, episode: Episode, frames: Sequence[NDArray[np.uint8]] = (), replans: Sequence[Replan] = ()
    ) -> None:
        """A finished episode, with the pictures that the policy saw, and how far its intents differed from those before."""

    def latencies(self, controller: str, latencies: Latencies) -> None:
        """The wall time of batched calls."""


class Pool(Protocol):
    """Simulated robots in slots, wherever their processes are."""

    def ask(self, method: str, arguments: Mapping[int, Any], alone: Collection[int] = ()) -> dict[int, StepResult]:
        """Call `begin` or `advance` with every slot's argument; slots in `alone` get a call of their own.

        Where a process dies, the robots of the call it died in answer `StepResult(died=True)`; other robots of that process are
        lost (`StepResult()`).
        """


@dataclass
class Lockstep:
    """Robots in slots; a slot whose episode ends takes the next one.

    Args:
        config: the run's; how many robots, and by which rule levels are asked.
        trained: the checkpoint's; the pictures it reads.
        pool: the simulators; an episode whose process dies is begun again.
        policy: the checkpoint's.
        sink: takes every finished episode, once.
        delays: how late answers are.
    """

    config: Config
    trained: Config
    pool: Pool
    policy: Policy
    sink: ResultSink
    delays: Delays = IN_TIME
    robots: dict[int, RobotControl] = field(default_factory=dict)
    running: dict[int, EpisodeJob] = field(default_factory=dict)
    frames: dict[int, list[NDArray[np.uint8]]] = field(default_factory=dict)
    deaths: Counter[EpisodeJob] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=dict)

    def play(self, jobs: list[EpisodeJob]) -> None:
        """Run all jobs, which are one controller's, to their end."""
        slots = min(self.config.evaluate.robots, len(jobs))
        self.robots = {slot: RobotControl(self.config.control, self.policy.levels) for slot in range(slots)}
        queue = iter(jobs)
        observations = self._begin({slot: next(queue) for slot in range(slots)}, queue)
        while observations:
            actions = drive(self.robots, observations, self.policy, self.latencies, self.delays)
            observations = self._advance(actions, queue)
            if sum(len(calls.ms) for calls in self.latencies.values()) >= FLUSH_CALLS:
                self._flush(jobs[0].controller)
        self._flush(jobs[0].controller)

    def _flush(self, controller: str) -> None:
        self.sink.latencies(controller, self.latencies)
        self.latencies = {}

    def _begin(self, jobs: Mapping[int, EpisodeJob], queue: Iterator[EpisodeJob]) -> dict[int, Observation]:
        for slot, job in jobs.items():
            self.robots[slot].reset(job.seed)
            self.running[slot], self.frames[slot] = job, []
        history = self.trained.data.history
        arguments = {slot: EpisodeRequest(task=job.task, seed=job.seed, history=history) for slot, job in jobs.items()}
        return self._take_results(self.pool.ask("begin", arguments, self._suspects()), queue)

    def _advance(self, actions: Mapping[int, list[Action]], queue: Iterator[EpisodeJob]) -> dict[int, Observation]:
        return self._take_results(self.pool.ask("advance", actions, self._suspects()), queue)

    def _suspects(self) -> set[int]:
        """Slots whose episode was under way when a process died: the next death shall be nobody else's."""
        return {slot for slot, job in self.running.items() if self.deaths[job]}

    def _take_results(self, results: Mapping[int, StepResult], queue: Iterator[EpisodeJob]) -> dict[int, Observation]:
        """Note finished episodes, and begin the next ones in their slots and the lost ones again."""
        observations: dict[int, Observation] = {}
        fresh: dict[int, EpisodeJob] = {}
        for slot, result in results.items():
            job, episode = self.running[slot], result.episode
            if result.observation is not None:
                observations[slot] = result.observation
                self.frames[slot].append(next(iter(result.observation.images.values())))
                continue
            if episode is None:
                self.deaths[job] += result.died
                if self.deaths[job] < TRIES:
                    fresh[slot] = job
                    continue
                episode = died(job.task, job.seed)
            del self.running[slot]
            self.sink.episode(job, episode, self.frames[slot], self.robots[slot].take_replans())
            if (following := next(queue, None)) is not None:
                fresh[slot] = following
        return observations | (self._begin(fresh, queue) if fresh else {})
