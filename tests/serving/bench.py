"""A gateway and its levels in this process, and what its replies must say."""

import asyncio
import logging
from types import SimpleNamespace

import numpy as np

from libra_ray.client.protocol import Reply, request
from libra_ray.serving.gateway import GatewayCore
from libra_ray.serving.settings import ServingSettings
from tests.serving.stubs import DIMS, HORIZON, LocalHandle, StubLevel, observe


class StubEngine:
    """Nobody watches."""

    gateway, log = "here", logging.getLogger("libra_ray.serving")

    def register(self, metric, deployment):
        return SimpleNamespace(observe=lambda *_, **__: None, inc=lambda *_, **__: None, set=lambda *_, **__: None)

    def running(self, handle):
        return handle.replicas

    def settled(self, handles):
        return True

    async def report(self, snapshot):
        pass

    async def fleet(self):
        return {"robots": []}


class Bench:
    """A gateway with all levels in this process, on the clock of the running event loop.

    Args:
        kinds: classes of levels, where they are not `kind`, which also says what levels there are.
    """

    def __init__(self, kind=StubLevel, kinds=None, **changes):
        names = [level.name for level in kind.levels]
        given = {"checkpoint": "first"} | {f"levels.{name}.timeout_s": 0.2 for name in names} | changes
        self.settings = ServingSettings.read(given).with_levels(names)
        self.levels = {name: (kinds or {}).get(name, kind)(self.settings, name) for name in names}
        handles = {name: LocalHandle(level, self.settings.levels[name].replicas) for name, level in self.levels.items()}
        self.core = GatewayCore(self.settings, handles, StubEngine(), clock=asyncio.get_running_loop().time)

    def __getattr__(self, level):
        return self.levels[level]

    async def start(self):
        await self.use(self.settings.user_config())
        return self

    async def use(self, user_config):
        # The same order as on a cluster is not promised, so the gateway hears of it first.
        switch = self.core.weight_switch
        switch.switch_to(user_config)
        for level in self.levels.values():
            await level.reconfigure(user_config)
        while not switch.weights.startswith(user_config["checkpoint"]):
            await asyncio.sleep(0.005)

    async def ask(self, robot, step=0, instruction="go", **extra):
        message = request(observe(robot, step, instruction), robot=f"robot {robot}", **extra)
        return Reply.read(await self.core.answer(message, "nameless"))

    async def drive(self, robot, chunks, first=0):
        """Whole chunks, one after the other; every answer is checked to be this robot's and of this step."""
        replies = []
        for step in range(first, first + chunks * HORIZON, HORIZON):
            reply = await self.ask(robot, step)
            check(reply, robot, step)
            replies.append(reply)
        return replies


def check(reply, robot, step):
    """The reply is this robot's and of this step, and so is the intent behind it."""
    assert reply.robot == f"robot {robot}"
    assert reply.actions.shape == (HORIZON, DIMS)
    assert reply.actions.dtype == np.float32
    assert reply.first_step == step
    if not reply.held:
        assert (reply.actions[:, 0] == robot).all(), "another robot's observation"
        assert (reply.actions[:, 1] == robot).all(), "another robot's intent"
        assert (reply.actions[:, 2] == step + np.arange(HORIZON)).all()
        assert (reply.actions[:, 3] == reply.actions[:, 2]).all(), "a token of another step"
        if reply.intent_first_step is not None:
            assert reply.intent_age_steps == step - reply.intent_first_step
