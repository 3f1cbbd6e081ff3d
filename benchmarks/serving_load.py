"""The load of the serving benchmark: stub robots of any server's kind, and a judge who knows what each robot should be told."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.work import Work
from benchmarks.serving_servers import Server
from libra_ray.client.protocol import Handshake, Reply
from libra_ray.common.json_text import plain
from libra_ray.data.dataset import open_dataset
from libra_ray.fleet.log import DriveLog
from libra_ray.fleet.replay import Recording
from libra_ray.fleet.robot import Endpoint, drive
from libra_ray.fleet.robots import StubObservation, StubRobot
from libra_ray.types import STATE_KEY, ActionChunk, Intent, Json, Observation

CHUNKS_PER_EPISODE = 100
TOLERANCE = 1e-3
"""Largest difference, in the robot's units, that batches of other sizes may make."""
CHECKED = 256
"""Replies of a cell that are compared with the direct policy's."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """An answer as the judge gets it; of which step the intent behind it is, only some servers say."""

    robot: int
    step: int
    intent_first_step: int | None
    actions: NDArray[np.float32]


@dataclass
class Judge:
    """Compares answers with what the policy itself says to that robot's observation.

    Every robot shows one picture of its own, so that its intents are the same whenever they are made. Where a protocol does
    not say which intent an answer came from, it is right if it fits one of those that can be in use at its step.

    Attributes:
        above: per robot what the last level reads; None where it reads none.
    """

    work: Work
    shown: Sequence[Observation]
    above: list[Intent | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Ask the levels above the last once for every robot."""
        intents: dict[str | None, list[Intent | None]] = {None: [None] * len(self.shown)}
        for level in self.work.policy.levels[:-1]:
            answers = self.work.policy.infer(level.name, self.shown, intents[level.reads])
            intents[level.name] = [answer for answer in answers if isinstance(answer, Intent)]
        self.above = intents[self.work.policy.levels[-1].reads]

    def wrong(self, told: Sequence[Told]) -> int:
        """How many of the answers fit no intent of their robot."""
        covers = next((intent.covers for intent in self.above if intent is not None), 1)
        nearest = np.full(len(told), np.inf)
        for age in range(0, covers, self.work.horizon):
            begins = [t.step - age if t.intent_first_step is None else t.intent_first_step for t in told]
            rows = [i for i, first in enumerate(begins) if first >= 0]
            seen = [replace(self.shown[told[i].robot], step=told[i].step) for i in rows]
            intents = [self.above[told[i].robot] for i in rows]
            moved = [None if a is None else replace(a, first_step=begins[i]) for i, a in zip(rows, intents, strict=True)]
            for i, expected in zip(rows, self._chunks(seen, moved), strict=True):
                actions = told[i].actions
                if actions.shape == expected.actions.shape:
                    nearest[i] = min(nearest[i], np.abs(actions - expected.actions).max())
        return int((nearest > TOLERANCE).sum())

    def confusable(self) -> int:
        """Pairs of robots whose first answers cannot be told apart, so that a swap between them would go unseen."""
        table = np.stack([chunk.actions.ravel() for chunk in self._chunks(self.shown, self.above)])
        apart = np.abs(table[:, None] - table[None]).max(axis=2) > TOLERANCE
        return int((~apart).sum() - len(table)) // 2

    def _chunks(self, seen: Sequence[Observation], above: Sequence[Intent | None]) -> list[ActionChunk]:
        answers = self.work.policy.infer(self.work.policy.levels[-1].name, seen, above)
        return [answer for answer in answers if isinstance(answer, ActionChunk)]


def observations(work: Work, robots: int, dataset: Path | None) -> list[Observation]:
    """One observation per robot, all different: recorded ones where there is a data set, otherwise random ones."""
    shape, size = work.policy.source.manifest.shape, work.config.data.image_size
    keys, words = work.policy.source.manifest.image_keys, work.policy.source.manifest.instructions
    if dataset is not None:
        data = open_dataset(dataset, work.config.data)
        frames = dataset.parent / "frames"
        return list(_recorded(work, Recording.open(data, frames, _handshake(work)), robots))
    found = []
    for robot in range(robots):
        rng = np.random.default_rng(robot)
        images = {key: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for key in keys}
        state = rng.uniform(-1, 1, shape.state_dim).astype(np.float32)
        found.append(Observation(images=images, state=state, instruction=words[robot % len(words)] if words else ""))
    return found


