"""A policy drives a fleet in lockstep time: all robots look, think as one batch, and act; then time advances."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import Config
from libra_ray.control.lockstep import Latencies, drive
from libra_ray.control.robot import RobotControl
from libra_ray.evaluation.log import Job
from libra_ray.evaluation.simulators import TRIES, Outcome, Start, died
from libra_ray.types import Action, Episode, Observation, Policy

FLUSH_CALLS = 200
"""Calls whose latencies are noted at once."""


class Noting(Protocol):
    """Who is told of results."""

    def episode(self, job: Job, episode: Episode, frames: Sequence[NDArray[np.uint8]] = ()) -> None:
        """A finished episode, with the pictures that the policy saw."""

    def latencies(self, controller: str, latencies: Latencies) -> None:
        """The wall time of batched calls."""


class Pool(Protocol):
    """Simulated robots in slots, wherever their processes are."""

    def ask(self, method: str, orders: Mapping[int, Any], alone: Collection[int] = ()) -> dict[int, Outcome]:
        """Call `begin` or `advance` with every slot's order; slots in `alone` get a call of their own.

        Where a process dies, the robots of the call it died in answer `Outcome(died=True)`; other robots of that process are
        lost (`Outcome()`).
        """


@dataclass
class Lockstep:
    """Robots in slots; a slot whose episode ends takes the next one.

    Args:
        config: the run's; how many robots, and by which rule levels are asked.
        trained: the checkpoint's; the pictures it reads.
        fleet: the simulators; an episode whose process dies is begun again.
        policy: the checkpoint's.
        notes: told of every finished episode, once.
    """

    config: Config
    trained: Config
    fleet: Pool
    policy: Policy
    notes: Noting
    robots: dict[int, RobotControl] = field(default_factory=dict)
    running: dict[int, Job] = field(default_factory=dict)
    frames: dict[int, list[NDArray[np.uint8]]] = field(default_factory=dict)
    deaths: Counter[Job] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=dict)

    def play(self, jobs: list[Job]) -> None:
        """Run all jobs, which are one controller's, to their end."""
        slots = min(self.config.evaluate.robots, len(jobs))
        self.robots = {slot: RobotControl(self.config.control, self.policy.levels) for slot in range(slots)}
        queue = iter(jobs)
        observations = self._begin({slot: next(queue) for slot in range(slots)}, queue)
        while observations:
            actions = drive(self.robots, observations, self.policy, self.latencies)
            observations = self._advance(actions, queue)
            if sum(len(calls.ms) for calls in self.latencies.values()) >= FLUSH_CALLS:
                self._flush(jobs[0].controller)
        self._flush(jobs[0].controller)

    def _flush(self, controller: str) -> None:
        self.notes.latencies(controller, self.latencies)
        self.latencies = {}

    def _begin(self, jobs: Mapping[int, Job], queue: Iterator[Job]) -> dict[int, Observation]:
        for slot, job in jobs.items():
            self.robots[slot].reset()
            self.running[slot], self.frames[slot] = job, []
        history = self.trained.data.history
        orders = {slot: Start(task=job.task, seed=job.seed, history=history) for slot, job in jobs.items()}
        return self._settle(self.fleet.ask("begin", orders, self._suspects()), queue)

    def _advance(self, actions: Mapping[int, list[Action]], queue: Iterator[Job]) -> dict[int, Observation]:
        return self._settle(self.fleet.ask("advance", actions, self._suspects()), queue)

    def _suspects(self) -> set[int]:
        """Slots whose episode was under way when a process died: the next death shall be nobody else's."""
        return {slot for slot, job in self.running.items() if self.deaths[job]}

    def _settle(self, outcomes: Mapping[int, Outcome], queue: Iterator[Job]) -> dict[int, Observation]:
        """Note finished episodes, and begin the next ones in their slots and the lost ones again."""
        observations: dict[int, Observation] = {}
        fresh: dict[int, Job] = {}
        for slot, outcome in outcomes.items():
            job, episode = self.running[slot], outcome.episode
            if outcome.observation is not None:
                observations[slot] = outcome.observation
                self.frames[slot].append(next(iter(outcome.observation.images.values())))
                continue
            if episode is None:
                self.deaths[job] += outcome.died
                if self.deaths[job] < TRIES:
                    fresh[slot] = job
                    continue
                episode = died(job.task, job.seed)
            del self.running[slot]
            self.notes.episode(job, episode, self.frames[slot])
            if (following := next(queue, None)) is not None:
                fresh[slot] = following
        return observations | (self._begin(fresh, queue) if fresh else {})
