"""Simulated robots in a few processes of their own, for one event loop that drives them all. No torch, no engine."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import SimConfig
from libra_ray.evaluation.rollout import Rollout
from libra_ray.fleet.robots import Moved
from libra_ray.sim import make_environment
from libra_ray.types import Action, Environment


@dataclass
class _World:
    """What one process holds: every robot's environment, kept from episode to episode, and its present episode."""

    sim: SimConfig
    history: int
    environments: dict[int, Environment] = field(default_factory=dict)
    rollouts: dict[int, Rollout] = field(default_factory=dict)


_world: _World


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A robot's move, and the CPU seconds that its process has used so far."""

    moved: Moved
    cpu_s: float


def _open(sim: SimConfig, history: int) -> None:
    global _world
    # Ctrl-C is the driver's business; its end is ours.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    _world = _World(sim, history)


def _end_with_driver() -> None:
    """A driver that was killed cannot end its processes."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _begin(robot: int, task: str, seed: int) -> _Answer:
    if robot not in _world.environments:
        _world.environments[robot] = make_environment(_world.sim, task)
    rollout = Rollout(_world.environments[robot], seed, history=_world.history)
    rollout.start(render=True)
    _world.rollouts[robot] = rollout
    return _answer(rollout, 0)


def _execute(robot: int, actions: NDArray[np.float32]) -> _Answer:
    rollout, executed = _world.rollouts[robot], 0
    for i, value in enumerate(actions):
        if not rollout.done:
            # A policy with a history also reads the pictures of the steps just before.
            rollout.step(Action(value=value, label=value), render=len(actions) - i <= _world.history)
            executed += 1
    return _answer(rollout, executed)


def _answer(rollout: Rollout, executed: int) -> _Answer:
    success = rollout.episode().success if rollout.done else None
    moved = Moved(observation=rollout.observation, executed=executed, success=success)
    return _Answer(moved=moved, cpu_s=time.process_time())


class Bodies:
    """A fleet's robots. Robot number i has task `tasks[i % len(tasks)]`; its episodes have seeds that no other robot has.

    Args:
        sim: family, picture size and episode length.
        tasks: task names of the family.
        robots: how many.
        history: pictures per camera in an observation.
        seed: of the first episodes.
        processes: that simulate; 0 means one per core, and at most one per four robots.
    """

    def __init__(
        self, sim: SimConfig, tasks: Sequence[str], robots: int, *, history: int = 1, seed: int = 100_000, processes: int = 0
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        number = processes or max(1, min(cores, -(-robots // 4)))
        context = multiprocessing.get_context("spawn")
        pools = [ProcessPoolExecutor(1, mp_context=context, initializer=_open, initargs=(sim, history)) for _ in range(number)]
        self._pools = pools
        self._cpu_s = [0.0] * number
        self.bodies = [
            _Body(self, pool=i % number, robot=i, task=tasks[i % len(tasks)], seeds=count(seed + i, robots))
            for i in range(robots)
        ]

    def __enter__(self) -> Self:
        """Processes start with the first episodes."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    async def ready(self) -> None:
        """Start the processes and build every robot, so that nobody has to when the clock runs."""
        await asyncio.gather(*(body.build() for body in self.bodies))

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the processes have used so far."""
        return sum(self._cpu_s)

    async def ask(self, pool: int, function: Any, *arguments: Any) -> Moved:
        """Call a function of this module in one of the processes."""
        answer: _Answer = await asyncio.get_running_loop().run_in_executor(self._pools[pool], function, *arguments)
        self._cpu_s[pool] = answer.cpu_s
        return answer.moved


class _Body:
    """One robot of a fleet; see `libra_ray.fleet.robot.Body`."""

    def __init__(self, bodies: Bodies, *, pool: int, robot: int, task: str, seeds: Any) -> None:
        self.task = task
        self._bodies, self._pool, self._robot, self._seeds = bodies, pool, robot, seeds

    async def build(self) -> None:
        await self._bodies.ask(self._pool, _begin, self._robot, self.task, 0)

    async def begin(self) -> Moved:
        return await self._bodies.ask(self._pool, _begin, self._robot, self.task, next(self._seeds))

    async def execute(self, actions: NDArray[np.float32]) -> Moved:
        return await self._bodies.ask(self._pool, _execute, self._robot, actions)
