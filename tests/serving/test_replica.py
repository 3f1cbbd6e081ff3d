"""Planner and refiner as processes compute, without Ray around them."""

import asyncio
import dataclasses
import os
import shutil
import threading

import numpy as np
import pytest

from libra_ray.client.protocol import Reply, request
from libra_ray.on_ray.serving.app import engine
from libra_ray.serving.batches import Question, stacked
from libra_ray.serving.gateway import GatewayCore
from libra_ray.serving.replica import Planner, Refiner
from libra_ray.serving.requests import BadRequestError
from libra_ray.serving.settings import Settings
from libra_ray.serving.weights import weights_key
from libra_ray.types import ActionChunk, Plan
from tests.model import families, vision_models
from tests.model.builders import INSTRUCTIONS, make_observation, save_checkpoint, tiny_model
from tests.serving.stubs import LocalHandle, observe


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


@pytest.fixture(scope="module")
def pretrained_checkpoint(tmp_path_factory):
    """With both parts from outside, whose folders are there no more."""
    folder = tmp_path_factory.mktemp("served")
    hub = families.write(folder / "language", families.FAMILIES["llava"]()), vision_models.dinov2(folder / "eyes")
    changes = {"planner.backbone": str(hub[0]), "refiner.encoder": str(hub[1]), "planner.max_text_tokens": 6}
    save_checkpoint(folder / "checkpoint", tiny_model(changes))
    for source in hub:
        shutil.rmtree(source)
    return folder / "checkpoint"


@pytest.mark.parametrize(("text", "reason"), [("open the door " * 9, "too long"), ("open the <image> door", "'<image>' in it")])
def test_a_pretrained_policy_is_served_from_its_checkpoint_and_refuses_words_of_one_robot(pretrained_checkpoint, text, reason):
    """Robots whose requests come in together: one line for the one, fresh actions for the others, and for it the next time."""

    async def work():
        settings = Settings.model_validate(
            {"checkpoint": str(pretrained_checkpoint), "refiner.timeout_s": 60, "window_ms": 50, "refiner.max_batch": 4}
        )
        systems = Planner(settings), Refiner(settings)
        core = GatewayCore(settings, *map(LocalHandle, systems), engine)
        for system in systems:
            await system.reconfigure(settings.user_config())
        core.following.follow(settings.user_config())
        await core.following.loaded.wait()

        def ask(number, words):
            seen = dataclasses.replace(make_observation(number), instruction=words, step=0)
            return core.answer(request(seen, robot=f"robot {number}", reset=True), "nameless")

        words = [INSTRUCTIONS[0], text, INSTRUCTIONS[1], "press the button"]
        outcomes = await asyncio.gather(*[ask(n, said) for n, said in enumerate(words)], return_exceptions=True)
        refusal = outcomes.pop(1)
        assert isinstance(refusal, BadRequestError)
        assert reason in str(refusal)
        assert "\n" not in str(refusal)
        for outcome in (*outcomes, await ask(1, INSTRUCTIONS[0])):
            reply = Reply.read(outcome)
            assert np.isfinite(reply.actions).all()
            assert not reply.held

    asyncio.run(asyncio.wait_for(work(), 60))
