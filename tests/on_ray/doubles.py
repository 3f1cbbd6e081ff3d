"""Small stand-ins for robots, fleets and policies; none of them needs Ray or a simulator."""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from libra_ray.config import Config, SimConfig, override, preset
from libra_ray.evaluation.simulators import Simulators, StepResult
from libra_ray.types import IMAGE_KEY, ActionChunk, Observation, Transition
from tests.policies import DualStub, dual_levels, plan_of

STEPS = 12


def debug_config(**changes: object) -> Config:
    """The debug preset; keywords are dotted names with `__` for the dot."""
    return override(preset("debug"), {name.replace("__", "."): value for name, value in changes.items()})


class StubEnvironment:
    """Succeeds at its last step with even seeds; raises at step `raises_at` of the seeds in `broken`."""

    instruction, state_dim, action_dim, control_hz, max_steps = "count", 2, 4, 80, STEPS

    def __init__(self, task="stub", broken=(), raises_at=7):
        self.task, self.broken, self.raises_at = task, broken, raises_at
        self.image_shapes = {IMAGE_KEY: (2, 2, 3)}
        self.closed = False

    def reset(self, seed, *, render=True):
        assert not self.closed
        self.seed, self.now = seed, 0
        return self._observation()

    def step(self, action, *, render=True):
        self.now += 1
        if self.seed in self.broken and self.now == self.raises_at:
            raise FloatingPointError("the arm fell off")
        success = self.now == STEPS and self.seed % 2 == 0
        return Transition(observation=self._observation(), reward=0.0, success=success, truncated=self.now == STEPS)

    def expert_action(self):
        return np.zeros(4, np.float32)

    def render(self, height=None, width=None):
        return np.zeros((2, 2, 3), np.uint8)

    def close(self):
        self.closed = True
        raise OSError("a broken arm cannot even be closed")

    def _observation(self):
        state = np.array([self.seed, self.now], np.float32)
        return Observation(images={IMAGE_KEY: self.render()}, state=state, instruction=self.instruction, step=self.now)


class StubPolicy(DualStub):
    """Chunks of zeros; counts how many robots it was asked for."""

    def __init__(self, plan_steps=10, horizon=5):
        self.plan_steps, self.horizon = plan_steps, horizon
        self.levels = dual_levels(plan_steps, horizon)
        self.batches = []

    def plan(self, observations):
        return [plan_of(np.zeros((self.plan_steps, 4), np.int64), o.step) for o in observations]

    def refine(self, observations, plans):
        self.batches.append(len(observations))
        zeros = np.zeros((self.horizon, 4), np.float32)
        return [
            ActionChunk(actions=zeros, first_step=o.step, intent_first_step=p.first_step)
            for o, p in zip(observations, plans, strict=True)
        ]


class StubSimulators(Simulators):
    """Makes stub environments; the task `nowhere` cannot be made."""

    def __init__(self, broken=()):
        super().__init__(SimConfig(), 64)
        self.broken, self.made = broken, []

    def _take(self, task):
        if task == "nowhere":
            raise OSError("no such place")
        pool = self.idle.setdefault(task, [])
        if not pool:
            self.made.append(StubEnvironment(task.removeprefix("metaworld-"), self.broken))
            return self.made[-1]
        return pool.pop()


@dataclass
class LocalFleet:
    """One process without Ray. It dies at the calls numbered in `dies_at`, and always when a robot of `killers` moves."""

    simulators: Simulators
    dies_at: tuple[int, ...] = ()
    killers: tuple[int, ...] = ()
    calls: int = 0
    deaths: int = 0
    processes: int = 1

    def send(self, method: str, arguments: Mapping[int, Any], alone=()):
        results = self.ask(method, arguments, alone)
        return lambda: results

    def ask(self, method: str, arguments: Mapping[int, Any], alone=()) -> dict[int, StepResult]:
        together = [slot for slot in arguments if slot not in alone]
        results: dict[int, StepResult] = {}
        dead = False
        for slots in [together] * bool(together) + [[slot] for slot in arguments if slot in alone]:
            self.calls += 1
            kills = any(self._kills(method, arguments, slot) for slot in slots)
            if dead or kills or self.calls in self.dies_at:
                results |= dict.fromkeys(slots, StepResult(died=not dead))
                dead = True
            else:
                results |= getattr(self.simulators, method)({slot: arguments[slot] for slot in slots})
        if dead:
            self.deaths += 1
            self.simulators.running.clear()
        return results

    def _kills(self, method, arguments, slot):
        robot = self.simulators.running.get(slot)
        return method == "advance" and robot is not None and robot.request.seed in self.killers


def dying(method: str, mark: Path, call: int = 1) -> type[Simulators]:
    """Simulators whose process is killed in the given call of a method, once: the file `mark` tells later ones."""

    class Dying(Simulators):
        calls = 0

    def die(self, *args):
        self.calls += 1
        if self.calls == call and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(Simulators, method)(self, *args)

    setattr(Dying, method, die)
    return Dying


@dataclass
class Noted:
    """Remembers what it is told."""

    episodes: dict = field(default_factory=dict)
    pictures: dict = field(default_factory=dict)
    replans: dict = field(default_factory=dict)
    calls: int = 0

    def episode(self, job, episode, frames=(), replans=()):
        assert job not in self.episodes, f"{job} was noted twice"
        self.episodes[job], self.pictures[job], self.replans[job] = episode, len(frames), list(replans)

    def latencies(self, controller, latencies):
        self.calls += len(latencies["refiner"].ms)
