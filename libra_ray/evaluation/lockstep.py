"""A policy drives a fleet in lockstep time: a group of robots observes, one batch answers, all of it act.

There are two groups: while the robots of one move, the other's are thought for.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from libra_ray.spec import UNDECLARED, VectorSpec
from libra_ray.types import Action, Episode, Observation, Policy

FLUSH_CALLS = 200
"""Calls whose latencies are noted at once."""
GROUPS = 2
FEWEST_ROBOTS = 16
"""Alive at a time where the settings leave it open: so many make a batch that is worth its call."""

type Collect = Callable[[], dict[int, StepResult]]
"""Waits for the answers to what was sent."""


class ResultSink(Protocol):
    """Takes results as they come."""

    def episode(
        self, job: EpisodeJob, episode: Episode, frames: Sequence[NDArray[np.uint8]] = (), replans: Sequence[Replan] = ()
    ) -> None:
        """A finished episode, with the pictures that the policy saw, and how far its intents differed from those before."""

    def latencies(self, controller: str, latencies: Latencies) -> None:
        """The wall time of batched calls."""


class Pool(Protocol):
    """Simulated robots in slots, wherever their processes are; slot s lives in process s modulo their number."""

    @property
    def processes(self) -> int:
        """How many there are."""

    def send(self, method: str, arguments: Mapping[int, Any], alone: Collection[int] = ()) -> Collect:
        """Call `begin` or `advance` with every slot's argument, and do not wait; slots in `alone` get a call of their own.

        Where a process dies, the robots of the calls that it may have died in answer `StepResult(died=True)`, in `alone` only
        the guilty one; other robots of that process are lost (`StepResult()`).
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
        action: what the policy's actions mean, as far as that is declared.
    """

    config: Config
    trained: Config
    pool: Pool
    policy: Policy
    sink: ResultSink
    delays: Delays = IN_TIME
    action: VectorSpec = UNDECLARED
    robots: dict[int, RobotControl] = field(default_factory=dict)
    running: dict[int, EpisodeJob] = field(default_factory=dict)
    frames: dict[int, list[NDArray[np.uint8]]] = field(default_factory=dict)
    deaths: Counter[EpisodeJob] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=dict)

    def play(self, jobs: Sequence[EpisodeJob]) -> None:
        """Run all jobs, which are one controller's, to their end."""
        for _ in self.ticks(jobs):
            pass

    def ticks(self, jobs: Sequence[EpisodeJob]) -> Iterator[None]:
        """`play`, with a pause whenever a group has been thought for."""
        slots = range(min(self.config.evaluate.robots or most_robots(self.pool.processes), len(jobs)))
        self.robots = {slot: RobotControl(self.config.control, self.policy.levels, action=self.action) for slot in slots}
        queue = iter(jobs)
        moving = [
            self._send({}, {slot: next(queue) for slot in slots if group_of(slot, self.pool.processes) == group})
            for group in range(GROUPS)
        ]
        while any(moving):
            for group, collect in enumerate(moving):
                if collect is None:
                    continue
                observations, fresh = self._take_results(collect(), queue)
                actions = drive(self.robots, observations, self.policy, self.latencies, self.delays)
                moving[group] = self._send(actions, fresh)
                if sum(len(calls.ms) for calls in self.latencies.values()) >= FLUSH_CALLS:
                    self._flush(jobs[0].controller)
                yield
        self._flush(jobs[0].controller)

    def _flush(self, controller: str) -> None:
        self.sink.latencies(controller, self.latencies)
        self.latencies = {}

    def _send(self, actions: Mapping[int, list[Action]], fresh: Mapping[int, EpisodeJob]) -> Collect | None:
        """Let robots move and others begin an episode, all at once; None where there are none."""
        if not actions and not fresh:
            return None
        for slot, job in fresh.items():
            self.robots[slot].reset(job.seed)
            self.running[slot], self.frames[slot] = job, []
        history = self.trained.data.history
        begun = {slot: EpisodeRequest(task=job.task, seed=job.seed, history=history) for slot, job in fresh.items()}
        # Episodes that were under way when a process died: the next death shall be nobody else's.
        suspects = {slot for slot, job in self.running.items() if self.deaths[job]}
        sent = [
            self.pool.send(method, arguments, suspects & arguments.keys())
            for method, arguments in (("advance", actions), ("begin", begun))
            if arguments
        ]

        def collect() -> dict[int, StepResult]:
            return {slot: result for answers in sent for slot, result in answers().items()}

        return collect

    def _take_results(
        self, results: Mapping[int, StepResult], queue: Iterator[EpisodeJob]
    ) -> tuple[dict[int, Observation], dict[int, EpisodeJob]]:
        """Note finished episodes; what the other robots see, and what begins, or begins again, in which slots."""
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
        return observations, fresh


def most_robots(processes: int) -> int:
    """Robots alive at a time over so many processes where the settings leave it open: each has one of either group to move."""
    return max(FEWEST_ROBOTS, GROUPS * processes)


def group_of(slot: int, processes: int) -> int:
    """Which group a slot belongs to: the robots of one process are of alternating groups, and so are those of neighbours."""
    position, process = divmod(slot, processes)
    return (process + position) % GROUPS
