"""The gateway: keeps every robot's control, asks each level for all of them at once, answers each with its own."""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from libra_ray.client.protocol import Handshake
from libra_ray.control.robot import RobotControl
from libra_ray.serving import retry
from libra_ray.serving.batches import InferenceBatch, InferenceRequest, InferenceResult
from libra_ray.serving.batching import Batcher, RobotResult
from libra_ray.serving.engine import Engine
from libra_ray.serving.fleet_snapshot import FleetSnapshot
from libra_ray.serving.instructions import Instructions
from libra_ray.serving.intent_scheduler import IntentScheduler
from libra_ray.serving.requests import BadRequestError, Request, read_request
from libra_ray.serving.robot_sessions import RobotSession, RobotSessions, ServedIntent
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.telemetry import Telemetry
from libra_ray.serving.upper_levels import UpperLevels
from libra_ray.serving.weight_switch import WeightSwitch
from libra_ray.types import Intent, Json, Level, Observation

HEARTBEAT_S = 1.0
"""Between two snapshots for the aggregator."""


class NotReadyError(RuntimeError):
    """The levels are not loaded yet."""


class Connection(Protocol):
    """A robot's, as the gateway sees it."""

    def leave(self) -> None:
        """Close as soon as nothing is under way."""


class GatewayCore:
    """Everything of the gateway but its sockets.

    Args:
        handles: of the levels' deployments, by the level's name, slow to fast.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        settings: ServingSettings,
        handles: Mapping[str, Any],
        engine: Engine,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings, self.engine, self._handles, self._clock = settings, engine, handles, clock
        self.telemetry = Telemetry("gateway", engine.register, tuple(handles), clock=clock)
        self.connections: set[Connection] = set()
        self.draining = False
        self.weight_switch = WeightSwitch(settings, handles, engine, self._space_changed)
        self._names = itertools.count(1)
        self._late = {name: retry.RecentMean(clock=clock) for name in handles}
        self._instructions = Instructions(self._refusal)
        self.robots = RobotSessions(self._control, 2 * settings.max_connections, clock)
        *_, self._last = handles
        self._upper = UpperLevels(self._scheduler, self._late)
        self._batcher = Batcher(
            partial(self._infer, self._last),
            max_batch=settings.levels[self._last].max_batch,
            in_flight=lambda: self._running(self._last),
            expected_peers=lambda: len(self.connections),
            window_s=None if settings.window_ms < 0 else settings.window_ms / 1000,
            deadline_s=lambda: self.deadline_s,
            clock=clock,
        )

    @property
    def handshake(self) -> Handshake:
        """What robots are told on connecting.

        Raises:
            NotReadyError: the levels have not loaded yet.
        """
        if self.weight_switch.handshake is None:
            raise NotReadyError("the policy is still loading; ask again soon")
        return self.weight_switch.handshake

    def greeting(self) -> Handshake:
        """The handshake with the levels' margins of this moment.

        Raises:
            NotReadyError: the levels have not loaded yet.
        """
        found = self.weight_switch.margins(self.telemetry.latencies())
        return replace(self.handshake, margin_steps={name: margin.margin_steps for name, margin in found.items()})

    @property
    def ready(self) -> bool:
        """Whether robots can be answered."""
        return self.weight_switch.handshake is not None and not self.draining

    @property
    def deadline_s(self) -> float:
        """Time that the actions of one answer last, in seconds: an answer that takes longer is missed."""
        shake = self.weight_switch.handshake
        return 1.0 if shake is None else shake.execute_steps / shake.control_hz

    def new_name(self) -> str:
        """For a robot that gave none."""
        return f"robot-{next(self._names)}@{self.engine.gateway}"

    async def answer(self, message: Json, name: str, owner: object | None = None) -> Json:
        """The answer to one request.

        Args:
            message: as received.
            name: of the robot, where the message has none.
            owner: the connection that it came by.

        Raises:
            BadRequestError: the request is wrong; the text says what would have been valid.
            NotReadyError: the levels have not loaded yet.
            NoAnswerError: no intent could be had for the first request of an episode, or nobody could say whether its
                instruction is one.
        """
        arrived = self._clock()
        request = read_request(message, self.handshake)
        if request.observation is not None:
            await self._instructions.check(self.weight_switch.weights, request.observation.instruction)
        robot = self.robots.named(request.robot or name, owner)
        if robot.busy:
            raise BadRequestError("busy", f"a request of robot {robot.name!r} is under way; names must be unique in the fleet")
        robot.busy = True
        try:
            return await self._answer(request, robot, arrived)
        finally:
            robot.busy = False

    async def _answer(self, request: Request, robot: RobotSession, arrived: float) -> Json:
        if request.ended:
            self.telemetry.episode_ended(robot.row, request.success)
        step = -1 if request.observation is None else request.observation.step
        if request.reset or (robot.seen is not None and 0 <= step < robot.seen.step):
            robot.begin()
        answer: Json = {"robot": robot.name, "seq": request.seq}
        if request.observation is None:
            return answer
        observation = request.observation if step >= 0 else replace(request.observation, step=robot.next_step)
        robot.show(observation, arrived)
        robot.control.observe(observation)
        waits = self.settings.first_intent_timeout_s, self.settings.intent_wait_s
        intents = await self._upper.show(robot, observation.step, *waits)
        self.telemetry.replanned(robot.control.take_replans())
        result = await self._act(robot, observation)
        robot.next_step = observation.step + self.handshake.execute_steps
        return answer | self._reply(robot, observation.step, arrived, intents, result)

    async def _act(self, robot: RobotSession, observation: Observation) -> RobotResult | None:
        """A chunk for this observation; None where there is no intent to act under, or the last level failed."""
        control, step = robot.control, observation.step
        reads, weights, above = control.acting.reads, self.weight_switch.weights, None
        if reads is not None:
            above = control.read_by(control.acting.name, step)
            if above is None:
                # Robots that hold and ask again at once must not keep the answers of other levels from coming in.
                await asyncio.sleep(0)
                return None
            assert isinstance(above, ServedIntent)
            # Its weights may be those before, with other ideas of an instruction.
            weights = above.weights
            await self._instructions.check(weights, observation.instruction)
        if (committed := control.committed(step)) is not None:
            observation = replace(observation, committed=committed)
        try:
            result = await self._batcher.ask(observation, above, weights)
        except retry.NoAnswerError:
            self._failed(self._last)
            return None
        control.accept_chunk(result.chunk)
        return result

    def _reply(
        self, robot: RobotSession, step: int, arrived: float, intents: Mapping[str, Intent], result: RobotResult | None
    ) -> Json:
        """The answer's fields beside `robot` and `seq`; counts it."""
        control, now = robot.control, self._clock()
        actions = control.held_actions(step) if result is None else result.chunk.actions
        if actions is None:
            silent = next((name for name in self._upper.schedulers if name not in intents), self._last)
            raise retry.NoAnswerError(
                f"level {silent} does not answer, and nothing was executed yet that could be held; ask again"
            )
        read, took_s = intents.get(control.acting.reads or ""), now - arrived
        missed = took_s > self.deadline_s
        self._late[self._last].add(missed)
        metadata = {name: told for intent in intents.values() for name, told in intent.metadata.items()}
        self.telemetry.tick(
            robot.row,
            latency_s=took_s,
            batch_size=0 if result is None else result.batch,
            ages={name: (step - intent.first_step, now - intent.made_at) for name, intent in intents.items()},
            intent_age_steps=None if read is None else step - read.first_step,
            held=result is None,
            missed=missed,
            metadata=metadata,
        )
        timing = {"total_ms": 1000 * took_s}
        timing |= {f"{n}_ms": 1000 * (i.ready_at - i.made_at) for n, i in intents.items() if isinstance(i, ServedIntent)}
        if result is not None:
            timing |= {"queue_ms": 1000 * result.queue_s, "call_ms": 1000 * result.call_s}
            timing |= {"compute_ms": 1000 * result.compute_s, "batch": result.batch}
        return {
            "actions": actions,
            "first_step": step,
            "intent_first_step": None if read is None else read.first_step,
            "intent_age_steps": None if read is None else step - read.first_step,
            "intent_age_ms": None if read is None else 1000 * (now - read.made_at),
            "held": result is None,
            "server_timing": timing,
            "metadata": metadata,
        }

    async def _infer(self, level: str, requests: list[InferenceRequest], weights: str, urgent: bool) -> InferenceResult:
        """One batch, sent to a replica of the level; the last level's is tried again elsewhere, for robots wait for it."""
        began, tries = self._clock(), retry.TRIES if level == self._last else 1
        batch = InferenceBatch(requests=requests, weights=weights, urgent=urgent, late_share=self._late[level].mean)
        queued = self._upper.schedulers.get(level, self._batcher).queued
        remote = partial(self._handles[level].infer.remote, batch)
        result: InferenceResult = await retry.call(remote, timeout_s=self.settings.levels[level].timeout_s, tries=tries)
        self.telemetry.call(level, seconds=self._clock() - began, batch_size=len(requests), queued=queued)
        return result

    def _running(self, level: str) -> int:
        """Replicas of a level; at least 1, so that somebody is asked even while Serve starts a new one."""
        return max(1, self.engine.running(self._handles[level]))

    def _failed(self, level: str) -> None:
        self.telemetry.refused(f"{level} call failed")

    async def _refusal(self, weights: str, instruction: str) -> str:
        # All levels hold the tokeniser; the last one is soonest done with what it does.
        remote = partial(self._handles[self._last].refusal.remote, weights, instruction)
        refusal: str = await retry.call(remote, timeout_s=self.settings.levels[self._last].timeout_s)
        return refusal

    def _control(self) -> RobotControl:
        return RobotControl(self.settings.control, self.handshake.levels, action=self.handshake.robot.action)

    def _space_changed(self) -> None:
        """Other observations, actions or levels than before: robots begin anew, and must shake hands again."""
        self._upper.become(self.handshake.levels[:-1])
        self.robots.begin_anew()
        self.send_away()

    def send_away(self) -> None:
        """Tell all robots to connect again, each after the answer that is under way."""
        for connection in self.connections:
            connection.leave()

    def _scheduler(self, level: Level) -> IntentScheduler:
        return IntentScheduler(
            level,
            partial(self._infer, level.name),
            weights=lambda: self.weight_switch.weights,
            max_batch=self.settings.levels[level.name].max_batch,
            in_flight=lambda: self._running(level.name),
            failed=self._failed,
            ready=self.telemetry.intent,
            expected_peers=lambda: len(self.connections),
            clock=self._clock,
        )

    def snapshot(self) -> FleetSnapshot:
        """What happened of late, for the live page."""
        return self.telemetry.snapshot(self.robots.rows(), self.weight_switch.margins(self.telemetry.latencies()))

    async def heartbeat(self) -> None:
        """Once a second until the gateway ends: report and tidy."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.robots.tidy()
            await self.engine.report(self.snapshot())
