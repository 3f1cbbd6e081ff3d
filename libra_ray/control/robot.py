"""The asynchronous controller: when to plan, which slice of which plan is current, its age, what to do when late.

`RobotControl` is one robot's bookkeeping: pure, without a clock of its own and without a policy. `drive` is one tick of any
number of robots against a policy in lockstep time, batched. The serving gateway runs the same `RobotControl` in real time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from libra_ray.config import ActionConfig, ControlConfig
from libra_ray.control.surprise import Drift
from libra_ray.types import Action, ActionChunk, Environment, Observation, Plan, Policy


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a robot does where its intent is late or too old.

    Attributes:
        hold: the safe action. `repeat` the last one, right where an action is a position; `still`: zeros, with the last
            dimension (the gripper) repeated, right where an action is a position *change*, which repeated would run on.
        max_age_steps: an intent older than this many control steps is not used; None sets no limit but the plan's end.
    """

    hold: Literal["repeat", "still"] = "repeat"
    max_age_steps: int | None = None


@dataclass
class RobotControl:
    """One robot's current plan and chunk, in absolute control steps.

    Rules (`ControlConfig.rule`):
        fifo: as published. A new plan is asked for when the old one is used up; the refiner takes H steps per chunk, each with
            a fresh picture.
        overlap: the planner runs freely. A new plan is asked for at every chunk boundary at which none is under way, and
            replaces the rest of the old one at the right step as soon as it arrives.
        event: like overlap, but only where the plan will be used up before the next chunk ends, or where what is seen is a
            surprise (`libra_ray.control.surprise`): the world has drifted from what the plan assumed. Saves plans where M > 2.

    A plan asked for at step s may be used from step s + `planner_delay_steps` on; only the first plan of an episode is waited
    for. Where neither plan nor chunk covers a step, the last action is held, marked and counted.
    """

    control: ControlConfig
    action: ActionConfig
    limits: Limits = field(default_factory=Limits)
    plan: Plan | None = None
    chunk: ActionChunk | None = None
    _drift: Drift = field(default_factory=Drift, compare=False)
    _surprised: bool = False
    _looked: int | None = None
    _pending: list[tuple[int, Plan]] = field(default_factory=list)
    _asked: bool = False
    _last: Action | None = None

    def reset(self) -> None:
        """A new episode: nothing known, nothing under way."""
        self.plan, self.chunk, self._pending, self._asked, self._last = None, None, [], False, None
        self._surprised, self._looked = False, None
        self._drift.reset()

    @property
    def execute_steps(self) -> int:
        """Control steps executed of each chunk."""
        return self.control.execute_steps or self.action.horizon

    def look(self, observation: Observation) -> None:
        """What the robot sees at the step that is asked about next; the rule `event` needs it."""
        if self.control.rule == "event":
            self._surprised |= self._drift.surprised(observation, self._executed(observation.step))
            self._looked = observation.step

    def wants_plan(self, step: int) -> bool:
        """Whether the planner should be asked with this step's observation."""
        self._adopt(step)
        if self._asked:
            return False
        plan = self.covering(step)
        if plan is None or self.control.rule == "fifo":
            return plan is None
        ends_soon = plan.end_step < step + 2 * self.execute_steps
        return self.wants_chunk(step) and (self.control.rule == "overlap" or ends_soon or self._surprised)

    def covering(self, step: int) -> Plan | None:
        """The plan that a chunk from this step on is refined from; None where there is none, it is used up or too old."""
        self._adopt(step)
        plan, limit = self.plan, self.limits.max_age_steps
        if plan is None or not plan.first_step <= step < plan.end_step:
            return None
        return plan if limit is None or step - plan.first_step <= limit else None

    def asked(self) -> None:
        """The planner was asked; no second question before the answer."""
        self._asked, self._surprised = True, False

    @property
    def is_asked(self) -> bool:
        """Whether the planner owes an answer."""
        return self._asked

    def unanswered(self) -> None:
        """The planner failed to answer, and may be asked again."""
        self._asked = False

    def accept_plan(self, plan: Plan, usable_from: int) -> None:
        """The planner's answer, to be used from the absolute step `usable_from` on."""
        first = self.plan is None and not self._pending
        self._pending.append((plan.first_step if first else usable_from, plan))

    def wants_chunk(self, step: int) -> bool:
        """Whether the refiner should be asked with this step's observation.

        It should where a plan covers the step, and the chunk, or the plan that the chunk was refined from, is used up.
        """
        if self.covering(step) is None:
            return False
        return self.chunk is None or step >= min(
            self.chunk.first_step + self.execute_steps, self.chunk.plan_first_step + self.action.plan_steps
        )

    def accept_chunk(self, chunk: ActionChunk) -> None:
        """The refiner's answer."""
        self.chunk = chunk

    def next_action(self, step: int) -> Action:
        """The action of this step, or the last one again, marked as held.

        Raises:
            ValueError: nothing was ever planned for this episode, so that there is nothing to hold.
        """
        chunk = self.chunk
        if chunk is not None and 0 <= step - chunk.first_step < len(chunk.actions):
            value = chunk.actions[step - chunk.first_step]
            self._last = Action(value=value, label=value, intent_age_steps=step - chunk.plan_first_step)
            return self._last
        if self._last is None:
            raise ValueError(f"step {step} has no action and none to hold: the first plan of an episode must be waited for")
        age = None if self.plan is None else step - self.plan.first_step
        value = self._safe(self._last.value)
        return Action(value=value, label=value, intent_age_steps=age, held=True)

    def held_actions(self, step: int) -> NDArray[np.float32] | None:
        """Safe actions `(H, D)` for a robot that executes whole chunks; None where nothing was executed yet.

        They follow from the last action before `step` that the chunk in use holds.
        """
        chunk = self.chunk
        if chunk is None:
            return None
        last = chunk.actions[min(max(step - chunk.first_step, 1), len(chunk.actions)) - 1]
        return np.tile(self._safe(last), (self.action.horizon, 1))

    def _safe(self, last: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.limits.hold == "repeat":
            return last
        still = np.zeros_like(last)
        still[-1] = last[-1]
        return still

    def _executed(self, step: int) -> NDArray[np.float32] | None:
        """Sum `(D,)` of the actions from the last look to this step; None where the chunk in use does not tell."""
        chunk, since = self.chunk, self._looked
        if chunk is None or since is None or not chunk.first_step <= since < step <= chunk.first_step + len(chunk.actions):
            return None
        total: NDArray[np.float32] = chunk.actions[since - chunk.first_step : step - chunk.first_step].sum(axis=0)
        return total

    def steps_until_wanted(self, step: int) -> int:
        """Control steps that can be executed before a picture is needed again, at least 1."""
        self._adopt(step)
        ahead = [] if self.chunk is None else [self.chunk.first_step + self.execute_steps]
        if self.plan is not None and self.control.rule == "fifo":
            ahead.append(self.plan.end_step)
        ahead += [usable for usable, _ in self._pending]
        later = [s - step for s in ahead if s > step]
        return max(1, min(later, default=1))

    def _adopt(self, step: int) -> None:
        """Make the newest plan that has arrived the current one."""
        arrived = [plan for usable, plan in self._pending if usable <= step]
        if arrived:
            self.plan, self._asked = arrived[-1], False
            self._pending = [(usable, plan) for usable, plan in self._pending if usable > step]


@dataclass
class Latencies:
    """Wall time of every batched call, in milliseconds, and how many robots it served."""

    planner_ms: list[float] = field(default_factory=list)
    planner_batch: list[int] = field(default_factory=list)
    refiner_ms: list[float] = field(default_factory=list)
    refiner_batch: list[int] = field(default_factory=list)


def drive(
    robots: Mapping[int, RobotControl], observations: Mapping[int, Observation], policy: Policy, latencies: Latencies
) -> dict[int, list[Action]]:
    """One tick in lockstep time: plan for those that want it, refine for those that want it, both batched.

    Args:
        robots: the bookkeeping of every robot, by id.
        observations: this tick's observation of each robot that has to act.
        policy: planner and refiner.
        latencies: gets the wall time of both calls.

    Returns:
        Per robot the actions up to the next step at which it has to look again (at least one).
    """
    for i, o in observations.items():
        robots[i].look(o)
    wanting = [i for i, o in observations.items() if robots[i].wants_plan(o.step)]
    if wanting:
        seen = [observations[i] for i in wanting]
        plans = _timed(lambda: policy.plan(seen), latencies.planner_ms)
        latencies.planner_batch.append(len(seen))
        for i, plan in zip(wanting, plans, strict=True):
            robots[i].asked()
            robots[i].accept_plan(plan, plan.first_step + robots[i].control.planner_delay_steps)
    wanting = [i for i, o in observations.items() if robots[i].wants_chunk(o.step)]
    if wanting:
        seen = [observations[i] for i in wanting]
        held = [current for i in wanting if (current := robots[i].plan) is not None]
        chunks = _timed(lambda: policy.refine(seen, held), latencies.refiner_ms)
        latencies.refiner_batch.append(len(seen))
        for i, chunk in zip(wanting, chunks, strict=True):
            robots[i].accept_chunk(chunk)
    return {i: _ahead(robots[i], o.step) for i, o in observations.items()}


def _ahead(robot: RobotControl, step: int) -> list[Action]:
    return [robot.next_action(s) for s in range(step, step + robot.steps_until_wanted(step))]


def _timed[T](call: Callable[[], Sequence[T]], times_ms: list[float]) -> Sequence[T]:
    start = perf_counter()
    answers = call()
    times_ms.append(1000 * (perf_counter() - start))
    return answers


@dataclass
class PolicyController:
    """A dual-system policy as the `Controller` of a single robot."""

    policy: Policy
    control: ControlConfig
    action: ActionConfig
    needs_images: bool = True
    latencies: Latencies = field(default_factory=Latencies)
    _queue: list[Action] = field(default_factory=list)

    def reset(self, environment: Environment, seed: int) -> None:
        """A new episode."""
        self._robot, self._queue = RobotControl(self.control, self.action), []

    def act(self, observation: Observation) -> Action:
        """The next action; the policy is asked only where the robot wants a plan or a chunk."""
        if not self._queue:
            self._queue = drive({0: self._robot}, {0: observation}, self.policy, self.latencies)[0]
        return self._queue.pop(0)
