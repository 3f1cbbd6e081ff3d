"""One tick of any number of robots against a policy in lockstep time, batched."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter

from libra_ray.config import ControlConfig
from libra_ray.control.delays import Delays
from libra_ray.control.robot import RobotControl
from libra_ray.spec import UNDECLARED, VectorSpec
from libra_ray.types import Action, Environment, Intent, Level, Observation, Policy


@dataclass
class LevelCalls:
    """Wall time of every batched call of a level, in milliseconds, and how many robots it served."""

    ms: list[float] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)


Latencies = dict[str, LevelCalls]
"""By the level's name."""
IN_TIME = Delays()
"""Every answer is there at once."""


def drive(
    robots: Mapping[int, RobotControl],
    observations: Mapping[int, Observation],
    policy: Policy,
    latencies: Latencies,
    delays: Delays = IN_TIME,
) -> dict[int, list[Action]]:
    """One tick in lockstep time: every level, slow to fast, is asked for the robots that want it, as one batch.

    Args:
        robots: the bookkeeping of every robot, by id.
        observations: this tick's observation of each robot that has to act.
        policy: the levels.
        latencies: gets the wall time of every call.
        delays: how late answers are, in simulated time.

    Returns:
        Per robot the actions up to the next step at which it needs an observation (at least one).
    """
    for i, o in observations.items():
        robots[i].observe(o)
    for level in policy.levels:
        if wanting := [i for i, o in observations.items() if robots[i].wants(level.name, o.step)]:
            _ask(level, {i: robots[i] for i in wanting}, observations, policy, latencies, delays)
    return {i: _ahead(robots[i], o.step) for i, o in observations.items()}


def _ask(
    level: Level,
    robots: Mapping[int, RobotControl],
    observations: Mapping[int, Observation],
    policy: Policy,
    latencies: Latencies,
    delays: Delays,
) -> None:
    seen = [_as_seen(robots[i], level, observations[i]) for i in robots]
    above = [robot.read_by(level.name, o.step) for robot, o in zip(robots.values(), seen, strict=True)]
    start = perf_counter()
    answers = policy.infer(level.name, seen, above)
    calls = latencies.setdefault(level.name, LevelCalls())
    calls.ms.append(1000 * (perf_counter() - start))
    calls.batch.append(len(seen))
    for robot, answer in zip(robots.values(), answers, strict=True):
        step = answer.first_step
        if isinstance(answer, Intent):
            arrival = delays.intent(level.name, robot.episode, step)
            in_time = arrival.usable == arrival.due
            robot.mark_requested(level.name)
            robot.accept_intent(
                answer,
                None if arrival.usable is None else step + arrival.usable,
                given_up_at=None if in_time else step + arrival.due,
            )
        else:
            robot.accept_chunk(answer, step + delays.chunk(level.name, robot.episode, step))


def _as_seen(robot: RobotControl, level: Level, observation: Observation) -> Observation:
    """With what the robot will do meanwhile, for the level that goes on from there."""
    committed = robot.committed(observation.step) if level is robot.acting else None
    return observation if committed is None else replace(observation, committed=committed)


def _ahead(robot: RobotControl, step: int) -> list[Action]:
    return [robot.next_action(s) for s in range(step, step + robot.steps_until_wanted(step))]


@dataclass
class PolicyController:
    """A policy as the `Controller` of a single robot."""

    policy: Policy
    control: ControlConfig
    needs_images: bool = True
    delays: Delays = IN_TIME
    latencies: Latencies = field(default_factory=dict)
    action: VectorSpec = UNDECLARED
    _queue: list[Action] = field(default_factory=list)

    def reset(self, environment: Environment, seed: int) -> None:
        """A new episode."""
        self._robot, self._queue = RobotControl(self.control, self.policy.levels, episode=seed, action=self.action), []

    def act(self, observation: Observation) -> Action:
        """The next action; a level is asked only where the robot wants it."""
        if not self._queue:
            self._queue = drive({0: self._robot}, {0: observation}, self.policy, self.latencies, self.delays)[0]
        return self._queue.pop(0)
