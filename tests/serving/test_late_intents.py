"""Served or evaluated: the same late answers lead to the same actions."""

import asyncio
import dataclasses

import numpy as np
import pytest

from libra_ray.config import ControlConfig, DelayConfig
from libra_ray.control.delays import Delays
from libra_ray.control.lockstep import drive
from libra_ray.control.robot import RobotControl
from libra_ray.types import ActionChunk, Intent, Level
from tests.serving.bench import Bench
from tests.serving.stubs import HORIZON, StubLevel, observe
from tests.serving.virtual_time import run

STEP_S = 0.1
STEPS = 120
PLAN = Level(name="planner", covers=20)
LONG = (PLAN, Level(name="refiner", covers=HORIZON, reads="planner"))


class Served(StubLevel):
    """Answers that name the steps of the observation and of the intent behind them, and what the robot does meanwhile."""

    levels = LONG
    delay_s = 0.0

    def chunk(self, row, weights):
        return chunk(row.observation, row.above.first_step)


class Evaluated:
    """The same answers, in lockstep time."""

    levels = LONG

    def infer(self, level, observations, above):
        if level == "planner":
            return [Intent(level=level, values={}, first_step=o.step, covers=PLAN.covers) for o in observations]
        return [chunk(o, intent.first_step) for o, intent in zip(observations, above, strict=True)]


def chunk(observation, intent_first_step):
    steps = np.arange(observation.step, observation.step + HORIZON)
    going_on = -1 if observation.committed is None else len(observation.committed)
    columns = [
        steps,
        np.full(HORIZON, observation.step),
        np.full(HORIZON, intent_first_step),
        np.full(HORIZON, going_on),
        steps,
    ]
    return ActionChunk(
        actions=np.stack(columns, axis=1).astype(np.float32), first_step=observation.step, intent_first_step=intent_first_step
    )


def evaluated(delay, control):
    robot, actions = RobotControl(control, LONG), []
    while len(actions) < STEPS:
        actions += drive({0: robot}, {0: observe(0, len(actions))}, Evaluated(), {}, Delays(DelayConfig(intent_steps=delay)))[0]
    return [(a.value.tolist(), a.intent_age_steps, a.held) for a in actions[:STEPS]]


def served(delay, control):
    """A robot that keeps its own time, in front of a planner that takes so many control steps."""

    class Late(Served):
        # An answer that comes at a step's very beginning may be used in it.
        delay_s = max(0.0, delay * STEP_S - 0.01)

    async def work():
        given = {field.name: getattr(control, field.name) for field in dataclasses.fields(control)}
        bench = await Bench(
            Served, kinds={"planner": Late}, intent_timeout_s=0, **{"levels.planner.timeout_s": 50} | given
        ).start()
        executed, began = [], None
        while len(executed) < STEPS:
            step = len(executed)
            if began is not None:
                await asyncio.sleep(max(0.0, began + step * STEP_S - asyncio.get_running_loop().time()))
            reply = await bench.ask(0, step)
            # An episode's first answer is waited for; its time begins then.
            began = asyncio.get_running_loop().time() if began is None else began
            ages = None if reply.intent_first_step is None else range(step - reply.intent_first_step, 10**6)
            lasts = 1 if reply.held else bench.core.handshake.execute_steps
            executed += [(reply.actions[i].tolist(), ages[i], reply.held) for i in range(lasts)]
        return executed[:STEPS]

    return run(work())


@pytest.mark.parametrize("rule", ["fifo", "overlap", "event"])
@pytest.mark.parametrize("delay", [1, 3, 5, 8, 13, 21, 40])
@pytest.mark.parametrize("more", [{}, {"execute_steps": 3}, {"committed_steps": 2}, {"max_intent_age_steps": 25}])
def test_evaluation_and_serving_give_the_same_actions_for_the_same_late_intents(rule, delay, more):
    control = ControlConfig(rule=rule, **more)
    assert served(delay, control) == evaluated(delay, control)
