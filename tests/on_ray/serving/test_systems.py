"""Planner and refiner as processes compute, without Ray around them."""

import asyncio
import os
import threading

import numpy as np
import pytest

from libra_ray.on_ray.serving.rows import Question, stacked
from libra_ray.on_ray.serving.settings import Settings
from libra_ray.on_ray.serving.systems import Planner, Refiner
from libra_ray.on_ray.serving.weights import weights_key
from libra_ray.types import ActionChunk, Plan
from tests.on_ray.serving.stubs import observe


class Noting:
    """A policy that notes the priority of the thread it is asked in."""

    def __init__(self):
        self.priorities, self.policies = [], []

    def plan(self, seen):
        self.priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        self.policies.append(os.sched_getscheduler(0) if hasattr(os, "SCHED_IDLE") else None)
        return [Plan(tokens=np.zeros((10, 5), int), first_step=0)]

    def refine(self, seen, plans):
        self.plan(seen)
        return [ActionChunk(actions=np.zeros((5, 5), np.float32), first_step=0, plan_first_step=0)]


@pytest.fixture
def settings():
    return Settings.model_validate({"checkpoint": "c", "planner.nice": 7})


async def asked(system, method, settings, **options):
    policy, key = Noting(), weights_key(settings.user_config())
    system._policies[key] = policy
    question = Question(number=0, observation=observe(0), plan=policy.plan([])[0])
    await getattr(system, method)(stacked([question], key, history=1), **options)
    return policy


def test_only_plans_that_can_wait_go_behind_and_what_is_hurried_does_not(settings):
    async def work():
        here = os.getpriority(os.PRIO_PROCESS, 0)
        planner, refiner = Planner(settings), Refiner(settings)
        for _ in range(2):
            assert (await asked(planner, "plan", settings)).priorities[-1] == here + 7
            assert (await asked(planner, "plan", settings, hurry=True)).priorities[-1] == here
            assert (await asked(refiner, "refine", settings)).priorities[-1] == here
        assert os.getpriority(os.PRIO_PROCESS, 0) == here

    asyncio.run(work())


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="a policy of Linux")
def test_by_default_plans_that_can_wait_have_what_nobody_else_wants():
    async def work():
        settings, here = Settings(checkpoint="c"), os.sched_getscheduler(0)
        planner, refiner = Planner(settings), Refiner(settings)
        for _ in range(2):
            assert (await asked(planner, "plan", settings)).policies[-1] == os.SCHED_IDLE
            assert (await asked(planner, "plan", settings, hurry=True)).policies[-1] == here
            assert (await asked(refiner, "refine", settings)).policies[-1] == here

    asyncio.run(work())
