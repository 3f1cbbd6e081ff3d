"""A level that runs freely beside the one that acts: always for the robots that will be without its intent first.

Nobody waits for a free-running level, so it need not hurry: while there is time to spare before its robots ask again, it
waits for more requests and computes at low priority. They get their intents in time all the same, and processors that it
shares with other levels are left to those. Where there is no time to spare, but still enough, its call is urgent.
"""

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from libra_ray.serving.batches import InferenceRequest
from libra_ray.serving.batching import CALL_SHARE, Call
from libra_ray.serving.robot_sessions import RobotSession, ServedIntent
from libra_ray.types import Intent, Level

AGAIN_S = 0.1
"""After a failed call its robots are asked for so much later, twice as much after each further one."""
LONGEST_PENALTY_S = 5.0
SPARE_SHARE = 0.5
"""Share of a robot's time to spare for which an idle level waits for more requests; at most for as long as a call takes."""
CALLS_AHEAD = 4
"""Calls between two observations of a robot before it has time to spare: one under way, its own, and as much again."""
URGENT_CALLS = 8
"""A robot that asks again within so many calls has an urgent request: at low priority a call may take several times as long."""


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A request, with what tells whether its answer is still wanted."""

    robot: RobotSession
    episode: int
    request: InferenceRequest
    weights: str
    seen_at: float


@dataclass(frozen=True, kw_only=True)
class _Penalty:
    """Of a robot whose last calls failed: how many, and when it may be in the next."""

    failures: int
    until: float


class IntentScheduler:
    """Robots that want an intent of one level, and the calls that make them.

    Args:
        level: whose intents.
        call: sends one batch.
        weights: the weights that intents of a level that reads none are made by; others are made by those of what they read.
        max_batch: robots in one call.
        in_flight: calls that may be under way now.
        failed: told of every failed call.
        ready: told of every intent, with the seconds since its picture.
        expected_peers: robots that may ask: when all of them have asked, nobody else is waited for by one that stands.
    """

    def __init__(
        self,
        level: Level,
        call: Call,
        *,
        weights: Callable[[], str],
        max_batch: int,
        in_flight: Callable[[], int],
        failed: Callable[[str], None],
        ready: Callable[[str, float], None] = lambda *_: None,
        expected_peers: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.level, self._call, self._weights, self._failed, self._ready = level, call, weights, failed, ready
        self._max_batch, self._in_flight, self._expected_peers, self._clock = max_batch, in_flight, expected_peers, clock
        self._numbers = itertools.count()
        self._waiting: dict[RobotSession, float] = {}
        self._penalties: WeakKeyDictionary[RobotSession, _Penalty] = WeakKeyDictionary()
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._call_s = 0.0

    @property
    def queued(self) -> int:
        """Robots that wait for a call."""
        return len(self._waiting)

    def schedule(self, robot: RobotSession) -> None:
        """Ask for this robot as soon as it is its turn, from what it will have seen last by then."""
        robot.control.mark_requested(self.level.name)
        self._waiting[robot] = self._clock()
        # Even urgent ones share the call with robots whose requests came in together with theirs.
        self._pump_in(self._window_s(robot))

    def clear(self) -> None:
        """Ask for nobody any more."""
        self._waiting.clear()
        self._cancel_timer()

    def _steps_left(self, robot: RobotSession) -> float:
        """Control steps that its intent still covers; below all numbers where it has none."""
        seen = robot.seen
        intent = None if seen is None else robot.control.current(self.level.name, seen.step)
        return -math.inf if intent is None or seen is None else intent.end_step - seen.step

    def _window_s(self, robot: RobotSession) -> float:
        """How long a robot may wait for others; where it stands without an intent, no longer than for the level that acts."""
        if len(self._waiting) >= self._max_batch:
            return 0.0
        if self._steps_left(robot) <= 0:
            return CALL_SHARE * self._call_s if len(self._waiting) < self._expected_peers() else 0.0
        return max(0.0, min(self._call_s, SPARE_SHARE * (robot.pace_s - CALLS_AHEAD * self._call_s)))

    def _is_urgent(self, robot: RobotSession) -> bool:
        """Whether its intent could come late at low priority, and urgency can still help."""
        left_s = robot.seen_at + robot.pace_s - self._clock()
        return self._call_s < left_s < URGENT_CALLS * self._call_s

    def _wait_left_s(self) -> float:
        """How much longer more requests are waited for."""
        return min(since + self._window_s(robot) for robot, since in self._waiting.items()) - self._clock()

    def _pump_in(self, seconds: float) -> None:
        """Consider again then, or earlier where that was decided before."""
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, seconds)
        # uvloop's handles of what is due at once do not say when.
        if self._timer is None or at < self._timer_at:
            self._cancel_timer()
            self._timer, self._timer_at = loop.call_at(at, self._pump), at

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pump(self) -> None:
        self._cancel_timer()
        while self._waiting and len(self._running) < self._in_flight():
            if (left_s := self._wait_left_s()) > 0:
                self._pump_in(left_s)
                return
            if batch := self._batch(chosen := self._next()):
                urgent = any(self._is_urgent(pending.robot) for pending in batch)
                task = asyncio.get_running_loop().create_task(self._run(batch, urgent=urgent))
                self._running.add(task)
                task.add_done_callback(self._call_ended)
            elif not chosen:
                return

    def _next(self) -> list[RobotSession]:
        """The robots of the next call; one whose last call failed goes alone and later: it may have been the reason."""
        now = self._clock()
        free = [robot for robot in self._waiting if robot not in self._penalties or self._penalties[robot].until <= now]
        if not free:
            self._pump_in(min(self._penalties[robot].until for robot in self._waiting) - now)
            return []
        first = min(free, key=self._steps_left)
        if first in self._penalties:
            return [first]
        sound = (robot for robot in free if robot not in self._penalties)
        return heapq.nsmallest(self._max_batch, sound, key=self._steps_left)

    def _batch(self, chosen: list[RobotSession]) -> list[_Pending]:
        """The requests of those robots that are answered by the same weights as the first's; the others wait on."""
        batch: list[_Pending] = []
        for robot in chosen:
            pending = self._pending(robot)
            if pending is None:
                # What it would read has ended meanwhile; its next observation asks for that first.
                del self._waiting[robot]
                robot.control.mark_failed(self.level.name)
            elif not batch or pending.weights == batch[0].weights:
                del self._waiting[robot]
                batch.append(pending)
        return batch

    def _pending(self, robot: RobotSession) -> _Pending | None:
        seen, above, weights = robot.seen, None, self._weights()
        if seen is None:
            return None
        if self.level.reads is not None:
            above = robot.control.read_by(self.level.name, seen.step)
            if not isinstance(above, ServedIntent):
                return None
            weights = above.weights
        request = InferenceRequest(number=next(self._numbers), observation=seen, above=above)
        return _Pending(robot=robot, episode=robot.episode, request=request, weights=weights, seen_at=robot.seen_at)

    def _call_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._pump()

    async def _run(self, batch: list[_Pending], *, urgent: bool) -> None:
        began, requests, weights = self._clock(), [pending.request for pending in batch], batch[0].weights
        try:
            result = await self._call(requests, weights, urgent)
            result.check(requests)
        except Exception:  # noqa: BLE001  # the border of a batch: counted, and its robots keep the intents they have
            self._failed(self.level.name)
            for pending in batch:
                self._call_failed(pending)
            return
        ready_at = self._clock()
        took_s = ready_at - began
        self._call_s += (took_s - self._call_s) * (0.2 if self._call_s else 1.0)
        for answer, pending in zip(result.answers, batch, strict=True):
            assert isinstance(answer, Intent)
            robot, step = pending.robot, pending.request.observation.step
            self._penalties.pop(robot, None)
            self._ready(self.level.name, ready_at - pending.seen_at)
            if robot.episode == pending.episode:
                intent = ServedIntent(
                    level=self.level.name,
                    values=answer.values,
                    first_step=step,
                    covers=self.level.covers,
                    made_at=pending.seen_at,
                    weights=weights,
                    ready_at=ready_at,
                    metadata=answer.metadata,
                )
                robot.control.accept_intent(intent, step)
                robot.answered.set()

    def _call_failed(self, pending: _Pending) -> None:
        robot = pending.robot
        failures = self._penalties[robot].failures if robot in self._penalties else 0
        until = self._clock() + min(AGAIN_S * 2**failures, LONGEST_PENALTY_S)
        self._penalties[robot] = _Penalty(failures=failures + 1, until=until)
        if robot.episode == pending.episode:
            robot.control.mark_failed(self.level.name)
            robot.answered.set()