def _recorded(work: Work, recording: Recording, robots: int) -> Iterator[Observation]:
    for robot in range(robots):
        # Beginnings look alike: each robot shows another moment of another episode.
        seen = next(islice(recording.robot(robot, robots), 2 + robot % 5, None))
        yield replace(seen.observation, step=0, past=())


def _handshake(work: Work) -> Handshake:
    shape, size = work.policy.source.manifest.shape, work.config.data.image_size
    pictures = {k: {"dtype": "uint8", "shape": [size, size, 3]} for k in work.policy.source.manifest.image_keys}
    return Handshake(
        observation={**pictures, STATE_KEY: {"dtype": "float32", "shape": [shape.state_dim]}},
        action={"dtype": "float32", "shape": [work.horizon, shape.action_dim]},
        control_hz=10, horizon=work.horizon, levels=work.policy.levels, execute_steps=work.horizon,
        history=1, rule="fifo", checkpoint_digest="", normalisation_digest="", max_message_bytes=0,
    )  # fmt: skip


def shows(observation: Observation, execute_steps: int, chunks: int = CHUNKS_PER_EPISODE) -> Iterator[StubObservation]:
    """Endless episodes of one picture, `chunks` long each."""
    for chunk in count():
        step = chunk % chunks * execute_steps
        yield StubObservation(observation=replace(observation, step=step), begins=step == 0)


@dataclass(kw_only=True)
class Load:
    """Stub robots with the answers that they were given.

    Attributes:
        client: makes a connection from a robot's name.
        shown: what each robot shows; robot i shows number i modulo their count.
        hz: chunk requests per second and robot; 0 asks again as soon as it is answered.
    """

    client: Callable[[str], Endpoint]
    shown: Sequence[Observation]
    execute_steps: int
    hz: float
    log: DriveLog = field(default_factory=DriveLog)
    told: list[Told] = field(default_factory=list)

    def robot(self, number: int, *, of: int, **options: float) -> StubRobot:
        """Robot `number` of a fleet of `of`."""
        which = number % len(self.shown)

        def keep(observation: Observation, reply: Reply) -> bool:
            if not reply.held:
                first = reply.intent_first_step
                told = Told(robot=which, step=observation.step, intent_first_step=first, actions=reply.actions)
                self.told.append(told)
            return True

        name, period_s = f"robot-{number:04d}", 1 / self.hz if self.hz else None
        # Of one length, all episodes would begin in the same moment, for which plans have to be waited for.
        seen = shows(self.shown[which], self.execute_steps, CHUNKS_PER_EPISODE - number % (CHUNKS_PER_EPISODE // 2))
        return StubRobot(
            name=name, client=self.client(name), log=self.log, check=keep, seen=seen,
            period_s=period_s, execute_steps=self.execute_steps, **{"phase_s": (period_s or 0.0) * number / of, **options},
        )  # fmt: skip

    def fleet(self, robots: int) -> list[StubRobot]:
        """A whole fleet."""
        return [self.robot(i, of=robots) for i in range(robots)]


async def measure(server: Server, load: Load, robots: int, *, seconds: float, warmup_s: float, judge: Judge) -> Json:
    """One cell: the summary of a fleet's load, the server's CPU seconds per request, wrong answers by the judge."""
    cpu: list[float] = []

    async def note_cpu() -> None:
        await asyncio.sleep(warmup_s)
        cpu.append(server.cpu_s())

    noting = asyncio.ensure_future(note_cpu())
    try:
        await drive(load.fleet(robots), warmup_s + seconds)
    finally:
        noting.cancel()
    used = server.cpu_s() - cpu[0]
    summary: Json = plain(load.log.summary(after_s=warmup_s, until_s=warmup_s + seconds))
    sample = random.Random(0).sample(load.told, min(CHECKED, len(load.told)))
    answered = summary["chunk_requests_per_s"] * summary["seconds"]
    summary["wrong_robot"] += judge.wrong(sample)
    return summary | {"checked_replies": len(sample), "cpu_s_per_request": used / answered if answered else None}
