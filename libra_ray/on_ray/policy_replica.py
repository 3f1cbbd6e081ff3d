"""The policy in a process of its own: an actor that drives robots, and reports their episodes on the way."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from ray.actor import ActorProxy

from libra_ray.config import Config
from libra_ray.control.delays import Delays
from libra_ray.control.lockstep import Latencies
from libra_ray.evaluation.lockstep import Lockstep
from libra_ray.evaluation.log import EpisodeJob, PlayedEpisode, ResultBuffer
from libra_ray.evaluation.simulators import Simulators
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.policy import SystemPolicy
from libra_ray.spec import UNDECLARED, VectorSpec
from libra_ray.types import Policy

SMALL_MODEL = 20_000_000
"""Weights below which layers are too small to share among threads, and an answer is there before other robots have moved."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A policy that drives robots.

    Attributes:
        trained: the configuration it was trained under.
        delays: how late its answers are.
        action: what its actions mean, as far as that is declared.
    """

    policy: Policy
    trained: Config
    delays: Delays
    action: VectorSpec = UNDECLARED


type OpenDriver = Callable[[str], Driver]
"""A controller's name to what drives the robots."""


@dataclass(frozen=True, kw_only=True)
class ReplicaReport:
    """What a replica has done since its last report: episodes, and calls by their controller."""

    episodes: Sequence[PlayedEpisode]
    calls: dict[str, Latencies]


class PolicyReplica:
    """The policy in a process of its own; it drives the simulators that it is given."""

    def __init__(self, config: Config, open_driver: OpenDriver, threads: int) -> None:
        """Nothing is loaded before it is needed.

        Args:
            config: the run's.
            threads: that it may compute with.
        """
        self._config, self._open, self._threads = config, open_driver, threads
        self._drivers: dict[str, Driver] = {}

    def load(self, controller: str) -> None:
        """Load a policy; only the last one is kept."""
        if controller not in self._drivers:
            self._drivers.clear()
            self._drivers[controller] = self._open(controller)
            torch.set_num_threads(threads_of(self._drivers[controller].policy, self._threads))

    def play(
        self, controller: str, jobs: Sequence[EpisodeJob], actors: Sequence[ActorProxy[Simulators]], cpus_each: float
    ) -> Iterator[ReplicaReport]:
        """Run episodes of one controller to their end, on simulators that reserve `cpus_each`, and report on the way."""
        self.load(controller)
        driver, buffer = self._drivers[controller], ResultBuffer(self._config.evaluate.videos_per_task)
        pool = SimulatorPool(self._config.sim, self._config.data.image_size, cpus_each=cpus_each, given=actors)
        fleet = Lockstep(self._config, driver.trained, pool, driver.policy, buffer, driver.delays, driver.action)
        for _ in fleet.ticks(jobs):
            if buffer.episodes:
                yield _report(buffer)
        yield _report(buffer)


def _report(buffer: ResultBuffer) -> ReplicaReport:
    episodes, calls = buffer.take()
    return ReplicaReport(episodes=episodes, calls=calls)


def threads_of(policy: Policy, cpus: int) -> int:
    """With how many threads a policy's answers are there soonest while robots move on the same CPUs."""
    if not isinstance(policy, SystemPolicy) or torch.device(policy.device).type != "cpu":
        return 1
    weights = sum(parameter.numel() for parameter in policy.model.parameters())
    return 1 if weights < SMALL_MODEL else max(1, min(cpus, os.cpu_count() or 1))
