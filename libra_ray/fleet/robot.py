"""Robots that drive against an endpoint in real time: what they ask, when, and what they do while they wait.

Every robot keeps its own clock. A chunk that was asked for with the observation of time t is due at t + `period_s`: it is *met*
if it is there by then and *missed* otherwise. Nothing is left out while a robot waits for a late answer: every due time that
goes by meanwhile is a miss, so a server that stands still is not a server that was not asked (coordinated omission).
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from libra_ray.client.client import RefusedError, WrongRobotError
from libra_ray.client.protocol import Reply
from libra_ray.fleet.log import DriveLog, RequestRecord
from libra_ray.types import Observation

ERROR_PAUSE_S = 0.1
"""After an error, so that a server which refuses at once is not flooded."""


class Endpoint(Protocol):
    """One robot's connection; `libra_ray.client.client.AsyncRobotClient` is one, the benchmarks have those of other servers."""

    reconnects: int

    async def connect(self) -> Any:
        """Make the connection; ConnectionError where there is no server."""

    async def act(self, observation: Observation, **extra: Any) -> Reply:
        """The next chunk; `reset=True` begins an episode, `success` tells how the one before ended."""

    async def close(self) -> None:
        """End the connection."""


@dataclass(kw_only=True)
class DrivenRobot(ABC):
    """What stub and simulated robots share.

    Attributes:
        check: whether a reply is the answer to this very observation; where it is not, it counts as another robot's.
        phase_s: when it begins, so that robots do not all ask in the same instant.
        lifetime_s: it leaves after so long; None stays to the end.
    """

    name: str
    client: Endpoint
    log: DriveLog
    check: Callable[[Observation, Reply], bool] | None = None
    phase_s: float = 0.0
    lifetime_s: float | None = None

    async def run(self) -> None:
        """Until cancelled, or `lifetime_s` are over.

        Raises:
            ConnectionError: the server is gone for good.
            RefusedError: the server does not let this robot in at all.
        """
        await asyncio.sleep(self.phase_s)
        before = self.client.reconnects
        try:
            await self.client.connect()
            async with asyncio.timeout(self.lifetime_s):
                await self._live()
        except TimeoutError:
            pass
        finally:
            self.log.reconnects += self.client.reconnects - before
            with suppress(Exception):
                await self.client.close()

    @abstractmethod
    async def _live(self) -> None: ...

    async def _ask(self, observation: Observation, **extra: Any) -> Reply | None:
        """The answer, or None where there was none that may be executed; an error is counted and not raised."""
        sent = self.log.now()
        try:
            reply = await self.client.act(observation, **extra)
        except WrongRobotError:
            self.log.wrong_robot.append(self.log.now())
        except ConnectionError:
            raise
        except RefusedError as error:
            self.log.failed("refused", str(error))
        except TimeoutError as error:
            self.log.failed("timeout", str(error))
        except Exception as error:  # noqa: BLE001  (the border of one request)
            self.log.failed(type(error).__name__, str(error))
        else:
            self.log.answers.append(
                RequestRecord.of(
                    self.name, sent, self.log.now() - sent, reply, self.log.levels[:-1], begins=bool(extra.get("reset"))
                )
            )
            if self.check is None or self.check(observation, reply):
                return reply
            self.log.wrong_robot.append(self.log.now())
            return None
        await asyncio.sleep(ERROR_PAUSE_S)
        return None

    async def _until(self, at_s: float) -> None:
        """Sleep, and note how much too late the driver was."""
        await asyncio.sleep(max(0.0, at_s - self.log.now()))
        self.log.lateness.append((at_s, max(0.0, self.log.now() - at_s)))


async def drive(robots: Sequence[DrivenRobot], seconds: float, on_progress: Callable[[float], None] = lambda _: None) -> None:
    """Run all robots for so long; ends early when every one of them has left.

    Args:
        on_progress: called with the seconds so far, now and then.

    Raises:
        ConnectionError: every robot has lost the server for good, or never found it.
        RefusedError: the server refuses every robot.
    """
    began = asyncio.get_running_loop().time()
    tasks = [asyncio.ensure_future(robot.run()) for robot in robots]
    try:
        while (elapsed := asyncio.get_running_loop().time() - began) < seconds:
            on_progress(elapsed)
            _, living = await asyncio.wait(tasks, timeout=min(0.5, seconds - elapsed), return_when=asyncio.ALL_COMPLETED)
            if not living:
                break
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [end for end in ends if isinstance(end, Exception)]
    if errors and len(errors) == len(robots):
        raise errors[0]
    for robot, end in zip(robots, ends, strict=True):
        if isinstance(end, Exception):
            robot.log.failed(type(end).__name__, str(end))
