"""The levels above the last, for one gateway: which of them a robot's observation is due at, and which intents are late."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from libra_ray.serving.intent_scheduler import IntentScheduler
from libra_ray.serving.retry import RecentMean
from libra_ray.serving.robot_sessions import RobotSession
from libra_ray.types import Intent, Level


@dataclass
class UpperLevels:
    """One scheduler a level, slow to fast.

    Args:
        make: a level's scheduler.
        late: per level, the share of recent requests that found its intent not renewed in time.
    """

    make: Callable[[Level], IntentScheduler]
    late: dict[str, RecentMean]
    schedulers: dict[str, IntentScheduler] = field(default_factory=dict)

    def become(self, levels: Iterable[Level]) -> None:
        """Other levels than before: nobody is asked for any more who waits now."""
        for scheduler in self.schedulers.values():
            scheduler.clear()
        self.schedulers = {level.name: self.make(level) for level in levels}

    async def show(self, robot: RobotSession, step: int, first_wait_s: float, wait_s: float) -> dict[str, Intent]:
        """Ask the levels that are due, from what the robot sees at `step`.

        Args:
            first_wait_s: the longest wait for an episode's first intent.
            wait_s: for another one where the robot's is used up.

        Returns:
            Per level its current intent, used up or not, where it has one.
        """
        control, late = robot.control, set()
        for name, scheduler in self.schedulers.items():
            # In this order: an intent that has come since the last request is taken over by the first line.
            if control.wants(name, step):
                scheduler.schedule(robot)
            elif control.is_requested(name) and control.current(name, step) is not None:
                late.add(name)
        reads = control.acting.reads
        if reads is not None and not control.covered(reads, step):
            longest_s = first_wait_s if control.current(reads, step) is None else wait_s
            if longest_s > 0:
                await self._arrival(robot, reads, step, longest_s)
        intents = {}
        for name, scheduler in self.schedulers.items():
            if (intent := control.current(name, step)) is not None:
                intents[name] = intent
            # A level that has none to read is not late: it could not be asked.
            above = scheduler.level.reads
            could = above is None or control.intent_at(above, step) is not None
            self.late[name].add(name in late or (could and control.intent_at(name, step) is None))
        return intents

    async def _arrival(self, robot: RobotSession, reads: str, step: int, wait_s: float) -> None:
        """Wait for an intent of the level that the last one reads; those above it are asked in their order."""
        control, episode = robot.control, robot.episode
        try:
            async with asyncio.timeout(wait_s):
                while robot.episode == episode and not control.covered(reads, step):
                    # What has come may be what another level was waiting for.
                    for name, scheduler in self.schedulers.items():
                        if not control.covered(name, step) and control.wants(name, step):
                            scheduler.schedule(robot)
                    robot.answered.clear()
                    await robot.answered.wait()
        except TimeoutError:
            pass
