"""Systems that say whose answer it is, as Serve deployments or, behind `LocalHandle`, without Ray. They load no torch."""

import asyncio
import os

import numpy as np

from libra_ray.client.protocol import Handshake
from libra_ray.serving.batches import Answers
from libra_ray.serving.settings import Settings
from libra_ray.serving.weights import weights_key
from libra_ray.types import IMAGE_KEY, STATE_KEY, Observation

HORIZON, CHUNKS, DIMS = 5, 2, 5
HANG, FAIL, BAD = "hang the planner", "fail the planner", "an instruction with <image> in it"
FACTS = {
    "observation": {IMAGE_KEY: {"dtype": "uint8", "shape": [4, 4, 3]}, STATE_KEY: {"dtype": "float32", "shape": [2]}},
    "action": {"dtype": "float32", "shape": [HORIZON, DIMS]},
    "control_hz": 10.0,
    "horizon": HORIZON,
    "chunks": CHUNKS,
    "bins": 10,
    "history": 1,
    "instructions": ["go"],
    "checkpoint_digest": "checkpoint",
    "normalisation_digest": "statistics",
}
SHAKE = Handshake(
    **FACTS | {"instructions": ("go",)}, execute_steps=HORIZON, rule="overlap", max_message_bytes=2**20, gateway="here"
)


class _Stub:
    """Both systems: a robot's number is its state[0]; a plan's tokens carry it, and the step they speak of."""

    delay_s = 0.002

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys: list[str] = []
        self.batches: list[list[int]] = []
        self.hurried: list[bool] = []
        self.looked_at: list[str] = []

    async def reconfigure(self, user_config):
        if user_config["checkpoint"] == "broken":
            raise ValueError("there is no such checkpoint")
        self.keys = [*self.keys[-1:], weights_key(user_config)]

    async def describe(self, weights):
        if weights not in self.keys:
            raise RuntimeError(f"{weights} is not loaded")
        horizon = 3 if "short" in weights else HORIZON
        return FACTS | {
            "horizon": horizon,
            "action": {"dtype": "float32", "shape": [horizon, DIMS]},
            "checkpoint_digest": weights,
        }

    async def refusal(self, weights, instruction):
        assert weights in self.keys
        self.looked_at.append(instruction)
        return "it has '<image>' in it" if instruction == BAD else ""

    def check_health(self):
        pass


class StubPlanner(_Stub):
    """Sleeps for ever where it is told to hang."""

    async def plan(self, rows, pressure=0.0, *, hurry=False):
        assert rows.weights in self.keys
        self.hurried.append(hurry)
        assert BAD not in rows.instructions, "one robot's words have come into a batch with others"
        if HANG in rows.instructions:
            await asyncio.sleep(3600)
        if FAIL in rows.instructions:
            raise ArithmeticError("no plan today")
        await asyncio.sleep(self.delay_s)
        robots = rows.state[:, 0].astype(int)
        self.batches.append(robots.tolist())
        number, length = self.keys.index(rows.weights) + 1, FACTS["chunks"] * HORIZON
        tokens = [
            [[robot, step + i, number, 0, 0] for i in range(length)] for robot, step in zip(robots, rows.steps, strict=True)
        ]
        return Answers(numbers=rows.numbers, values=np.array(tokens), seconds=self.delay_s)


class StubRefiner(_Stub):
    """An action is (robot of the state, robot of the plan, step, step that the plan's token speaks of, process)."""

    async def refine(self, rows, pressure=0.0):
        assert rows.weights in self.keys
        assert BAD not in rows.instructions
        await asyncio.sleep(self.delay_s)
        robots = rows.state[:, 0].astype(int)
        self.batches.append(robots.tolist())
        horizon = 3 if "short" in rows.weights else HORIZON
        chunks = np.zeros((len(robots), horizon, DIMS), np.float32)
        for row, plan in enumerate(rows.plans()):
            start = int(rows.steps[row]) - plan.first_step
            assert 0 <= start < len(plan.tokens)
            for i in range(horizon):
                token = plan.tokens[min(start + i, len(plan.tokens) - 1)]
                chunks[row, i] = robots[row], token[0], rows.steps[row] + i, token[1], os.getpid() % 2**20
        return Answers(numbers=rows.numbers, values=chunks, seconds=self.delay_s)


class LocalHandle:
    """Calls an object in this process as a Serve handle would."""

    app_name, deployment_name = "app", "stub"

    def __init__(self, target):
        self.target = target

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
