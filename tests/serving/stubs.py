"""Levels that say whose answer it is, as Serve deployments or, behind `LocalHandle`, without Ray. They load no torch."""

import asyncio
import os

import numpy as np

from libra_ray.client.protocol import Handshake
from libra_ray.serving.batches import InferenceResult
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import weights_key
from libra_ray.types import IMAGE_KEY, STATE_KEY, ActionChunk, Intent, Level, Observation

HORIZON, CHUNKS, DIMS = 5, 2, 5
HANG, FAIL, BAD = "hang the planner", "fail the planner", "an instruction with <image> in it"
LEVELS = (Level(name="planner", covers=CHUNKS * HORIZON), Level(name="refiner", covers=HORIZON, reads="planner"))
ONE = (Level(name="policy", covers=HORIZON),)
THREE = (
    Level(name="director", covers=6 * HORIZON),
    Level(name="planner", covers=3 * HORIZON, reads="director"),
    Level(name="refiner", covers=HORIZON, reads="planner"),
)
DESCRIPTION = {
    "observation": {IMAGE_KEY: {"dtype": "uint8", "shape": [4, 4, 3]}, STATE_KEY: {"dtype": "float32", "shape": [2]}},
    "action": {"dtype": "float32", "shape": [HORIZON, DIMS]},
    "control_hz": 10.0,
    "horizon": HORIZON,
    "levels": LEVELS,
    "history": 1,
    "instructions": ("go",),
    "checkpoint_digest": "checkpoint",
    "normalisation_digest": "statistics",
}
SHAKE = Handshake(**DESCRIPTION, execute_steps=HORIZON, rule="overlap", max_message_bytes=2**20, gateway="here")


class StubLevel:
    """A level of `levels`; a robot's number is its state[0].

    An intent's `tokens` are (robot, step that it speaks of, number of the weights, robot and step of the intent above). An
    action is (robot of the state, robot of the intent, step, step that the intent speaks of, process). The first level fails,
    or sleeps for ever, where it is told to.
    """

    levels = LEVELS
    delay_s = 0.002

    def __init__(self, settings: ServingSettings, level: str) -> None:
        self.settings = settings
        self.level = next(each for each in self.levels if each.name == level)
        self.keys: list[str] = []
        self.batches: list[list[int]] = []
        self.urgent: list[bool] = []
        self.late_shares: list[float] = []
        self.looked_at: list[str] = []

    async def reconfigure(self, user_config):
        if user_config["checkpoint"] == "broken":
            raise ValueError("there is no such checkpoint")
        self.keys = [*self.keys[-1:], weights_key(user_config)]

    async def describe(self, weights):
        if weights not in self.keys:
            raise RuntimeError(f"{weights} is not loaded")
        horizon = self.horizon(weights)
        return DESCRIPTION | {
            "horizon": horizon,
            "levels": (*self.levels[:-1], Level(name=self.levels[-1].name, covers=horizon, reads=self.levels[-1].reads)),
            "action": {"dtype": "float32", "shape": [horizon, DIMS]},
            "checkpoint_digest": weights,
        }

    def horizon(self, weights):
        return 3 if "short" in weights else HORIZON

    async def refusal(self, weights, instruction):
        assert weights in self.keys
        self.looked_at.append(instruction)
        return "it has '<image>' in it" if instruction == BAD else ""

    async def infer(self, batch):
        assert batch.weights in self.keys
        instructions = {row.observation.instruction for row in batch.requests}
        assert BAD not in instructions, "one robot's words have come into a batch with others"
        self.urgent.append(batch.urgent)
        self.late_shares.append(batch.late_share)
        if self.level is self.levels[0] and len(self.levels) > 1:
            if HANG in instructions:
                await asyncio.sleep(3600)
            if FAIL in instructions:
                raise ArithmeticError("no plan today")
        await asyncio.sleep(self.delay_s)
        self.batches.append([int(row.observation.state[0]) for row in batch.requests])
        answer = self.chunk if self.level is self.levels[-1] else self.intent
        answers = [answer(row, batch.weights) for row in batch.requests]
        return InferenceResult(numbers=[row.number for row in batch.requests], answers=answers, seconds=self.delay_s)

    def intent(self, row, weights):
        robot, step, number = row.observation.state[0], row.observation.step, self.keys.index(weights) + 1
        tokens = np.zeros((self.level.covers, DIMS), int)
        for i in range(self.level.covers):
            of, at, *_ = self.read(row, i)
            tokens[i] = robot, step + i, number, of, at
        return Intent(level=self.level.name, values={"tokens": tokens}, first_step=step, covers=self.level.covers)

    def chunk(self, row, weights):
        robot, step = row.observation.state[0], row.observation.step
        actions = np.zeros((self.horizon(weights), DIMS), np.float32)
        for i in range(len(actions)):
            of, at, *_ = self.read(row, i)
            actions[i] = robot, of, step + i, at, os.getpid() % 2**20
        return ActionChunk(actions=actions, first_step=step, intent_first_step=step)

    def read(self, row, i):
        """The token of step `i` from now on of the intent that is read, or what it sees itself."""
        intent, seen = row.above, row.observation
        assert (None if intent is None else intent.level) == self.level.reads
        age = 0 if intent is None else seen.step - intent.first_step
        assert age >= 0
        if intent is None or age >= intent.covers:
            return int(seen.state[0]), seen.step + i
        return intent.values["tokens"][min(age + i, intent.covers - 1)]

    def check_health(self):
        pass


class StubOfThree(StubLevel):
    """One of three levels."""

    levels = THREE


class StubOfOne(StubLevel):
    """The only level."""

    levels = ONE


class LocalHandle:
    """Calls an object in this process as a Serve handle would."""

    app_name, deployment_name = "app", "stub"

    def __init__(self, target, replicas=1):
        self.target, self.replicas = target, replicas

    def __getattr__(self, method):
        return _Method(getattr(self.target, method))


class _Method:
    def __init__(self, call):
        self.call = call

    def remote(self, *arguments, **options):
        # Like a Serve response: awaitable, and can be cancelled.
        return asyncio.ensure_future(self.call(*arguments, **options))


def observe(robot: int, step: int = 0, instruction: str = "go") -> Observation:
    """What the robot of this number sees."""
    picture = np.full((4, 4, 3), robot % 256, np.uint8)
    return Observation(
        images={IMAGE_KEY: picture}, state=np.array([robot, step], np.float32), instruction=instruction, step=step
    )
