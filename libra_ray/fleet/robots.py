"""The two kinds of robots that drive: stubs that replay what was recorded, and simulated ones.

A robot that is told to hold executes one safe action and asks again at its next control step, not a whole chunk later. If it
is told so again it waits twice as long, up to a chunk, so that a fleet without plans does not keep its server from making them.
"""

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from libra_ray.client.protocol import Reply
from libra_ray.fleet.log import FinishedEpisode
from libra_ray.fleet.robot import DrivenRobot
from libra_ray.types import Observation


@dataclass(frozen=True, kw_only=True)
class StubObservation:
    """An observation of a stub robot, and whether it begins an episode."""

    observation: Observation
    begins: bool = False


@dataclass(frozen=True, kw_only=True)
class NextRequest:
    """When a stub robot asks again: with its next observation, or with the same one, if it was told to hold.

    Attributes:
        at_s: on the log's clock.
        held_steps: control steps that it held until then; 0 where it goes on.
    """

    at_s: float
    held_steps: int = 0


@dataclass(kw_only=True)
class StubRobot(DrivenRobot):
    """A robot that shows recorded observations, one per chunk: load without physics.

    Attributes:
        seen: its observations, in order; it leaves when there is no more.
        period_s: time between two requests, in which a chunk must be there; None asks again as soon as the answer is there.
        execute_steps: actions that count as executed per chunk.
    """

    seen: Iterable[StubObservation]
    period_s: float | None
    execute_steps: int = 1

    async def _live(self) -> None:
        coming, held_steps, holds = NextRequest(at_s=self.log.now()), 0, 0
        for seen in self.seen:
            held_steps, begins = 0 if seen.begins else held_steps, seen.begins
            while True:
                # What it shows does not change while it holds, but its clock goes on.
                shown = replace(seen.observation, step=seen.observation.step + held_steps)
                if self.period_s is None:
                    self._count(await self._ask(shown, **_beginning(begins=begins)))
                    break
                await self._until(coming.at_s)
                coming = await self._in_time(
                    StubObservation(observation=shown, begins=begins), coming.at_s, self.period_s, holds
                )
                if not coming.held_steps:
                    holds = 0
                    break
                held_steps, holds, begins = held_steps + coming.held_steps, holds + 1, False

    async def _in_time(self, seen: StubObservation, at_s: float, period_s: float, holds: int) -> NextRequest:
        """Ask at `at_s`, after so many holds in a row, count what was met and missed, and return when to ask next."""
        due, reply, cancelled = at_s + period_s, None, True
        try:
            reply = await self._ask(seen.observation, **_beginning(begins=seen.begins))
            cancelled = False
        finally:
            now = self.log.now()
            missed = math.floor((now - due) / period_s) + 1 if now > due else 0
            # A wrong or refused answer is as good as none.
            missed = max(missed, 0 if cancelled or reply is not None else 1)
            self.log.missed += [due + i * period_s for i in range(missed)]
        if not missed:
            self.log.met.append(due)
        self._count(reply, held_steps=_hold_steps(holds, self.execute_steps))
        if reply is not None and reply.held:
            step_s = period_s / self.execute_steps
            held_steps = max(_hold_steps(holds, self.execute_steps), math.ceil((now - at_s) / step_s))
            return NextRequest(at_s=at_s + held_steps * step_s, held_steps=held_steps)
        return NextRequest(at_s=due + missed * period_s)

    def _count(self, reply: Reply | None, held_steps: int = 1) -> None:
        if reply is not None:
            steps = held_steps if reply.held else min(self.execute_steps, len(reply.actions))
            self.log.executed(steps, fresh=not reply.held)


@dataclass(frozen=True, kw_only=True)
class MotionResult:
    """What a simulated robot's motion led to: its observation, and, where the episode has ended, whether it succeeded."""

    observation: Observation
    executed: int
    success: bool | None = None


class SimulatedRobot(Protocol):
    """A simulated robot, e.g. `libra_ray.fleet.simulated.SimulatedFleet.robots`."""

    task: str

    async def begin(self) -> MotionResult:
        """The next episode."""

    async def execute(self, actions: NDArray[np.float32]) -> MotionResult:
        """Execute `(n, D)` actions, fewer where the episode ends before."""


