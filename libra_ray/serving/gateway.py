"""The gateway: keeps every robot's control, asks planner and refiner for all of them at once, answers each with its own."""

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from libra_ray.client.protocol import Handshake
from libra_ray.config import ActionConfig, ControlConfig
from libra_ray.control.robot import Limits, RobotControl
from libra_ray.serving import retry as calls
from libra_ray.serving.batches import Answers, Question, stacked
from libra_ray.serving.batching import Answer, Batcher
from libra_ray.serving.engine import Engine
from libra_ray.serving.instructions import Instructions
from libra_ray.serving.plan_scheduler import Planning, age_s
from libra_ray.serving.requests import BadRequestError, Request, read_request
from libra_ray.serving.robot_sessions import Robot, Robots, ServedPlan
from libra_ray.serving.settings import Settings
from libra_ray.serving.telemetry import Telemetry
from libra_ray.serving.weight_switch import Following
from libra_ray.types import ActionChunk, Json, Observation

BEAT_S = 1.0
"""Between two snapshots for the board, and two looks at the systems' replicas."""


class NotReadyError(RuntimeError):
    """Planner and refiner are not loaded yet."""


class GatewayCore:
    """Everything of the gateway but its sockets.

    Args:
        settings: the application's.
        planner: handle of the planner's deployment.
        refiner: handle of the refiner's deployment.
        engine: what runs this gateway, made for its name.
    """

    def __init__(self, settings: Settings, planner: Any, refiner: Any, engine: Callable[[str], Engine]) -> None:
        self.settings, self._planner, self._refiner = settings, planner, refiner
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        made = engine(self.name)
        self.telemetry, self.board = Telemetry("gateway", made.register), made.board
        self.connections = 0
        self.draining = False
        self.space_changed_hooks: list[Callable[[], None]] = []
        self.following = Following(
            settings,
            planner,
            refiner,
            gateway=self.name,
            applications=made.applications,
            space_changed=self.space_changed,
        )
        self._names = itertools.count(1)
        self._missed, self._late = calls.Recent(), calls.Recent()
        self._instructions = Instructions(self._refusal)
        self.robots = Robots(self._control, 2 * settings.max_connections)
        self._planning = Planning(
            self._plan,
            weights=lambda: self.following.weights,
            max_batch=settings.planner.max_batch,
            in_flight=lambda: self.following.planners.running,
            failed=lambda error: self.telemetry.refused("planner call failed"),
        )
        self._refining = Batcher(
            self._refine,
            max_batch=settings.refiner.max_batch,
            in_flight=lambda: self.following.refiners.running,
            company=lambda: self.connections,
            window_s=None if settings.window_ms < 0 else settings.window_ms / 1000,
            deadline_s=lambda: self.deadline_s,
        )

    @property
    def handshake(self) -> Handshake:
        """What robots are told on connecting.

        Raises:
            NotReadyError: planner and refiner have not loaded yet.
        """
        if self.following.handshake is None:
            raise NotReadyError("planner and refiner are still loading; ask again soon")
        return self.following.handshake

    @property
    def ready(self) -> bool:
        """Whether robots can be answered."""
        return self.following.handshake is not None and not self.draining

    @property
    def deadline_s(self) -> float:
        """Time that the actions of one answer last, in seconds: an answer that takes longer is missed."""
        shake = self.following.handshake
        return 1.0 if shake is None else shake.execute_steps / shake.control_hz

    def new_name(self) -> str:
        """For a robot that gave none."""
        return f"robot-{next(self._names)}@{self.name}"

    async def answer(self, message: Json, name: str, owner: object | None = None) -> Json:
        """The answer to one request.

        Args:
            message: as received.
            name: of the robot, where the message has none.
            owner: the connection that it came by.

        Raises:
            BadRequestError: the request is wrong; the text says what would have been valid.
            NotReadyError: planner and refiner have not loaded yet.
            NoAnswerError: no plan could be had for the first request of an episode, or nobody could say whether its
                instruction is one.
        """
        arrived = time.perf_counter()
        request = read_request(message, self.handshake)
        if request.observation is not None:
            await self._instructions.check(self.following.weights, request.observation.instruction)
        robot = self.robots.named(request.robot or name)
        if owner is not None and robot.owner is not owner:
            robot.owner = owner
            self.telemetry.connected(robot.name)
        if robot.busy:
            raise BadRequestError("busy", f"a request of robot {robot.name!r} is under way; names must be unique in the fleet")
        robot.busy = True
        try:
            return await self._answer(request, robot, arrived)
        finally:
            robot.busy = False

    async def _answer(self, request: Request, robot: Robot, arrived: float) -> Json:
        if request.ended:
            self.telemetry.episode_ended(robot.name, request.success)
        step = -1 if request.observation is None else request.observation.step
        if request.reset or (robot.seen is not None and 0 <= step < robot.seen.step):
            robot.begin()
        answer: Json = {"robot": robot.name, "seq": request.seq}
        if request.observation is None:
            return answer
        observation = request.observation if step >= 0 else replace(request.observation, step=robot.next_step)
        chunk, refined = await self._act(robot, observation, arrived)
        robot.next_step = observation.step + self.handshake.execute_steps
        return answer | self._told(robot, observation, arrived, chunk, refined)

    async def _act(self, robot: Robot, observation: Observation, arrived: float) -> tuple[ActionChunk | None, Answer | None]:
        """A chunk for this observation, by the plan that is current; None where none covers it, or the refiner failed."""
        control, step = robot.control, observation.step
        robot.show(observation, arrived)
        control.look(observation)
        wants_plan = control.wants_plan(step)
        # Only now: a plan that has come since the last request is taken over by this one.
        late = control.plan is not None and control.is_asked
        if wants_plan:
            self._planning.want(robot)
        plan = control.covering(step)
        if plan is None and (control.plan is None or control.control.rule == "fifo"):
            plan = await self._first_plan(robot, step)
        self._late.add(late or plan is None)
        if not isinstance(plan, ServedPlan):
            # Robots that hold and ask again at once must not keep the planner's answers from coming in.
            await asyncio.sleep(0)
            return None, None
        # The plan's weights may be those before, with other ideas of an instruction.
        await self._instructions.check(plan.weights, observation.instruction)
        try:
            refined = await self._refining.ask(observation, plan, plan.weights)
        except calls.NoAnswerError:
            self.telemetry.refused("refiner call failed")
            return None, None
        chunk = ActionChunk(
            actions=refined.values.astype(np.float32, copy=False), first_step=step, plan_first_step=plan.first_step
        )
        control.accept_chunk(chunk)
        return chunk, refined

    async def _first_plan(self, robot: Robot, step: int) -> ServedPlan | None:
        """The only wait for a planner: an episode's first plan, and by the rule `fifo` each one."""
        first, episode = robot.control.plan is None, robot.episode
        wait_s = self.settings.first_plan_timeout_s
        try:
            async with asyncio.timeout(wait_s):
                while robot.episode == episode:
                    if isinstance(plan := robot.control.covering(step), ServedPlan):
                        return plan
                    robot.planned.clear()
                    await robot.planned.wait()
        except TimeoutError:
            if first and robot.control.held_actions(step) is None:
                raise calls.NoAnswerError(f"no plan within {wait_s:g} s: the planner does not answer; ask again") from None
        return None

    def _told(
        self, robot: Robot, observation: Observation, arrived: float, chunk: ActionChunk | None, refined: Answer | None
    ) -> Json:
        """The answer's fields beside `robot` and `seq`; counts it."""
        control, step = robot.control, observation.step
        actions = control.held_actions(step) if chunk is None else chunk.actions
        if actions is None:
            raise calls.NoAnswerError("the refiner does not answer, and nothing was executed yet that could be held; ask again")
        plan = control.plan
        took_s = time.perf_counter() - arrived
        age_steps = None if plan is None else step - plan.first_step
        intent_age_s = age_s(plan) if isinstance(plan, ServedPlan) else None
        missed = took_s > self.deadline_s
        self._missed.add(missed)
        self.telemetry.tick(
            robot.name,
            latency_s=took_s,
            batch_size=refined.batch if refined else 0,
            intent_age_steps=age_steps,
            intent_age_s=intent_age_s,
            held=chunk is None,
            missed=missed,
        )
        timing = {"total_ms": 1000 * took_s}
        if refined is not None:
            timing |= {"queue_ms": 1000 * refined.queue_s, "refiner_ms": 1000 * refined.call_s, "batch": refined.batch}
            timing["refiner_compute_ms"] = 1000 * refined.compute_s
        return {
            "actions": actions,
            "first_step": step,
            "plan_first_step": None if plan is None else plan.first_step,
            "intent_age_steps": age_steps,
            "intent_age_ms": None if intent_age_s is None else 1000 * intent_age_s,
            "held": chunk is None,
            "server_timing": timing,
        }

    async def _plan(self, questions: list[Question], weights: str, hurry: bool) -> Answers:
        began = time.perf_counter()
        rows = stacked(questions, weights, self.handshake.history)
        pressure = self._late.mean
        remote = lambda: self._planner.plan.remote(rows, pressure, hurry=hurry)  # noqa: E731
        answers: Answers = await calls.call(remote, timeout_s=self.settings.planner.timeout_s, tries=1)
        self.telemetry.planner_call(seconds=time.perf_counter() - began, batch_size=len(questions))
        return answers

    async def _refusal(self, weights: str, instruction: str) -> str:
        # Both systems hold the tokeniser; the refiner is sooner done with what it does.
        remote = lambda: self._refiner.refusal.remote(weights, instruction)  # noqa: E731
        refusal: str = await calls.call(remote, timeout_s=self.settings.refiner.timeout_s)
        return refusal

    async def _refine(self, questions: list[Question], weights: str) -> Answers:
        began = time.perf_counter()
        rows = stacked(questions, weights, self.handshake.history)
        queued, pressure = self._refining.queued, self._missed.mean
        remote = lambda: self._refiner.refine.remote(rows, pressure)  # noqa: E731
        answers: Answers = await calls.call(remote, timeout_s=self.settings.refiner.timeout_s)
        self.telemetry.refiner_call(seconds=time.perf_counter() - began, batch_size=len(questions), queued=queued)
        return answers

    def _control(self) -> RobotControl:
        shake, settings = self.handshake, self.settings
        return RobotControl(
            ControlConfig(rule=settings.rule, execute_steps=settings.execute_steps),
            ActionConfig(bins=shake.bins, horizon=shake.horizon, chunks=shake.chunks),
            Limits(hold=settings.hold, max_age_steps=settings.max_intent_age_steps or None),
        )

    def space_changed(self) -> None:
        """Other observations or actions than before: robots begin anew, and must shake hands again."""
        self.robots.clear()
        for hook in self.space_changed_hooks:
            hook()

    async def beat(self) -> None:
        """Once a second until the gateway ends: report, tidy, look at the systems."""
        while True:
            await asyncio.sleep(BEAT_S)
            self.robots.tidy()
            await self.board.report(self.telemetry.snapshot())
            await self.following.look()
