"""One tick of any number of robots against a policy in lockstep time, batched."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

from libra_ray.config import ControlConfig
from libra_ray.control.robot import RobotControl
from libra_ray.types import Action, Environment, Intent, Level, Observation, Policy


@dataclass
class LevelCalls:
    """Wall time of every batched call of a level, in milliseconds, and how many robots it served."""

    ms: list[float] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)


Latencies = dict[str, LevelCalls]
"""By the level's name."""


def drive(
    robots: Mapping[int, RobotControl], observations: Mapping[int, Observation], policy: Policy, latencies: Latencies
) -> dict[int, list[Action]]:
    """One tick in lockstep time: every level, slow to fast, is asked for the robots that want it, as one batch.

    Args:
        robots: the bookkeeping of every robot, by id.
        observations: this tick's observation of each robot that has to act.
        policy: the levels.
        latencies: gets the wall time of every call.

    Returns:
        Per robot the actions up to the next step at which it needs an observation (at least one).
    """
    for i, o in observations.items():
        robots[i].observe(o)
    for level in policy.levels:
        if wanting := [i for i, o in observations.items() if robots[i].wants(level.name, o.step)]:
            _ask(level, {i: robots[i] for i in wanting}, observations, policy, latencies)
    return {i: _ahead(robots[i], o.step) for i, o in observations.items()}


def _ask(
    level: Level,
    robots: Mapping[int, RobotControl],
    observations: Mapping[int, Observation],
    policy: Policy,
    latencies: Latencies,
) -> None:
    seen = [observations[i] for i in robots]
    above = [robot.read_by(level.name, o.step) for robot, o in zip(robots.values(), seen, strict=True)]
    start = perf_counter()
    answers = policy.infer(level.name, seen, above)
    calls = latencies.setdefault(level.name, LevelCalls())
    calls.ms.append(1000 * (perf_counter() - start))
    calls.batch.append(len(seen))
    for robot, answer in zip(robots.values(), answers, strict=True):
        if isinstance(answer, Intent):
            robot.mark_requested(level.name)
            robot.accept_intent(answer, answer.first_step + robot.control.intent_delay_steps)
        else:
            robot.accept_chunk(answer)


def _ahead(robot: RobotControl, step: int) -> list[Action]:
    return [robot.next_action(s) for s in range(step, step + robot.steps_until_wanted(step))]


@dataclass
class PolicyController:
    """A policy as the `Controller` of a single robot."""

    policy: Policy
    control: ControlConfig
    needs_images: bool = True
    latencies: Latencies = field(default_factory=dict)
    _queue: list[Action] = field(default_factory=list)

    def reset(self, environment: Environment, seed: int) -> None:
        """A new episode."""
        self._robot, self._queue = RobotControl(self.control, self.policy.levels), []

    def act(self, observation: Observation) -> Action:
        """The next action; a level is asked only where the robot wants it."""
        if not self._queue:
            self._queue = drive({0: self._robot}, {0: observation}, self.policy, self.latencies)[0]
        return self._queue.pop(0)
