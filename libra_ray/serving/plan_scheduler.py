"""The free-running planner: beside the refiner, always for the robots that will be without a plan first.

Nobody waits for a free-running planner, so it need not hurry: while there is time to spare before its robots ask again, it
gathers company and goes behind. They get their plans in time all the same, and processors that it shares with the refiner are
left to that. Where there is no time to spare, but still enough, it hurries.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from libra_ray.serving.batches import Answers, Question
from libra_ray.serving.batching import MixedUpError
from libra_ray.serving.robot_sessions import Robot, ServedPlan
from libra_ray.types import Observation

AGAIN_S = 0.1
"""After a failed call its robots are planned for so much later, twice as much after each further one."""
LONGEST_PENALTY_S = 5.0
SPARE_SHARE = 0.5
"""Share of a robot's time to spare for which an idle planner waits for company; at most for as long as a call takes."""
CALLS_AHEAD = 4
"""Calls between two observations of a robot before it has time to spare: one under way, its own, and as much again."""
HURRIED_CALLS = 8
"""A robot that asks again within so many calls has its plan hurried: one that goes behind may take several times as long."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    robot: Robot
    episode: int
    question: Question
    at: float

    @property
    def observation(self) -> Observation:
        """What the plan will be made from."""
        return self.question.observation


class Planning:
    """Robots that want a plan, and the calls that make plans. Nobody waits here but robots without any plan.

    Args:
        call: sends one batch by those weights, in a hurry or not.
        weights: the weights that new plans are made by.
        max_batch: robots in one call.
        in_flight: calls that may be under way now.
        failed: told of every failed call.
    """

    def __init__(
        self,
        call: Callable[[list[Question], str, bool], Awaitable[Answers]],
        *,
        weights: Callable[[], str],
        max_batch: int,
        in_flight: Callable[[], int],
        failed: Callable[[Exception], None],
    ) -> None:
        self._call, self._weights, self._failed = call, weights, failed
        self._max_batch, self._in_flight = max_batch, in_flight
        self._numbers = itertools.count()
        self._wanting: dict[Robot, float] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._call_s = 0.0

    def want(self, robot: Robot) -> None:
        """Plan for this robot as soon as it is its turn, from what it will have seen last by then."""
        robot.control.asked()
        robot.planned.clear()
        self._wanting[robot] = time.monotonic()
        # Even those in a hurry share the call with robots whose requests came in together with theirs.
        self._pump_in(self._window_s(robot))

    def _window_s(self, robot: Robot) -> float:
        """How long a robot's wish may wait for others'; not at all where it stands without a plan, or soon will."""
        if robot.steps_left <= 0:
            return 0.0
        return max(0.0, min(self._call_s, SPARE_SHARE * (robot.pace_s - CALLS_AHEAD * self._call_s)))

    def _hurries(self, robot: Robot) -> bool:
        """Whether its plan could come late from behind others, and hurrying can still help."""
        left_s = robot.seen_at + robot.pace_s - time.perf_counter()
        return self._call_s < left_s < HURRIED_CALLS * self._call_s

    def _patience_s(self) -> float:
        """How much longer company is waited for."""
        if len(self._wanting) >= self._max_batch:
            return 0.0
        return min(since + self._window_s(robot) for robot, since in self._wanting.items()) - time.monotonic()

    def _pump_in(self, seconds: float) -> None:
        """Look again then, or earlier where that was decided before."""
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, seconds)
        if self._timer is None or at < self._timer_at:
            self._cancel_timer()
            self._timer, self._timer_at = loop.call_at(at, self._pump), at

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pump(self) -> None:
        self._cancel_timer()
        while self._wanting and len(self._running) < self._in_flight():
            if (left_s := self._patience_s()) > 0:
                self._pump_in(left_s)
                return
            chosen = self._next()
            for robot in chosen:
                del self._wanting[robot]
            batch = [asked for robot in chosen if (asked := self._asked(robot)) is not None]
            if batch:
                hurry = any(self._hurries(asked.robot) for asked in batch)
                task = asyncio.get_running_loop().create_task(self._plan(batch, hurry=hurry))
                self._running.add(task)
                task.add_done_callback(self._came_back)
            elif not chosen:
                return

    def _next(self) -> list[Robot]:
        """The robots of the next call; one whose last call failed goes alone and later: it may have been the reason."""
        now = time.monotonic()
        free = [robot for robot in self._wanting if robot.again_at <= now]
        if not free:
            self._pump_in(min(robot.again_at for robot in self._wanting) - now)
            return []
        suspect = min(free, key=lambda robot: robot.steps_left)
        if suspect.failures:
            return [suspect]
        sound = (robot for robot in free if not robot.failures)
        return heapq.nsmallest(self._max_batch, sound, key=lambda robot: robot.steps_left)

    def _asked(self, robot: Robot) -> _Asked | None:
        if robot.seen is None:
            return None
        question = Question(number=next(self._numbers), observation=robot.seen)
        return _Asked(robot=robot, episode=robot.episode, question=question, at=robot.seen_at)

    def _came_back(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._pump()

    async def _plan(self, batch: list[_Asked], *, hurry: bool) -> None:
        weights, began = self._weights(), time.monotonic()
        try:
            answers = await self._call([asked.question for asked in batch], weights, hurry)
            if answers.numbers.tolist() != [a.question.number for a in batch] or len(answers.values) != len(batch):
                raise MixedUpError("the plans belong to other robots")
        except Exception as error:  # noqa: BLE001  # the border of a batch: counted, and its robots keep the plans they have
            self._failed(error)
            for asked in batch:
                self._unanswered(asked)
            return
        took_s = time.monotonic() - began
        self._call_s += (took_s - self._call_s) * (0.2 if self._call_s else 1.0)
        for asked, tokens in zip(batch, answers.values, strict=True):
            robot, step = asked.robot, asked.observation.step
            robot.failures, robot.again_at = 0, 0.0
            if robot.episode == asked.episode:
                plan = ServedPlan(tokens=tokens.astype(int), first_step=step, made_at=asked.at, weights=weights)
                robot.control.accept_plan(plan, step)
                robot.planned.set()

    def _unanswered(self, asked: _Asked) -> None:
        robot = asked.robot
        robot.again_at = time.monotonic() + min(AGAIN_S * 2**robot.failures, LONGEST_PENALTY_S)
        robot.failures += 1
        if robot.episode != asked.episode:
            return
        robot.control.unanswered()
        if robot.busy and robot.control.plan is None:
            self.want(robot)


def age_s(plan: ServedPlan) -> float:
    """Time since the observation behind a plan reached the gateway, in seconds."""
    return time.perf_counter() - plan.made_at