@dataclass(kw_only=True)
class PhysicsRobot(DrivenRobot):
    """A simulated robot in real time. Each control step takes `period_s`; `execute_steps` are executed of each fresh chunk.

    A chunk is due when the control step of its observation ends. While it is missing the robot goes on with what is left of
    the chunk before, and then holds still step by step (no motion, gripper as it was); a late chunk goes on at the index that
    belongs to the present step. An episode's first chunk is executed from its beginning, as in evaluation: the robot stands
    where it was when it asked, and its control steps count from its first action.
    """

    simulated: SimulatedRobot
    period_s: float
    execute_steps: int
    action_dim: int
    _gripper: float = field(default=0.0, init=False)
    _holds: int = field(default=0, init=False)
    _begins: bool = field(default=True, init=False)
    _awaited: int = field(default=0, init=False)
    _rest: NDArray[np.float32] = field(init=False)

    async def _live(self) -> None:
        at_s = self.log.now()
        report: dict[str, Any] = {}
        while True:
            motion, self._begins, self._gripper, self._awaited = await self.simulated.begin(), True, 0.0, 0
            self._rest = np.empty((0, self.action_dim), np.float32)
            at_s = max(at_s, self.log.now())
            while motion.success is None:
                await self._until(at_s)
                # A driver that fell behind by whole steps begins anew instead of hurrying after its clock.
                at_s = max(at_s, self.log.now() - self.period_s)
                steps, motion = await self._chunk(motion, at_s, report)
                at_s, report = at_s + steps * self.period_s, {}
            self.log.episodes.append(FinishedEpisode(task=self.simulated.task, success=motion.success, at_s=self.log.now()))
            report = {"success": motion.success}

    async def _chunk(self, motion: MotionResult, at_s: float, report: dict[str, Any]) -> tuple[int, MotionResult]:
        """One request, and the control steps until the next one is wanted: how many, and what became of the robot."""
        shown = replace(motion.observation, step=motion.observation.step - self._awaited)
        asked = asyncio.ensure_future(self._ask(shown, **_beginning(begins=self._begins), **report))
        waited, missed = 0, len(self.log.missed)
        try:
            while not asked.done() and motion.success is None:
                due = at_s + (waited + 1) * self.period_s
                await asyncio.wait({asked}, timeout=max(0.0, due - self.log.now()))
                if not asked.done():
                    motion, waited = await self._meanwhile(due), waited + 1
        finally:
            asked.cancel()
        reply = None if asked.cancelled() or motion.success is not None else await asked
        late = 0 if self._begins else waited
        if reply is None or late >= len(reply.actions):
            return (waited, motion) if waited else (1, await self._held_after_error(at_s))
        self._begins = False
        if len(self.log.missed) == missed:
            self.log.met.append(at_s + (waited + 1) * self.period_s)
        last = max(self.execute_steps, late + 1)
        if reply.held:
            last = min(last, late + _hold_steps(self._holds, self.execute_steps))
        self._holds = self._holds + 1 if reply.held else 0
        motion = await self.simulated.execute(reply.actions[late:last])
        self._gripper = float(reply.actions[late:last][-1, -1])
        self._rest = self._rest[:0] if reply.held else reply.actions[last:]
        self.log.executed(motion.executed, fresh=not reply.held)
        return waited + motion.executed, motion

    async def _meanwhile(self, due: float) -> MotionResult:
        """One control step without the chunk that was due."""
        if not len(self._rest):
            self.log.missed.append(due)
            return await self._hold()
        action, self._rest = self._rest[:1], self._rest[1:]
        self._gripper = float(action[0, -1])
        motion = await self.simulated.execute(action)
        self.log.executed(1, fresh=True)
        return motion

    async def _held_after_error(self, at_s: float) -> MotionResult:
        self.log.missed.append(at_s + self.period_s)
        return await self._hold()

    async def _hold(self) -> MotionResult:
        if self._begins:
            self._awaited += 1
            self.log.awaited.append((self.log.now(), 1))
        still = np.zeros((1, self.action_dim), np.float32)
        still[0, -1] = self._gripper
        motion = await self.simulated.execute(still)
        self.log.executed(1, fresh=False)
        return motion


def _beginning(*, begins: bool) -> dict[str, Any]:
    return {"reset": True} if begins else {}


def _hold_steps(holds: int, most: int) -> int:
    """Control steps until a robot asks again that was told to hold, after so many holds in a row: 1, 2, 4, ..., a chunk."""
    return min(most, 2 ** min(holds, 16))
