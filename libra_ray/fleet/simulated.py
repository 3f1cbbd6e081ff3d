"""Simulated robots in a few processes of their own, for one event loop that drives them all. No torch, no engine."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import SimConfig
from libra_ray.evaluation.rollout import Rollout
from libra_ray.fleet.robots import MotionResult
from libra_ray.sim import make_environment
from libra_ray.types import Action, Environment


@dataclass
class _Worker:
    """What one process holds: every robot's environment, kept from episode to episode, and its present episode."""

    sim: SimConfig
    image_size: int
    history: int
    environments: dict[int, Environment] = field(default_factory=dict)
    rollouts: dict[int, Rollout] = field(default_factory=dict)


_worker: _Worker


@dataclass(frozen=True, kw_only=True)
class _WorkerResult:
    """A robot's motion, and the CPU seconds that its process has used so far."""

    motion: MotionResult
    cpu_s: float


def _open(sim: SimConfig, image_size: int, history: int) -> None:
    global _worker
    threading.Thread(target=_end_with_driver, daemon=True).start()
    _worker = _Worker(sim, image_size, history)


def _end_with_driver() -> None:
    """A driver that was killed cannot end its processes."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _begin(robot: int, task: str, seed: int) -> _WorkerResult:
    if robot not in _worker.environments:
        _worker.environments[robot] = make_environment(_worker.sim, task, _worker.image_size)
    rollout = Rollout(_worker.environments[robot], seed, history=_worker.history)
    rollout.start(render=True)
    _worker.rollouts[robot] = rollout
    return _result(rollout, 0)


def _execute(robot: int, actions: NDArray[np.float32]) -> _WorkerResult:
    rollout, executed = _worker.rollouts[robot], 0
    for i, value in enumerate(actions):
        if not rollout.done:
            # A policy with a history also reads the pictures of the steps just before.
            rollout.step(Action(value=value, label=value), render=len(actions) - i <= _worker.history)
            executed += 1
    return _result(rollout, executed)


def _result(rollout: Rollout, executed: int) -> _WorkerResult:
    success = rollout.episode().success if rollout.done else None
    motion = MotionResult(observation=rollout.observation, executed=executed, success=success)
    return _WorkerResult(motion=motion, cpu_s=time.process_time())


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that start meanwhile never hear Ctrl-C, from their first instruction on: it is the driver's business.

    The driver hears it, afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SimulatedFleet:
    """A fleet's robots. Robot number i has task `tasks[i % len(tasks)]`; its episodes have seeds that no other robot has.

    Args:
        sim: family and episode length.
        image_size: height and width of the pictures, in pixels.
        tasks: task names of the family.
        robots: how many.
        history: pictures per camera in an observation.
        seed: of the first episodes.
        processes: that simulate; 0 means one per core, and at most one per four robots.
    """

    def __init__(
        self,
        sim: SimConfig,
        image_size: int,
        tasks: Sequence[str],
        robots: int,
        *,
        history: int = 1,
        seed: int = 100_000,
        processes: int = 0,
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        number = processes or max(1, min(cores, -(-robots // 4)))
        context = multiprocessing.get_context("spawn")
        given = (sim, image_size, history)
        pools = [ProcessPoolExecutor(1, mp_context=context, initializer=_open, initargs=given) for _ in range(number)]
        with _deaf_to_interrupts():
            for pool in pools:
                # A pool starts its process at its first call.
                pool.submit(int)
        self._pools = pools
        self._cpu_s = [0.0] * number
        self.robots = [
            _SimulatedRobot(self, pool=i % number, robot=i, task=tasks[i % len(tasks)], seeds=count(seed + i, robots))
            for i in range(robots)
        ]

    def __enter__(self) -> Self:
        """Its processes have begun to start."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    async def ready(self) -> None:
        """Build every robot, so that nobody has to when the clock runs."""
        await asyncio.gather(*(robot.build() for robot in self.robots))

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the processes have used so far."""
        return sum(self._cpu_s)

    async def ask(self, pool: int, function: Any, *arguments: Any) -> MotionResult:
        """Call a function of this module in one of the processes."""
        answer: _WorkerResult = await asyncio.get_running_loop().run_in_executor(self._pools[pool], function, *arguments)
        self._cpu_s[pool] = answer.cpu_s
        return answer.motion


class _SimulatedRobot:
    """One robot of a fleet; see `libra_ray.fleet.robot.SimulatedRobot`."""

    def __init__(self, fleet: SimulatedFleet, *, pool: int, robot: int, task: str, seeds: Any) -> None:
        self.task = task
        self._fleet, self._pool, self._robot, self._seeds = fleet, pool, robot, seeds

    async def build(self) -> None:
        await self._fleet.ask(self._pool, _begin, self._robot, self.task, 0)

    async def begin(self) -> MotionResult:
        return await self._fleet.ask(self._pool, _begin, self._robot, self.task, next(self._seeds))

    async def execute(self, actions: NDArray[np.float32]) -> MotionResult:
        return await self._fleet.ask(self._pool, _execute, self._robot, actions)
